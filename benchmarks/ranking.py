"""The ranking's figures over data sets and seeds: pre-rank, re-rank against each baseline, and data sets pooled.

    python -m benchmarks.ranking --roots beauty=var/beauty-13,var/beauty-14,var/beauty-15 sports=var/sports [--pool beauty sports]

Reads what finished runs published and prints Markdown; trains nothing, writes nothing.
A figure is the mean over users; where there are several roots of a data set, one a seed, a user's values are averaged over seeds first.
Brackets are 95 % bootstrap intervals over users, of paired differences where a reference is named. `in list` counts users whose target is
among the candidates (of any seed), where an order can matter; `all` counts misses as 0.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.stages import header, told, versions
from gr2 import config, metrics
from gr2.context import Context
from schemas.candidates import TIMES
from spark_jobs.evaluation import FULL_METRICS, all_orders, baseline_orders, current_scores, judged

SHOWN = ("recall@1", "recall@3", "ndcg@3")
SLICES = (*TIMES, "all")
Values = dict[str, float]  # user -> value


class Run:
    """One finished root: each system's value for every user whose target is in the list, the full ranking's rank for all, and the tokens
    that a model writes for a list."""

    def __init__(self, profile: str, root: Path, settings: Sequence[str] = ()) -> None:
        cfg = config.load(profile, [f"paths.root={root}", *settings])
        ctx = Context(cfg)
        requests = judged(ctx)
        self.users = [r["user_id"] for r in requests.rows]
        self.slices = dict(zip(self.users, (r["slice"] for r in requests.rows), strict=True))
        self.full = dict(zip(self.users, (r["full_rank"] or 0 for r in requests.rows), strict=True))
        known = set(requests.place)
        # A root without scores still tells of its pre-ranker and its baselines.
        scored = [r for r in current_scores(cfg, ctx) if r["request_id"] in known] if ctx.lake.exists("rerank_scores") else []
        graded = {name: requests.graded(orders) for name, orders in all_orders(requests, baseline_orders(ctx), scored).items()}
        hit = requests.hit
        self.values: dict[tuple[str, str, str], Values] = {}
        for (model, mode), grades_RN in graded.items():
            for metric in SHOWN:
                own_R = metrics.graded_values(metric, grades_RN)
                self.values[model, mode, metric] = {u: float(v) for u, v, h in zip(self.users, own_R, hit, strict=True) if h}
        written: dict[tuple[str, str], list[int]] = {}
        for row in scored:
            written.setdefault((row["model"], row["mode"]), []).append(row["completion_tokens"])
        self.tokens = {system: float(np.mean(each)) for system, each in written.items()}
        self.told = f"{_release(ctx)}, lists of {requests.size}. Tables of {versions(root)}"


def _release(ctx: Context) -> str:
    """What a root's promoted release says of itself; a root whose stages were run by name may have none."""
    rows = ctx.lake.read("releases", status="promoted").to_pylist() if ctx.lake.exists("releases") else []
    if not rows:
        return f"Not released: seed {ctx.cfg.seed}"
    release = rows[0]
    seconds = ctx.lake.read("stage_runs", ["seconds"], run_id=release["run_id"])["seconds"].to_pylist()
    return f"Release {release['release_id']}: commit {release['code'][:7]}, seed {release['seed']}, {sum(seconds) / 60:.0f} minutes"


def averaged(parts: Sequence[Values]) -> Values:
    """A user's mean over the seeds that have a value."""
    found: dict[str, list[float]] = {}
    for part in parts:
        for user, value in part.items():
            found.setdefault(user, []).append(value)
    return {user: float(np.mean(values)) for user, values in found.items()}


def name_of(system: tuple[str, ...]) -> str:
    """How tables call an order: the model, and the mode where it has several."""
    return system[0] if system[1] == "order" else f"{system[0]} ({system[1]})"


def inside(runs: Sequence[Run], slice_: str) -> set[str]:
    """Users of a slice, over all seeds: a target's slice does not depend on the seed."""
    return {user for run in runs for user, own in run.slices.items() if slice_ in ("all", own)}


def prerank(runs: Sequence[Run]) -> None:
    """Full ranking over all items."""
    print("\n| slice | users | " + " | ".join(FULL_METRICS) + " |\n| --- | --- |" + " --- |" * len(FULL_METRICS))
    for slice_ in SLICES:
        users = sorted(inside(runs, slice_))
        if not users:
            continue
        cells = []
        for metric in FULL_METRICS:
            by_seed = [dict(zip(run.full, metrics.values(metric, list(run.full.values())), strict=True)) for run in runs]
            own = averaged(by_seed)
            cells.append(told([own[user] for user in users]))
        print(f"| {slice_} | {len(users):,} | " + " | ".join(cells) + " |")


def differences(runs: Sequence[Run], slice_: str, system: tuple[str, str], reference: str, metric: str) -> list[float]:
    """A value a user: the system's less the reference's, averaged over seeds."""
    users, parts = inside(runs, slice_), []
    for run in runs:
        own, other = run.values[*system, metric], run.values[reference, "order", metric]
        parts.append({user: own[user] - other[user] for user in own if user in users})
    return list(averaged(parts).values())


def overall(runs: Sequence[Run], system: tuple[str, str], metric: str, users: set[str]) -> float:
    """The mean over all users and seeds, where a seed whose list lacks the target counts 0."""
    return float(np.mean([sum(v for user, v in run.values[*system, metric].items() if user in users) for run in runs])) / len(users)


def rerank(runs: Sequence[Run]) -> None:
    """Every order where the target is in the list, and over all users."""
    systems = sorted({key[:2] for run in runs for key in run.values})
    for slice_ in SLICES:
        users = inside(runs, slice_)
        if not users:
            continue
        by_seed = [run.values["prerank", "order", "recall@1"].keys() & users for run in runs]
        ceiling = float(np.mean([len(own) for own in by_seed])) / len(users)
        listed = set().union(*by_seed)
        print(f"\n`{slice_}`: {len(users):,} users, {len(listed):,} with the target in a list (ceiling {ceiling:.4f})\n")
        if not listed:
            continue
        print(
            "| order | R@1 | R@3 | N@3 | R@1 of all | N@3 over incoming | N@3 over LambdaMART | R@1 over LambdaMART | R@3 over LambdaMART |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        rows = []
        for system in systems:
            own = {m: averaged([{u: v for u, v in run.values[*system, m].items() if u in users} for run in runs]) for m in SHOWN}
            means = [float(np.mean(list(own[m].values()))) for m in SHOWN]
            over = [
                told(differences(runs, slice_, system, reference, m), True)
                for reference, m in (("prerank", "ndcg@3"), *(("lambdamart", m) for m in ("ndcg@3", "recall@1", "recall@3")))
            ]
            whole = overall(runs, system, "recall@1", users)
            rows.append(
                (means[2], f"| {name_of(system)} | " + " | ".join(f"{v:.4f}" for v in [*means, whole]) + " | " + " | ".join(over) + " |")
            )
        print("\n".join(line for _, line in sorted(rows)))


def pooled(sets: Mapping[str, Sequence[Run]]) -> None:
    """Users of several data sets together, later days alone: every system that all of them have."""
    shared = set.intersection(*({key[:2] for run in runs for key in run.values} for runs in sets.values()))
    print(f"\nPooled ({', '.join(sets)}), `later_day`, target in the list, differences to LambdaMART\n")
    print("| order | users | R@1 | R@3 | N@3 |\n| --- | --- | --- | --- | --- |")
    for system in sorted(shared):
        each = {m: [d for runs in sets.values() for d in differences(runs, "later_day", system, "lambdamart", m)] for m in SHOWN}
        print(f"| {name_of(system)} | {len(each['ndcg@3']):,} | " + " | ".join(told(each[m], True) for m in SHOWN) + " |")


def main() -> None:
    """Reads, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roots", nargs="+", required=True, help="name=ROOT[,ROOT...], one root a seed")
    parser.add_argument("--profile", default="beauty")
    parser.add_argument("--pool", nargs="*", default=[], help="names to pool")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all runs, such as candidates.n=20")
    given = parser.parse_args()
    sets: dict[str, list[Run]] = {}
    for word in given.roots:
        name, _, roots = word.partition("=")
        if not roots:
            parser.error(f"{word!r}: write name=ROOT[,ROOT...]")
        sets[name] = [Run(given.profile, Path(root), given.set) for root in roots.split(",")]
    print(header("ranking"))
    for name, runs in sets.items():
        print(f"\n## {name}\n")
        print("\n".join(run.told for run in runs))
        prerank(runs)
        rerank(runs)
    if len(given.pool) > 1:
        pooled({name: sets[name] for name in given.pool})


if __name__ == "__main__":
    main()
