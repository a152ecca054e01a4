"""SASRec: self-attention over whole items, a vector each, a softmax over all of them. It judges beside tokens and counts in the pre-ranker.

    model = load(folder)                                       # as stage `sasrec` published it
    probs_BN = NextItem(model, place_of, 256).after(histories, exclude)

Semantic IDs generalise over like items, counts remember single pairs; this model remembers single items in the order of a history. Its best
items are rows of probabilities like those of `scoring.followers`, so that `scoring.beams` searches the mixture of all three exactly.

Kang and McAuley, 2018 (arXiv 1808.09781), with a softmax over all items in place of sampled negatives: Klenitskiy and Vasilev, 2023
(arXiv 2309.07602). Shapes: B histories, T places, N items (M with the pad, which is 0), D hidden size, K items kept.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gr2.sections import Sasrec
from scoring.model import autocast

CONFIG, WEIGHTS = "sasrec.json", "sasrec.safetensors"
SIZE = {"places", "hidden", "layers", "heads", "dropout"}  # what a published model is rebuilt from


class SASRec(nn.Module):
    """Causal self-attention over item vectors; an item's score is the product of the last state with its vector."""

    def __init__(self, items: Sequence[str], settings: Sasrec) -> None:
        super().__init__()
        self.names, self.settings, width = list(items), settings, settings.hidden
        self.items = nn.Embedding(len(self.names) + 1, width, padding_idx=0)
        self.places = nn.Embedding(settings.places, width)
        layer = nn.TransformerEncoderLayer(
            width, settings.heads, width * 2, settings.dropout, "gelu", batch_first=True, norm_first=True
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(layer, settings.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(settings.dropout)
        for table in (self.items, self.places):
            nn.init.normal_(table.weight, std=0.02)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.items.weight.device

    def forward(self, items_BT: Tensor) -> Tensor:
        """states_BTD; pads (0) stand on the left."""
        length = items_BT.shape[1]
        x_BTD = self.dropout(self.items(items_BT) * self.settings.hidden**0.5 + self.places.weight[-length:])
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=self.device).triu(1)
        own_TT = torch.eye(length, dtype=torch.bool, device=self.device)  # a pad sees itself, or its row would be empty
        hidden_BTT = causal_TT | ((items_BT == 0)[:, None, :] & ~own_TT)
        states_BTD: Tensor = self.encoder(x_BTD, mask=hidden_BTT.repeat_interleave(self.settings.heads, 0))
        return states_BTD

    def logits(self, states_XD: Tensor) -> Tensor:
        """logits_XM, float32, of all items after each state; the pad has none."""
        logits_XM = (states_XD @ self.items.weight.T.to(states_XD.dtype)).float()
        pad_M = torch.arange(logits_XM.shape[-1], device=logits_XM.device) == 0
        return logits_XM.masked_fill(pad_M, -torch.inf)

    @torch.no_grad()
    def after(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """logits_BM of what comes next, for histories as rows of numbers from 1."""
        self.eval()
        items_BT = torch.from_numpy(padded(histories, self.settings.places)).to(self.device)
        with autocast(self):
            states_BD = self(items_BT)[:, -1]
        return self.logits(states_BD.float())


def padded(sequences: Sequence[Sequence[int]], places: int) -> NDArray[np.int64]:
    """(B, T) the last items of each sequence, pads on the left."""
    out_BT = np.zeros((len(sequences), places), np.int64)
    for row, sequence in enumerate(sequences):
        out_BT[row, places - len(sequence[-places:]) :] = sequence[-places:]
    return out_BT


def save(model: SASRec, folder: Path) -> None:
    """Weights as safetensors, item ids and sizes as JSON."""
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"size": model.settings.model_dump(include=SIZE), "items": model.names}))


def load(folder: Path) -> SASRec:
    """What `save` wrote, in eval mode."""
    told = json.loads((folder / CONFIG).read_text())
    model = SASRec(told["items"], Sasrec.model_validate(told["size"]))
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()


class NextItem:
    """A trained model among the live items (`place_of`: item id -> column). It has no opinion of items that came after its training."""

    def __init__(self, model: SASRec, place_of: dict[str, int], keep: int) -> None:
        self.model, self.keep = model, keep
        self.place_M = np.array([-1, *(place_of.get(name, -1) for name in model.names)])
        self.number_N = np.zeros(len(place_of), dtype=np.int64)  # 0: an item that it does not know
        live_M = np.flatnonzero(self.place_M >= 0)
        self.number_N[self.place_M[live_M]] = live_M

    def after(self, histories: Sequence[Sequence[int]], exclude: Sequence[Sequence[int]]) -> Any:
        """(B, N) sparse rows: the `keep` most likely items, softmax over all live ones that are not excluded; empty for unknown histories.

        A row sums to at most 1. `histories`: rows of live items' columns, oldest first.
        """
        from scipy import sparse

        known = [[n for n in self.number_N[list(history)].tolist() if n] for history in histories]
        logits_BM = self.model.after(known)
        logits_BM[:, torch.from_numpy(self.place_M < 0).to(logits_BM.device)] = -torch.inf
        for row, places in enumerate(exclude):
            logits_BM[row, torch.from_numpy(self.number_N[list(places)]).to(logits_BM.device)] = -torch.inf
        best_BK = logits_BM.softmax(dim=1).topk(min(self.keep, logits_BM.shape[1]), dim=1)
        values_BK = best_BK.values.double().cpu().numpy() * np.array([bool(row) for row in known])[:, None]
        columns_BK = self.place_M[best_BK.indices.cpu().numpy()]
        kept_BK = (values_BK > 0) & (columns_BK >= 0)
        rows_X = np.nonzero(kept_BK)[0]
        return sparse.csr_array((values_BK[kept_BK], (rows_X, columns_BK[kept_BK])), shape=(len(histories), len(self.number_N)))
