"""Graded rewards from impressions: what RL makes of clicks and purchases, by the log and by the relevance that the simulator knows.

    python -m benchmarks.graded --work FOLDER [--steps 120] [--users 1500]        (about half an hour on two cores)

The demo's marketplace, logged slates of five: a click has grade 1, a purchase 2, and counts what its slot takes from it
(candidates.debias = position). The stages run up to SFT once; then the student is trained by RL once for each reward, and what thinks and
what scores orders the test slates. Printed for each: NDCG and AUC of the log's grades, NDCG of the true relevance, and the paired
difference of each to the order of the log, with its 95 % bootstrap interval over users; of the last also to SFT in the same mode. An
answer that is no order has 0 everywhere; how many there are is printed, and the difference to SFT where both answered.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks import clicks
from benchmarks.stages import SEED, gr2, header, told
from gr2.artifacts import resolve
from gr2.rewards import auc, ndcg
from schemas.lake import Lake

REWARDS = ("gr2", "normalised", "ndcg", "auc")
LOGGED, TRUE = "the log's", "NDCG of the truth"
SETTINGS = [
    "candidates.source=log", "candidates.n=5", "simulator.slate=10", "candidates.debias=position", "data.max_requests_per_user=20",
    "midtrain.teacher.epochs=1", "sft.teacher.max_steps=50", "rl.teacher.max_steps=1", "rl.validate_every=10", "scoring.replicas=1",
    "scoring.models={sft: [think, score], rl: [think, score]}", "release.gate=false", "sasrec.share=0", "scoring.miss_sample=0",
]  # fmt: skip
Orders = dict[str, list[str]]


def orders_of(root: Path, model: str) -> dict[str, Orders]:
    """Mode -> request -> order, of the current version of a model; empty where an answer was no order."""
    version = resolve(root, model).id
    rows = Lake(root).read("rerank_scores", ["request_id", "mode", "new_order"], split="test", model_id=version, replica=0)
    found: dict[str, Orders] = {}
    for row in rows.to_pylist():
        found.setdefault(row["mode"], {})[row["request_id"]] = row["new_order"] or []
    return found


def values_of(orders: Orders, grades: dict[str, dict[str, float]], truth: dict[str, dict[str, float]]) -> dict[str, np.ndarray]:
    """(R,) of each metric, slates in order of their id; 0 where an order is empty."""
    read = [[grades[owner][item] for item in order] for owner, order in sorted(orders.items())]
    true = [np.array([truth[owner][item] for item in order]) for owner, order in sorted(orders.items())]
    return {
        "NDCG of the log": np.array([ndcg(row) for row in read]),
        "AUC of the log": np.array([auc(row) for row in read]),
        TRUE: np.array([clicks.ndcg(-np.arange(len(row))[None], row[None])[0] if len(row) else 0.0 for row in true]),
    }


def show(values: dict[str, dict[str, np.ndarray]], users: list[str]) -> None:
    """The table: each order against the log's, and RL against SFT in its mode, over all slates and over those that both answered."""
    base = values[LOGGED]
    columns = ["order", "invalid", *(column for name in base for column in (name, "over the log's order")), "over SFT", "both answered"]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for name, own in values.items():
        cells = [f"{(own[TRUE] == 0).mean():.1%}"]
        cells += [f"{v.mean():.4f} | {told(v - base[metric], signed=True, users=users)}" for metric, v in own.items()]
        if name.startswith("RL"):
            taught = values[f"SFT, {name.rpartition(', ')[2]}"][TRUE]
            gain, both = own[TRUE] - taught, np.flatnonzero((own[TRUE] > 0) & (taught > 0))
            cells += [told(gain, signed=True, users=users), told(gain[both], signed=True, users=[users[r] for r in both])]
        else:
            cells += ["", ""]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Runs what is not there yet, prints all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--users", type=int, default=1500)
    given = parser.parse_args()
    root = given.work.resolve() / "root"
    settings = [*SETTINGS, f"rl.student.max_steps={given.steps}", f"simulator.users={given.users}"]
    results: dict[str, Orders] = {}
    for reward in REWARDS:
        done = given.work.resolve() / f"{reward}.json"
        if not done.exists():
            gr2("demo", root, ["run", "--to", "rl"], [*settings, f"rl.reward={reward}"])
            gr2("demo", root, ["stage", "rerank_scores"], [*settings, f"rl.reward={reward}"])
            done.write_text(json.dumps({f"{m}, {mode}": o for m in ("sft", "rl") for mode, o in orders_of(root, m).items()}))
        found = json.loads(done.read_text())
        results |= {("SFT" + name[3:] if name.startswith("sft") else f"RL by {reward}{name[2:]}"): o for name, o in found.items()}
    rows = Lake(root).read("candidates", ["request_id", "user_id", "candidate_ids", "grades"], split="test").to_pylist()
    grades = {r["request_id"]: dict(zip(r["candidate_ids"], r["grades"], strict=True)) for r in rows}
    truth = clicks.truths(root / "truth")
    judged = set.intersection(*(set(o) for o in results.values()))
    log = {r["request_id"]: r["candidate_ids"] for r in rows if r["request_id"] in judged}
    draw = np.random.default_rng(SEED)
    by_chance = {owner: list(draw.permutation(items)) for owner, items in sorted(log.items())}
    shared = {name: {owner: orders[owner] for owner in judged} for name, orders in results.items()}
    bought = sum(max(grades[owner].values()) > 1 for owner in judged)
    print(header("graded", root) + f"\n{len(judged):,} test slates, {bought:,} of them with a purchase\n")
    owner_of = {r["request_id"]: r["user_id"] for r in rows}
    users = [owner_of[owner] for owner in sorted(judged)]
    show({name: values_of(orders, grades, truth) for name, orders in {"by chance": by_chance, LOGGED: log, **shared}.items()}, users)


if __name__ == "__main__":
    main()
