"""Quality of every model and baseline on the requests of split test, with intervals; and every audit of the run.

Reads: `candidates`, `rerank_scores` (current models, replica 0), `baselines`; for the audits also what they check, and the findings that
other stages left under work/audits. Writes: `metrics` (one figure) and `audits` (one check), each partitioned by run.
A failed answer scores zero and is never repaired. Requests that were not scored because their target is not in the list score zero too:
so they would under any order. A request that has its target and was not scored is an error.
A rerun is harmless: bootstraps are seeded, the run's partition is replaced. Figures of the same profile and day under other settings go.

    gr2 stage evaluation --profile P
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gr2 import artifacts, metrics
from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import AuditError, MissingInputError
from gr2.pipeline import read_record
from schemas.candidates import TIMES
from spark_jobs.publish import publish_rows
from validation import hacking, leakage, position
from validation.findings import Finding, finding

SPLIT = "test"
SLICES = ("all", *TIMES)
REFERENCES = ("prerank", "lambdamart")
FULL_METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
INGESTS = ("events", "items")
Order = list[str] | None
Orders = Mapping[tuple[str, str], Mapping[str, Order]]  # (model, mode) -> request -> order


@dataclass(frozen=True)
class Requests:
    """The judged requests (R of them), in order of their ids."""

    rows: list[dict[str, Any]]

    @cached_property
    def place(self) -> dict[str, int]:
        """Request -> row."""
        return {r["request_id"]: n for n, r in enumerate(self.rows)}

    @cached_property
    def incoming(self) -> dict[str, list[str]]:
        """Request -> candidate ids in incoming order."""
        return {r["request_id"]: r["candidate_ids"] for r in self.rows}

    @cached_property
    def grades(self) -> dict[str, dict[str, int]]:
        """Request -> candidate -> relevance."""
        return {r["request_id"]: dict(zip(r["candidate_ids"], r["grades"], strict=True)) for r in self.rows}

    @cached_property
    def hit(self) -> np.ndarray:
        """Whether something relevant is in the list: (R,) of bool. No order can score without it."""
        return np.array([any(r["grades"]) for r in self.rows], bool)

    @cached_property
    def users(self) -> np.ndarray:
        """(R,) of int: a number for each user, what intervals draw."""
        return np.unique([r["user_id"] for r in self.rows], return_inverse=True)[1]

    @property
    def size(self) -> int:
        """Length of the longest list."""
        return max((len(r["candidate_ids"]) for r in self.rows), default=0)

    def in_slice(self, name: str) -> np.ndarray:
        """(R,) of bool."""
        return np.array([name in ("all", r["slice"]) for r in self.rows], bool)

    def graded(self, orders: Mapping[str, Order]) -> np.ndarray:
        """Relevance along each request's order, best place first: (R, size); zeros where there is no order.

        Raises AuditError for an order that is no permutation of the request's candidates.
        """
        grades_RN = np.zeros((len(self.rows), self.size))
        for request, order in orders.items():
            if order is None:
                continue
            known = self.grades[request]
            if len(order) != len(known) or set(order) != set(known):
                raise AuditError(
                    f"request {request}: the order is no permutation of its candidates; were they built anew after the scoring? "
                    "Then run `gr2 stage baselines` again, and score anew"
                )
            grades_RN[self.place[request], : len(order)] = [known[item] for item in order]
        return grades_RN


def run(cfg: Config, ctx: Context) -> Result:
    """Publishes metrics, then audits. Raises AuditError, after publishing both, if one says that figures are wrong."""
    requests = judged(ctx)
    scored = [r for r in current_scores(cfg, ctx) if r["request_id"] in requests.place]
    baselines = baseline_orders(ctx)
    coverage = [*check_coverage(requests, scored), *check_baselines(cfg, requests, baselines)]
    orders = all_orders(requests, baselines, scored)
    rows = [*figures(cfg, requests, orders), *full_ranking(cfg, requests)]
    common = {"run_id": ctx.run_id, "profile": cfg.profile, "protocol": f"{cfg.data.protocol}/{cfg.data.same_day_order}", "seed": cfg.seed}
    count = _replace_run(ctx, "metrics", [{**common, **row} for row in rows])

    found = [*coverage, *_reconciled(ctx), *leakage.audit(ctx), *_answers(cfg, requests, scored)]
    audits = [{"run_id": ctx.run_id, "stage": "evaluation", **f} for f in found] + list(_left_by_stages(ctx))
    _replace_run(ctx, "audits", audits)
    failed = [a for a in audits if not a["passed"] and a["audit"] != "position"]  # orders that waver are not released
    if failed:
        lines = [f"{a['audit']} {a['subject']}: {a['value']} not in [{a['low']}, {a['high']}] ({a['detail']})" for a in failed[:5]]
        raise AuditError(f"{len(failed)} of {len(audits)} audits failed (table audits): " + "; ".join(lines))
    return Result(rows_in=len(requests.rows) + len(scored), rows_out=count, detail={"audits": len(audits), "orders": len(orders)})


# -- what is judged ---------------------------------------------------------------------------------------------------


def judged(ctx: Context) -> Requests:
    """Every request of the split test."""
    columns = ["request_id", "user_id", "candidate_ids", "grades", "target_rank", "full_rank", "source", "slice"]
    return Requests(ctx.lake.read("candidates", columns, order_by=["request_id"], split=SPLIT).to_pylist())


def current_scores(cfg: Config, ctx: Context) -> list[dict[str, Any]]:
    """Rows of `rerank_scores` by the current version of each configured model and mode. Raises MissingInputError if there is none."""
    ids = [artifacts.resolve(ctx.root, name).id for name in cfg.scoring.models if name in artifacts.names(ctx.root)]
    columns = ["request_id", "model", "mode", "replica", "status", "new_order", "labels", "shown", "reasoning", "completion_tokens"]
    rows = ctx.lake.read(
        "rerank_scores", columns, order_by=["model", "mode", "replica", "request_id"], split=SPLIT, model_id=ids
    ).to_pylist()
    rows = [r for r in rows if r["mode"] in cfg.scoring.models[r["model"]]]
    if not rows:
        raise MissingInputError("no current model was scored on split test: run `gr2 stage rerank_scores` first")
    return rows


def check_coverage(requests: Requests, scored: list[dict[str, Any]]) -> Iterator[Finding]:
    """That every request with its target in the list was scored, by each model and mode; says how many of the others were."""
    names = dict.fromkeys((r["model"], r["mode"]) for r in scored)
    hits = {r["request_id"] for r, hit in zip(requests.rows, requests.hit, strict=True) if hit}
    for model, mode in names:
        done = {r["request_id"] for r in scored if (r["model"], r["mode"], r["replica"]) == (model, mode, 0)}
        misses = len(requests.rows) - len(hits)
        detail = (
            f"requests not scored that have their target; of {misses} without it {len(done - hits)} were: the rest is zero in any order"
        )
        yield finding("coverage", f"{model}/{mode}", float(len(hits - done)), high=0.0, detail=detail)


def check_baselines(cfg: Config, requests: Requests, baselines: Orders) -> Iterator[Finding]:
    """That each configured baseline ordered every request, and none that is gone: else `candidates` was built anew since."""
    for model in ("prerank", *cfg.evaluation.baselines):
        apart = requests.place.keys() ^ baselines.get((model, "order"), {}).keys()
        detail = "requests that it did not order, or that are gone: run `gr2 stage baselines` where there are any"
        yield finding("coverage", f"{model}/order", float(len(apart)), high=0.0, detail=detail)


def all_orders(requests: Requests, baselines: Orders, scored: list[dict[str, Any]]) -> Orders:
    """The incoming order, those of the baselines, those of the models' first replica."""
    known = {name: {r: order for r, order in found.items() if r in requests.place} for name, found in baselines.items()}
    told: dict[tuple[str, str], dict[str, Order]] = {}
    for row in scored:
        if row["replica"] == 0:
            told.setdefault((row["model"], row["mode"]), {})[row["request_id"]] = row["new_order"]
    return {("prerank", "order"): requests.incoming, **known, **told}


def baseline_orders(ctx: Context) -> Orders:
    """The incoming order and the baselines' as stage `baselines` left them."""
    orders: dict[tuple[str, str], dict[str, Order]] = {}
    for row in ctx.lake.read("baselines", ["request_id", "model", "new_order"], order_by=["model", "request_id"], split=SPLIT).to_pylist():
        orders.setdefault((row["model"], "order"), {})[row["request_id"]] = row["new_order"]
    return orders


# -- figures ----------------------------------------------------------------------------------------------------------


def figures(cfg: Config, requests: Requests, orders: Orders) -> Iterator[dict[str, Any]]:
    """Each model's values, and its paired differences to the references, on every population and slice that has requests."""
    graded = {name: requests.graded(found) for name, found in orders.items()}
    for metric in metrics.NAMES:
        values = {name: metrics.graded_values(metric, grades_RN) for name, grades_RN in graded.items()}
        for population, slice_, chosen in _parts(requests):
            for (model, mode), own in values.items():
                base = {
                    "model": model,
                    "mode": mode,
                    "population": population,
                    "slice": slice_,
                    "n_candidates": requests.size,
                    "metric": metric,
                }
                users = requests.users[chosen]
                yield _figure(cfg, base, "", own[chosen], users)
                for reference in REFERENCES:
                    if (reference, "order") in values and model != reference:
                        yield _figure(cfg, base, reference, own[chosen] - values[reference, "order"][chosen], users)


def full_ranking(cfg: Config, requests: Requests) -> Iterator[dict[str, Any]]:
    """The pre-ranker over all items: rank within its full beam, a miss beyond it. Nothing for logged slates, which nobody ranked."""
    if any(r["source"] != "beam" for r in requests.rows):
        return
    ranks = np.array([r["full_rank"] or 0 for r in requests.rows], np.float64)
    for metric in FULL_METRICS:
        own = metrics.values(metric, ranks)
        for population, slice_, chosen in _parts(requests):
            if population == "overall":
                base = {"model": "prerank", "mode": "full", "population": population, "slice": slice_, "n_candidates": 0, "metric": metric}
                yield _figure(cfg, base, "", own[chosen], requests.users[chosen])


def _parts(requests: Requests) -> Iterator[tuple[str, str, np.ndarray]]:
    """(population, slice, (R,) of bool), those that are not empty."""
    for slice_ in SLICES:
        inside = requests.in_slice(slice_)
        for population, chosen in (("overall", inside), ("conditional", inside & requests.hit)):
            if chosen.any():
                yield population, slice_, chosen


def _figure(cfg: Config, base: dict[str, Any], reference: str, values_B: np.ndarray, users_B: np.ndarray) -> dict[str, Any]:
    value, low, high = metrics.bootstrap_mean(values_B, cfg.evaluation.bootstrap, cfg.seed, users_B=users_B)
    return {**base, "reference": reference, "value": value, "low": min(low, value), "high": max(high, value), "n": len(values_B)}


# -- audits -----------------------------------------------------------------------------------------------------------


def _answers(cfg: Config, requests: Requests, scored: list[dict[str, Any]]) -> list[Finding]:
    limits = cfg.evaluation
    targets = {r["request_id"]: r["target_rank"] for r in requests.rows}
    return [
        *position.audit(scored, requests.incoming, limits.min_tau, limits.max_copy_rate),
        *hacking.audit(scored, requests.incoming, targets, limits.max_invalid_rate),
    ]


def _reconciled(ctx: Context) -> Iterator[Finding]:
    """Rows in = published + quarantined + duplicates, by the record of each ingest (DESIGN contract 5)."""
    for stage in INGESTS:
        record = read_record(ctx, stage)
        if record:
            parts = {k: int(record[k]) for k in ("rows_out", "quarantined", "duplicates")}
            detail = f"rows read minus those accounted for: {record['rows_in']} in, {', '.join(f'{v} {k}' for k, v in parts.items())}"
            yield {**finding("reconciliation", stage, float(record["rows_in"] - sum(parts.values())), 0.0, 0.0, detail), "stage": stage}


def _left_by_stages(ctx: Context) -> Iterator[dict[str, Any]]:
    """Findings that other stages wrote as JSON under work/audits, one file a stage."""
    for path in sorted(ctx.work("audits").glob("*.json")):
        for row in json.loads(path.read_text()):
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            yield {"run_id": ctx.run_id, "stage": path.stem, **finite}


def _replace_run(ctx: Context, table: str, rows: Iterable[dict[str, Any]]) -> int:
    """Publishes this run's partition; figures of the same profile and day that other settings left are removed."""
    from delta.tables import DeltaTable
    from pyspark.sql import functions as F

    count = publish_rows(ctx, table, rows, {"run_id": ctx.run_id})
    day = ctx.run_id.rsplit("-", 1)[0]
    there = {r for r in ctx.lake.read(table, ["run_id"])["run_id"].unique().to_pylist()}
    stale = sorted(r for r in there if r != ctx.run_id and r.rsplit("-", 1)[0] == day)
    if stale:
        DeltaTable.forPath(ctx.spark, ctx.table_path(table)).delete(F.col("run_id").isin(stale))
        ctx.pin("tables", table, ctx.lake.version(table))
    return count


# -- telling ----------------------------------------------------------------------------------------------------------


def results_table(ctx: Context) -> Any:
    """A rich table (80 columns) of this run's figures, or of the latest run's: later days first, then all, with gains over prerank."""
    from rich import box
    from rich.table import Table

    found = ctx.lake.read("metrics").to_pylist()
    run_id = _shown_run(ctx, {r["run_id"] for r in found})
    cells: dict[tuple[str, ...], dict[str, Any]] = {
        tuple(r[k] for k in ("model", "mode", "population", "slice", "metric", "reference")): r for r in found if r["run_id"] == run_id
    }
    names = list(dict.fromkeys(key[:2] for key in sorted(cells) if key[1] != "full"))
    table = Table(title="orders where the target is in the list", caption=_caption(cells), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("model", "R@1", "N@3", "R@1 over prerank", "N@3 over prerank"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=column != "model")
    for slice_ in ("later_day", "provably_later", "all"):

        def cell(name: tuple[str, ...], metric: str, reference: str = "", inside: str = slice_) -> dict[str, Any] | None:
            return cells.get((*name, "conditional", inside, metric, reference))

        there = {name: value for name in names if (value := cell(name, "recall@1"))}
        if not there:
            continue
        table.add_section()
        table.add_row(f"[bold]{slice_}[/] n={max(v['n'] for v in there.values()):,}")
        for name in sorted(there, key=lambda name: there[name]["value"]):
            shown = [_text(cell(name, m)) for m in ("recall@1", "ndcg@3")] + [
                _gain(cell(name, m, "prerank")) for m in ("recall@1", "ndcg@3")
            ]
            table.add_row(name[0] if name[1] == "order" else f"{name[0]} ({name[1]})", *shown)
    return table


def _shown_run(ctx: Context, there: set[str]) -> str:
    """This run if it has figures, else the run of the latest commit: ids end in a hash, whose order says nothing."""
    if ctx.run_id in there:
        return ctx.run_id
    commits = ctx.lake.commits("metrics")  # latest first; each replaces one run's partition
    wrote = [str(c.get("operationParameters", {}).get("predicate")) for c in commits if c["operation"] == "WRITE"]
    return next((run for said in wrote for run in there if f"'{run}'" in said), max(there, default=""))


def _text(row: dict[str, Any] | None) -> str:
    return f"{row['value']:.4f}" if row else ""


def _gain(row: dict[str, Any] | None) -> str:
    return f"{row['value']:+.3f} \\[{row['low']:+.3f}, {row['high']:+.3f}]".replace("0.", ".") if row else ""


def _caption(cells: Mapping[tuple[str, ...], dict[str, Any]]) -> str:
    """The pre-ranker's full ranking, over all requests."""
    parts = []
    for slice_ in SLICES:
        five, ten = (cells.get(("prerank", "full", "overall", slice_, metric, "")) for metric in ("recall@5", "recall@10"))
        if five and ten:
            parts.append(f"{slice_} R@5 {five['value']:.4f} R@10 {ten['value']:.4f}")
    return ("pre-ranker over all items: " + "; ".join(parts) + ". " if parts else "") + "Brackets: paired bootstrap over users, 95 %"
