"""A vector for each single item beside those of its tokens: what lets a pre-ranker remember one item (LIGER, arXiv 2411.18814).

    attach(model, codes_NL)                   # before mid-training: zeros, which the item loss alone trains
    item_vectors(model, tokens_NL)            # sums of tokens' rows, and the own vectors
    attach(model, codes_NL, path)             # a published model's, for the items of today

The sum of an item's tokens says what it shares with its neighbours; a few thousand rows cannot also say of each of many thousand items what
is true of it alone, as SASRec's vectors do. These vectors are no part of the language model, which is saved without them and stays plain:
they lie beside it, found by the items' codes, so that items may come and go. An item that came after training has none, and the beams judge
it by its tokens (`scoring.beams.judged`).

Shapes: N items, L levels, D hidden size.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from gr2.sids import Trie

NAME = "own_vectors"
FILE = Path(NAME) / "vectors.safetensors"  # in a folder of its own: engines read every weight file beside a model's config as the model's


class OwnVectors(torch.nn.Embedding):
    """Own vectors (weight: (N, D)) of the items with these codes. `known_N`: which of them were there in training."""

    def __init__(self, codes_NL: NDArray[np.integer], width: int) -> None:
        super().__init__(len(codes_NL), width)
        torch.nn.init.zeros_(self.weight)
        self.codes_NL, self.known_N = np.asarray(codes_NL, dtype=np.int64), np.ones(len(codes_NL), dtype=bool)


def attach(model: Any, codes_NL: NDArray[np.integer], folder: Path | None = None) -> None:
    """Gives a model own vectors for its items: zeros, or those of the model in a folder. Nothing where that model has none."""
    own = OwnVectors(codes_NL, model.config.hidden_size)
    if folder:
        if not (folder / FILE).exists():
            return
        saved = load_file(folder / FILE)
        row_N = Trie.build(saved["codes_NL"].numpy()).lookup(own.codes_NL)
        own.known_N = row_N >= 0
        own.weight.data[torch.from_numpy(own.known_N)] = saved["vectors_ND"][torch.from_numpy(row_N[own.known_N])]
    model.add_module(NAME, own.to(model.device))


def own_vectors(model: Any) -> OwnVectors | None:
    """What `attach` gave a model, if it did."""
    return getattr(model, NAME, None)


def detach(model: Any, folder: Path) -> None:
    """Takes the own vectors, if there are some, from a model that is about to be saved, and saves them beside it."""
    own = own_vectors(model)
    if own is None:
        return
    delattr(model, NAME)
    (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
    save_file({"codes_NL": torch.from_numpy(own.codes_NL), "vectors_ND": own.weight.detach().cpu().contiguous()}, folder / FILE)


def item_vectors(model: Any, tokens_NL: NDArray[np.int64]) -> torch.Tensor:
    """items_ND: the sum of each item's tokens' embeddings, and its own vector where the model has been given some (of as many items)."""
    rows_VD = model.get_input_embeddings().weight
    # not rows_VD[tokens_NL]: with several threads its gradients add up in any order, so that no run would equal another bit for bit
    sums_ND = torch.nn.functional.embedding_bag(torch.from_numpy(tokens_NL).to(rows_VD.device), rows_VD, mode="sum")
    own = own_vectors(model)
    return sums_ND if own is None else sums_ND + own.weight
