"""The item loss: where an item follows, it is predicted whole among all items, beside token by token (LIGER, arXiv 2411.18814).

    loss_fn = ItemLoss(codes_NL, sid_ids(tokenizer), weight=0.5)
    loss, floats = loss_fn(model, batch)

A token loss teaches an item's first code to a model that does not yet know what the code stands for; a softmax over whole items, as in
SASRec, sees at once which item it was. An item's vector is the sum of its SID tokens' rows, the very rows that the beam search reads, and
a vector of its own where the model has been given some (`scoring.own_vectors`). What is published is a plain language model, beside which
these vectors lie.

Shapes: M learned tokens, I items that start among them, N items, L levels, D hidden size, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gr2.errors import ConfigError
from gr2.sids import Trie
from scoring.model import item_tokens
from scoring.own_vectors import item_vectors
from training.data import Batch
from training.loop import learned_states, state_logprobs


class ItemLoss:
    """Token loss plus `weight` times the item loss, as one micro-batch's share of the step. An item counts as much as its L tokens."""

    def __init__(self, codes_NL: NDArray[np.int64], sid_ids_LK: NDArray[np.int64], weight: float) -> None:
        self.trie, self.weight, self.levels = Trie.build(codes_NL), weight, len(sid_ids_LK)
        self.tokens_NL = item_tokens(sid_ids_LK, codes_NL)
        self.level_V = np.full(int(sid_ids_LK.max()) + 2, -1)  # the last place stands for all tokens beyond
        self.code_V = np.zeros_like(self.level_V)
        for level, ids_K in enumerate(sid_ids_LK):
            self.level_V[ids_K], self.code_V[ids_K] = level, np.arange(len(ids_K))

    def __call__(self, model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        hidden_MD, targets_M = learned_states(model, batch)
        weights_M = batch.weights_BT[batch.learned_BT]
        loss = -(weights_M * state_logprobs(model, hidden_MD, targets_M)).sum() / batch.norm
        places_I, items_I = (torch.from_numpy(a).to(hidden_MD.device) for a in self.starts(targets_M.cpu().numpy()))
        if hasattr(model.get_input_embeddings().weight, "ds_id"):
            raise ConfigError("the item loss reads the embeddings whole: set midtrain.item_weight to 0, or zero_stage to 2 or less")
        items_ND = item_vectors(model, self.tokens_NL)
        if not len(places_I):  # own vectors have a gradient all the same: ranks reduce the same parameters
            return loss + 0.0 * items_ND.sum(), {"item_loss": 0.0}
        logits_IN = (hidden_MD[places_I] @ items_ND.T.to(hidden_MD.dtype)).float()
        nll_I = torch.nn.functional.cross_entropy(logits_IN, items_I, reduction="none")
        share = self.levels * (weights_M[places_I] * nll_I).sum() / batch.norm
        return loss + self.weight * share, {"item_loss": share.detach()}

    def starts(self, targets_M: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`(places_I, items_I)`: where a whole item begins among the learned tokens, and which one it is.

        The tokens of an item are learned together, so they stand side by side in `targets_M`.
        """
        known_M = np.minimum(targets_M, len(self.level_V) - 1)
        level_M = self.level_V[known_M]
        first_I = np.flatnonzero(level_M == 0)
        first_I = first_I[first_I + self.levels <= len(targets_M)]
        window_IL = first_I[:, None] + np.arange(self.levels)
        whole_I = (level_M[window_IL] == np.arange(self.levels)).all(axis=1)
        items_I = self.trie.lookup(self.code_V[known_M[window_IL[whole_I]]])
        return first_I[whole_I][items_I >= 0], items_I[items_I >= 0]
