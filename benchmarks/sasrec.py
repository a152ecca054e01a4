"""What a user would deploy instead of a generative pre-ranker: SASRec with a softmax over all items, on the same interactions and requests.

    python -m benchmarks.sasrec --roots ROOT [ROOT ...] [--minutes 60] [--seeds 13 14 15] [--lists 20 --work FOLDER]

Reads `interactions` and `candidates` of roots whose runs have come as far as `candidates`: the same data, one root a seed of the
pre-ranker. Trains on what the pre-ranker of the test lists trained on (all but each user's validation and test item), once for each of
`--seeds`, ranks all items but the user's own for each test request, and prints both side by side, each averaged over its seeds, with the
paired difference and its 95 % bootstrap interval over users. The number of epochs is chosen on the validation targets by a model that saw
only the pretrain split, as the pre-ranker's was.

With --lists, its best items become the lists of a copy of the root's tables (rerank and valid by the model of the pretrain split), with the
evidence of each candidate, and LambdaMART puts them in order, as it does the pre-ranker's: what the usual pair of tools gives.

The model is that of `scoring.sasrec`, which the pre-ranker has in its mixture; here it stands alone, is trained by a loop of its own, and
its epochs are chosen. Shapes: B users, T places, X places where an item follows, M items and the pad 0.
"""

import argparse
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gr2.environment import set_defaults

set_defaults()  # before torch: threads that spin while they wait make it several times slower

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import schemas  # noqa: E402
from benchmarks.stages import gr2, header, told  # noqa: E402
from gr2.config import Config, load  # noqa: E402
from gr2.context import Context  # noqa: E402
from gr2.metrics import values  # noqa: E402
from gr2.sections import Sasrec  # noqa: E402
from schemas.candidates import EXPERIMENT  # noqa: E402
from schemas.interactions import FITS  # noqa: E402
from schemas.lake import Lake  # noqa: E402
from scoring.model import autocast  # noqa: E402
from scoring.sasrec import SASRec, padded  # noqa: E402
from spark_jobs.candidates import FIT, REQUEST, SPLITS, publish_features, row_of  # noqa: E402
from spark_jobs.publish import publish  # noqa: E402
from spark_jobs.session import frame_of  # noqa: E402

SETTINGS = Sasrec()  # two layers of 128, dropout .4, the last fifty items
METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
LISTED = ("recall@1", "recall@3", "recall@5", "ndcg@3", "ndcg@5")


def epoch(model: SASRec, optimizer: torch.optim.Optimizer, inputs_BT: Tensor, targets_BT: Tensor, batch: int = 128) -> float:
    """One pass over all users; returns the mean loss."""
    model.train()
    losses = []
    for rows in torch.randperm(len(inputs_BT)).split(batch):
        learned_BT = targets_BT[rows] > 0
        with autocast(model):
            logits_XM = model.logits(model(inputs_BT[rows])[learned_BT])
        loss = nn.functional.cross_entropy(logits_XM, targets_BT[rows][learned_BT])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses))


def scored(model: SASRec, histories: list[list[int]], seen: list[list[int]], batch: int = 256) -> Iterator[Tensor]:
    """scores_BM of all items after each history, batch by batch; -inf for the pad and for what the user has seen."""
    for start in range(0, len(histories), batch):
        scores_BM = model.after(histories[start : start + batch])
        for row, items in enumerate(seen[start : start + batch]):
            scores_BM[row, items] = -torch.inf
        yield scores_BM


def ranks(model: SASRec, histories: list[list[int]], seen: list[list[int]], targets: list[int]) -> np.ndarray:
    """(R,) rank of each target, which the user had not seen, among all items but the user's own."""
    found, at = [], 0
    for scores_BM in scored(model, histories, seen):
        own_B = scores_BM[torch.arange(len(scores_BM)), torch.tensor(targets[at : at + len(scores_BM)])]
        found.append((scores_BM > own_B[:, None]).sum(1) + 1)
        at += len(scores_BM)
    return torch.cat(found).numpy()


def fitted(sequences: list[list[int]], names: list[str], epochs: int, seed: int, minutes: float, watch: Any = None) -> SASRec:
    """A model after so many epochs; `watch(model, epoch)` ends it early where it returns True. Exits where the minutes do not hold them."""
    torch.manual_seed(seed)
    model = SASRec(names, SETTINGS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs_BT, targets_BT = (
        torch.from_numpy(padded([s[part] for s in sequences], SETTINGS.places)) for part in (slice(-1), slice(1, None))
    )
    began = time.monotonic()
    for number in range(1, epochs + 1):
        loss = epoch(model, optimizer, inputs_BT, targets_BT)
        print(f"epoch {number}: loss {loss:.3f}, {time.monotonic() - began:.0f} s", flush=True)
        if watch and watch(model, number):
            break
        if number < epochs and time.monotonic() - began > minutes * 60:
            raise SystemExit(f"{number} epochs took {minutes:g} minutes: SASRec is not trained to its end; give --minutes more")
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
            for fit, splits in FITS.items():
                if row["split"] in splits:
                    self.of[fit].setdefault(row["user_id"], []).append(self.number[row["item_id"]])
        columns = [c for c in REQUEST if c != "seen_ids"]
        self.names = ["", *names]
        self.requests = {s: lake.read("candidates", columns, order_by=["request_id"], split=s).to_pylist() for s in SPLITS}

    def sequences(self, fit: str) -> list[list[int]]:
        """Users' items of a fit, of those with two or more."""
        return [s for s in self.of[fit].values() if len(s) > 1]

    def ranks(self, model: SASRec, split: str) -> np.ndarray:
        """(R,) over the split's requests."""
        return ranks(model, self.histories(split), self.seen(split), [self.number[r["target_id"]] for r in self.requests[split]])

    def histories(self, split: str) -> list[list[int]]:
        """Items before each target of the split."""
        return [[self.number[i] for i in r["history_ids"] if i in self.number] for r in self.requests[split]]

    def seen(self, split: str) -> list[list[int]]:
        """All items before each target: histories keep the latest."""
        users = [r["user_id"] for r in self.requests[split]]
        return [[*self.of["train"].get(u, ()), *items] for u, items in zip(users, self.histories(split), strict=True)]

    def lists(self, cfg: Config, models: dict[str, SASRec]) -> list[dict[str, Any]]:
        """Rows of `candidates`: the best items after each history, by the model that did not see the split."""
        found = []
        for split in SPLITS:
            rows = iter(self.requests[split])
            for scores_BM in scored(models[FIT[split]], self.histories(split), self.seen(split)):
                values_BK, places_BK = scores_BM.topk(cfg.candidates.n)
                for scores, places in zip(values_BK.tolist(), places_BK.tolist(), strict=True):
                    found.append(row_of(next(rows), FIT[split], "sasrec", [self.names[p] for p in places], scores, cfg.candidates.n))
        return found


def chosen_epochs(data: Data, minutes: float, patience: int = 5) -> tuple[int, SASRec]:
    """The number of epochs with the best R@10 on the validation targets, and the model after so many."""
    best, kept = (0.0, 0), SASRec(list(data.number), SETTINGS)

    def watch(model: SASRec, number: int) -> bool:
        nonlocal best
        recall = float(values("recall@10", data.ranks(model, "valid")).mean())
        print(f"  valid R@10 {recall:.4f}", flush=True)
        if (recall, number) > best:
            best = (recall, number)
            kept.load_state_dict(model.state_dict())
        return number - best[1] >= patience

    fitted(data.sequences("train"), list(data.number), 200, 13, minutes, watch)
    return best[1], kept


def reordered(profile: str, root: Path, work: Path, data: Data, models: dict[str, SASRec], size: int) -> None:
    """Publishes the lists in a copy of the root's tables, lets LambdaMART order them, prints both orders' figures over all test users."""
    shutil.rmtree(work, ignore_errors=True)
    for name in ("interactions", "items", "item_pairs", "item_stats", "item_embeddings"):
        shutil.copytree(root / "tables" / name, work / "tables" / name)
    settings = [f"candidates.n={size}", "evaluation.baselines=[lambdamart]"]
    ctx = Context(load(profile, [f"paths.root={work}", *settings]))
    table = pa.Table.from_pylist(data.lists(ctx.cfg, models), schema=schemas.get("candidates").arrow())
    publish(ctx, "candidates", frame_of(ctx, table), {"night": EXPERIMENT})
    publish_features(ctx)
    gr2(profile, work, ["stage", "baselines"], settings)
    rows = {r["request_id"]: r for r in data.requests["test"]}
    print(f"\nLists of {size}, all users\n\n| slice | order | " + " | ".join(LISTED) + " |\n| --- | --- |" + " --- |" * len(LISTED))
    for model in ("prerank", "lambdamart"):
        orders = ctx.lake.read("baselines", ["request_id", "new_order"], split="test", model=model).to_pylist()
        placed = [(rows[o["request_id"]]["slice"], place(o["new_order"], rows[o["request_id"]]["target_id"])) for o in orders]
        for slice_ in ("all", "later_day"):
            own = [rank for of, rank in placed if slice_ in ("all", of)]
            print(f"| {slice_} | {model} | " + " | ".join(f"{values(m, own).mean():.4f}" for m in LISTED) + " |")


def full_ranks(root: Path, data: Data) -> np.ndarray:
    """(R,) the pre-ranker's rank of each test target of `data`, 0 where beams did not find it."""
    rows = Lake(root).read("candidates", ["request_id", "target_id", "full_rank"], order_by=["request_id"], split="test").to_pylist()
    asked, theirs = ([(r["request_id"], r["target_id"]) for r in each] for each in (data.requests["test"], rows))
    if asked != theirs:
        raise SystemExit(f"{root} holds other test requests than the first root: name roots of one data set, one a seed")
    return np.array([r["full_rank"] or 0 for r in rows])


def place(order: list[str], target: str) -> int:
    """Rank of the target; 0 where it is not listed."""
    return order.index(target) + 1 if target in order else 0


def main() -> None:
    """Chooses, trains, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roots", type=Path, nargs="+", required=True, help="one a seed; the first gives the data")
    parser.add_argument("--minutes", type=float, default=60, help="longest training; one that takes longer is refused")
    parser.add_argument("--seeds", type=int, nargs="+", default=[13])
    parser.add_argument("--lists", type=int, default=0, help="size of the lists that LambdaMART orders; 0: none")
    parser.add_argument("--work", type=Path, help="with --lists: a folder for their tables")
    parser.add_argument("--profile", default="beauty")
    given = parser.parse_args()
    if given.lists and not given.work:
        parser.error("--lists needs --work")
    data = Data(given.roots[0])
    own = [full_ranks(root, data) for root in given.roots]
    epochs, early = chosen_epochs(data, given.minutes)
    rows = data.requests["test"]
    models = [fitted(data.sequences("refit"), list(data.number), epochs, seed, given.minutes) for seed in given.seeds]
    theirs = [data.ranks(model, "test") for model in models]
    print(f"{header('sasrec', *given.roots)}\n{epochs} epochs, seeds {given.seeds}; pre-rankers: {len(own)}\n")
    print("| slice | metric | SASRec | pre-ranker | difference |\n| --- | --- | --- | --- | --- |")
    for slice_ in ("all", "later_day"):
        inside = np.array([slice_ in ("all", r["slice"]) for r in rows], bool)
        for metric in METRICS:
            a, b = (np.mean([values(metric, ranks_R) for ranks_R in each], axis=0)[inside] for each in (own, theirs))
            print(f"| {slice_} | {metric} | {b.mean():.4f} | {a.mean():.4f} | {told(a - b, signed=True)} |", flush=True)
    if given.lists:
        reordered(given.profile, given.roots[0], given.work, data, {"train": early, "refit": models[0]}, given.lists)


if __name__ == "__main__":
    main()
