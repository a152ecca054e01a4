"""What a user would deploy instead of a generative pre-ranker: SASRec with a softmax over all items, on the same interactions and requests.

    python -m benchmarks.sasrec --root var/beauty [--minutes 15] [--seeds 13 14 15]

Reads `interactions` and `candidates` of a root whose run has come as far as `candidates`. Trains on what the pre-ranker of the test lists
trained on (all but each user's validation and test item), ranks all items but the user's own for each test request, and prints both side by
side with the paired difference and its 95 % bootstrap interval over users. The number of epochs is chosen on the validation targets by a
model that saw only the pretrain split, as the pre-ranker's was.

SASRec: Kang and McAuley, 2018 (arXiv 1808.09781); the softmax over all items instead of sampled negatives: Klenitskiy and Vasilev, 2023
(arXiv 2309.07602). Shapes: B users, T places, N items and the pad 0, D hidden size.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from gr2.environment import set_defaults

set_defaults()  # before torch: threads that spin while they wait make it several times slower

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from gr2.metrics import paired_bootstrap, values  # noqa: E402
from schemas.lake import Lake  # noqa: E402

PLACES, HIDDEN, LAYERS, HEADS, DROPOUT = 50, 128, 2, 2, 0.4
METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")


class SASRec(nn.Module):
    """Causal self-attention over item vectors; an item's score is the product with its vector."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items + 1, HIDDEN, padding_idx=0)
        self.places = nn.Embedding(PLACES, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, HIDDEN * 2, DROPOUT, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(HIDDEN), enable_nested_tensor=False)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, items_BT: Tensor) -> Tensor:
        """(B, T, D) states; pads stand on the left."""
        length = items_BT.shape[1]
        x_BTD = self.dropout(self.items(items_BT) * HIDDEN**0.5 + self.places.weight[-length:])
        causal_TT = torch.ones(length, length, dtype=torch.bool).triu(1)
        own_TT = torch.eye(length, dtype=torch.bool)  # a pad sees itself, or its row would be empty
        hidden_BTT = causal_TT | ((items_BT == 0)[:, None, :] & ~own_TT)
        return self.encoder(x_BTD, mask=hidden_BTT.repeat_interleave(HEADS, 0))


def padded(sequences: list[list[int]]) -> np.ndarray:
    """(B, T) the last items of each, pads on the left."""
    out_BT = np.zeros((len(sequences), PLACES), np.int64)
    for row, sequence in enumerate(sequences):
        out_BT[row, PLACES - len(sequence[-PLACES:]) :] = sequence[-PLACES:]
    return out_BT


def epoch(model: SASRec, optimizer: torch.optim.Optimizer, inputs_BT: Tensor, targets_BT: Tensor, batch: int = 128) -> float:
    """One pass over all users; returns the mean loss."""
    model.train()
    losses = []
    for rows in torch.randperm(len(inputs_BT)).split(batch):
        learned_BT = targets_BT[rows] > 0
        with torch.autocast("cpu", torch.bfloat16):
            states_MD = model(inputs_BT[rows])[learned_BT]
            logits_MN = states_MD @ model.items.weight.T
        logits_MN[:, 0] = -torch.inf
        loss = nn.functional.cross_entropy(logits_MN.float(), targets_BT[rows][learned_BT])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


@torch.no_grad()
def ranks(model: SASRec, histories: list[list[int]], targets: list[int], seen: list[list[int]], batch: int = 256) -> np.ndarray:
    """(R,) rank of each target among all items but the user's own."""
    model.eval()
    found = []
    for start in range(0, len(targets), batch):
        rows = slice(start, start + batch)
        with torch.autocast("cpu", torch.bfloat16):
            states_BD = model(torch.from_numpy(padded(histories[rows])))[:, -1]
        scores_BN = states_BD.float() @ model.items.weight.T
        scores_BN[:, 0] = -torch.inf
        own_B = scores_BN[torch.arange(len(scores_BN)), torch.tensor(targets[rows])]
        for row, items in enumerate(seen[rows]):
            scores_BN[row, items] = -torch.inf
        found.append((scores_BN > own_B[:, None]).sum(1) + 1)
    return torch.cat(found).numpy()


def fitted(sequences: list[list[int]], items: int, epochs: int, seed: int, minutes: float, watch: Any = None) -> SASRec:
    """A model after so many epochs, or as many as the minutes hold. `watch(model, epoch)` ends it early where it returns True."""
    torch.manual_seed(seed)
    model = SASRec(items)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs_BT, targets_BT = torch.from_numpy(padded([s[:-1] for s in sequences])), torch.from_numpy(padded([s[1:] for s in sequences]))
    began = time.monotonic()
    for number in range(1, epochs + 1):
        loss = epoch(model, optimizer, inputs_BT, targets_BT)
        print(f"epoch {number}: loss {loss:.3f}, {time.monotonic() - began:.0f} s", flush=True)
        if (watch and watch(model, number)) or time.monotonic() - began > minutes * 60:
            break
    return model


class Data:
    """What one root holds, items as numbers from 1."""

    def __init__(self, root: Path) -> None:
        lake = Lake(root)
        rows = lake.read("interactions", ["user_id", "item_id", "split"], order_by=["user_id", "ordinal"]).to_pylist()
        names = sorted({r["item_id"] for r in rows})
        self.number = {name: place for place, name in enumerate(names, 1)}
        self.of: dict[str, dict[str, list[int]]] = {"train": {}, "refit": {}}
        for row in rows:
            for fit, splits in (("train", ("pretrain",)), ("refit", ("pretrain", "rerank"))):
                if row["split"] in splits:
                    self.of[fit].setdefault(row["user_id"], []).append(self.number[row["item_id"]])
        columns = ["request_id", "user_id", "history_ids", "target_id", "full_rank", "slice"]
        self.requests = {s: lake.read("candidates", columns, order_by=["request_id"], split=s).to_pylist() for s in ("valid", "test")}

    def sequences(self, fit: str) -> list[list[int]]:
        """Users' items of a fit, of those with two or more."""
        return [s for s in self.of[fit].values() if len(s) > 1]

    def ranks(self, model: SASRec, split: str) -> np.ndarray:
        """(R,) over the split's requests."""
        rows = self.requests[split]
        histories = [[self.number[i] for i in r["history_ids"] if i in self.number] for r in rows]
        return ranks(model, histories, [self.number[r["target_id"]] for r in rows], histories)


def chosen_epochs(data: Data, minutes: float, patience: int = 5) -> int:
    """The number of epochs with the best R@10 on the validation targets."""
    best = (0.0, 0)

    def watch(model: SASRec, number: int) -> bool:
        nonlocal best
        recall = float(values("recall@10", data.ranks(model, "valid")).mean())
        print(f"  valid R@10 {recall:.4f}", flush=True)
        best = max(best, (recall, number))
        return number - best[1] >= patience

    fitted(data.sequences("train"), len(data.number), 200, 13, minutes, watch)
    return best[1]


def main() -> None:
    """Chooses, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15, help="longest training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[13])
    given = parser.parse_args()
    data = Data(given.root)
    epochs = chosen_epochs(data, given.minutes)
    rows = data.requests["test"]
    own = np.array([r["full_rank"] or 0 for r in rows], np.float64)
    theirs = [data.ranks(fitted(data.sequences("refit"), len(data.number), epochs, s, given.minutes), "test") for s in given.seeds]
    print(
        f"\n{epochs} epochs, seeds {given.seeds}\n\n| slice | metric | SASRec | pre-ranker | difference |\n| --- | --- | --- | --- | --- |"
    )
    for slice_ in ("all", "later_day"):
        inside = np.array([slice_ in ("all", r["slice"]) for r in rows], bool)
        for metric in METRICS:
            a, b = values(metric, own)[inside], np.mean([values(metric, r.astype(np.float64)) for r in theirs], axis=0)[inside]
            mean, low, high = paired_bootstrap(a, b, 1000, 13)
            print(f"| {slice_} | {metric} | {b.mean():.4f} | {a.mean():.4f} | {mean:+.4f} [{low:+.4f}, {high:+.4f}] |")


if __name__ == "__main__":
    main()
