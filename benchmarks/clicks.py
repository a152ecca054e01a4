"""What is learned from clicks under position bias, held against the relevance that the simulator knows.

    python -m benchmarks.clicks --work FOLDER [--users 2000] [--days 40]        (about five minutes on two cores)

A marketplace logs slates of ten. People look at slot k with probability 0.75^(k - 1), and the logging policy, which knows tastes roughly,
puts what it likes higher. The stages make the lists (candidates.source = log, candidates.debias = position). The evidence program learns
from the clicks of split rerank, each user's by the fold of the others, and orders the slates of split test.

Printed: how often each slot is looked at, as fitted and as it is; and for each way of weighing clicks the mean rank correlation (Spearman)
of the scores with the true relevance within a slate, the NDCG of the true relevance, and the paired difference to ignoring the bias, with
its 95 % bootstrap interval over users.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks.stages import gr2, header, told
from gr2.clicks import inverse_weights
from schemas.lake import Lake
from scoring.evidence_engine import columns_of, fit, fold_of

CAP, SLATE = 10.0, 10


class Lists:
    """Slates of one split that have ten items: raw features (R, N, C), grades, users, weights, truth where it is known."""

    def __init__(self, root: Path, split: str, truth: dict[str, dict[str, float]]) -> None:
        lake = Lake(root)
        rows = lake.read("candidates", ["request_id", "user_id", "weights"], order_by=["request_id"], split=split).to_pylist()
        columns = ["request_id", "item_id", "grade", *columns_of()]
        table = lake.read("candidate_features", columns, order_by=["request_id", "incoming_rank"], split=split)
        owners, firsts, counts = np.unique(table["request_id"].to_numpy().astype(str), return_index=True, return_counts=True)
        whole = np.flatnonzero(counts == SLATE)
        places_RN = firsts[whole][:, None] + np.arange(SLATE)
        self.raw_RNC = np.stack([table[c].to_numpy().astype(np.float64)[places_RN] for c in columns_of()], axis=2)
        self.clicked_RN = (table["grade"].to_numpy()[places_RN] > 0).astype(np.float64)
        by_id = {r["request_id"]: r for r in rows}
        self.users = [by_id[owner]["user_id"] for owner in owners[whole]]
        self.weights_RN = np.array([by_id[owner]["weights"] or [1.0] * SLATE for owner in owners[whole]])
        items = table["item_id"].to_numpy().astype(str)[places_RN]
        self.truth_RN = np.array([[truth[o][i] for i in row] for o, row in zip(owners[whole], items, strict=True)])


def truths(folder: Path) -> dict[str, dict[str, float]]:
    """Request -> item -> P(click | looked at)."""
    found = {}
    for path in sorted(folder.glob("day=*.jsonl.gz")):
        with gzip.open(path, "rt") as file:
            for line in file:
                row = json.loads(line)
                found[row["request_id"]] = dict(zip(row["item_ids"], row["relevance"], strict=True))
    return found


def scores(train: Lists, test: Lists, weights_RN: np.ndarray | None) -> np.ndarray:
    """(R, N) scores of the test slates by a program that learned from the training clicks."""
    folds_R = np.array([fold_of(user) for user in train.users])
    program = fit(train.raw_RNC, np.ones(train.clicked_RN.shape, bool), train.clicked_RN, folds_R, weights_RN=weights_RN)
    return np.stack([program.scores(raw_NC, fold_of(user))[0] for raw_NC, user in zip(test.raw_RNC, test.users, strict=True)])


def spearman(scores_RN: np.ndarray, truth_RN: np.ndarray) -> np.ndarray:
    """(R,) rank correlation within each slate."""
    a_RN, b_RN = (rankdata(x, axis=1) - (SLATE + 1) / 2 for x in (scores_RN, truth_RN))
    return np.asarray((a_RN * b_RN).sum(axis=1) / np.sqrt((a_RN**2).sum(axis=1) * (b_RN**2).sum(axis=1)))


def ndcg(scores_RN: np.ndarray, truth_RN: np.ndarray) -> np.ndarray:
    """(R,) discounted true relevance of each order over that of the best."""
    discounts = 1 / np.log2(2 + np.arange(truth_RN.shape[1]))
    got = np.take_along_axis(truth_RN, np.argsort(-scores_RN, axis=1, kind="stable"), axis=1) @ discounts
    return np.asarray(got / (-np.sort(-truth_RN, axis=1) @ discounts))


def main() -> None:
    """Simulates, builds, learns, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--days", type=int, default=40)
    given = parser.parse_args()
    root = given.work.resolve() / "root"
    settings = [
        "candidates.source=log", f"candidates.n={SLATE}", f"simulator.users={given.users}", f"simulator.days={given.days}",
        "data.max_requests_per_user=50",
    ]  # fmt: skip
    if not (root / "runs" / "item_embeddings.json").exists():
        gr2("demo", root, ["run", "--to", "item_embeddings"], settings)
    gr2("demo", root, ["stage", "candidates"], [*settings, "candidates.debias=position", f"candidates.max_weight={CAP}"])
    truth = truths(root / "truth")
    train, test = Lists(root, "rerank", truth), Lists(root, "test", truth)
    true_K = 0.75 ** np.arange(SLATE)
    fitted = train.weights_RN[0]
    print(header("clicks", root) + "\n| slot | " + " | ".join(str(k) for k in range(1, SLATE + 1)) + " |\n| --- |" + " --- |" * SLATE)
    print("| looked at | " + " | ".join(f"{v:.3f}" for v in true_K) + " |")
    print("| fitted, at least " + f"{1 / CAP:.2f} | " + " | ".join(f"{1 / w:.3f}" for w in fitted) + " |")
    ways: dict[str, Any] = {
        "clicks as they are": None,
        "clicks over the fitted probabilities": train.weights_RN,
        "clicks over the true probabilities": np.broadcast_to(inverse_weights(true_K, CAP), train.clicked_RN.shape).copy(),
    }
    made = {"the order shown": -np.broadcast_to(np.arange(SLATE), test.truth_RN.shape)}
    made |= {name: scores(train, test, weights_RN) for name, weights_RN in ways.items()}
    made["the truth"] = test.truth_RN
    print(f"\n{len(train.users):,} clicked slates to learn from, {len(test.users):,} to judge, {given.users:,} users, {given.days} days\n")
    print("| learned from | Spearman | over clicks as they are | NDCG of the truth | over clicks as they are |")
    print("| --- | --- | --- | --- | --- |")
    plain = made["clicks as they are"]
    for name, scores_RN in made.items():
        rank_R, gain_R = spearman(scores_RN, test.truth_RN), ndcg(scores_RN, test.truth_RN)
        gained = (rank_R - spearman(plain, test.truth_RN), gain_R - ndcg(plain, test.truth_RN))
        over = [told(values_R, signed=True, users=test.users) for values_R in gained]
        print(f"| {name} | {rank_R.mean():.4f} | {over[0]} | {gain_R.mean():.4f} | {over[1]} |")


if __name__ == "__main__":
    main()
