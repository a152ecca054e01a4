"""Orders that a model must beat, in the form of `rerank_scores`, for the splits valid and test.

Reads: `candidate_features`, `program_lists`, `candidates`. Writes: `baselines` (one request and baseline; key request_id, model).
    prerank      the incoming order                      random       a seeded shuffle: chance level
    popularity   interactions of the fit                 transition   direct transitions from the last history item, then popularity
    lambdamart   LightGBM on the same evidence that the models read, and on the same lists, which count as they do for the program:
                 trained on split rerank, picked on valid, then for test trained on both
    program      the evidence program with trees, LambdaMART's among them, which `distill` learns from (`distill.source: evidence`): for
                 valid as fitted on other users' lists, for test, whose lists taught nobody, all that were fitted
    oracle       the best order of the same candidates: the ceiling
A rerun is harmless: all of it is seeded and replaced whole.

    gr2 stage baselines --profile P
"""

import zlib
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa

import schemas
from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import InputError
from schemas.program_lists import TAUGHT
from scoring.evidence_engine import columns_of
from spark_jobs.program import LESSONS, boosted, padded
from spark_jobs.publish import publish
from spark_jobs.session import frame_of

FEATURES = columns_of()  # the same evidence as the program
GRID: tuple[dict[str, Any], ...] = tuple(
    {"num_leaves": leaves, "min_data_in_leaf": least, "learning_rate": rate, "lambda_l2": ridge}
    for leaves, least, rate, ridge in product((7, 15, 31), (20, 50, 100), (0.03, 0.08), (0.0, 10.0))
)
SHOWN = "as shown"  # lists as deep as those that are re-ranked
ROUNDS, PATIENCE, PICK_AT = 400, 30, 3


def run(cfg: Config, ctx: Context) -> Result:
    """Computes every configured baseline and publishes them together."""
    splits = {name: lists(ctx, name) for name in ("valid", "test")}
    detail: dict[str, Any] = {}
    scores: dict[str, dict[str, list[np.ndarray]]] = {name: _simple(cfg.seed, rows) for name, rows in splits.items()}
    if "lambdamart" in cfg.evaluation.baselines:
        lessons = {SHOWN: {split: counted(ctx, split) for split in TAUGHT}}
        if cfg.candidates.source != "log" and cfg.candidates.depth > cfg.candidates.n:  # else they are the same
            lessons["deeper"] = {split: counted(ctx, split, LESSONS) for split in TAUGHT}
        picked, again, detail = fit_lambdamart(lessons, cfg.seed)
        ctx.log(f"lambdamart: {detail}")
        for name, booster in (("valid", picked), ("test", again)):
            rows = splits[name]
            scores[name]["lambdamart"] = [booster.predict(matrix(rows), num_threads=2)] if rows.num_rows else [np.zeros(0)]
    if "program" in cfg.evaluation.baselines:
        judge, detail["program"] = boosted(ctx)
        for name, rows in splits.items():
            scores[name]["program"] = [np.zeros(0)]
            if rows.num_rows:
                of = padded(ctx, (name,))
                logp_RN = judge.judged(of.raw_RNC, of.there_RN, of.folds_R if name in TAUGHT else None)
                scores[name]["program"] = [logp_RN[of.there_RN]]
    wanted = ("prerank", *cfg.evaluation.baselines)
    tables = [order_rows(rows, name, model, *scores[name][model]) for name, rows in splits.items() for model in wanted]
    published = publish(ctx, "baselines", frame_of(ctx, pa.concat_tables(tables)))
    return Result(rows_in=sum(rows.num_rows for rows in splits.values()), rows_out=published, detail=detail)


def lists(ctx: Context, split: str, of: str = "candidate_features") -> pa.Table:
    """The candidates of a split with their features, a request's rows together, in incoming order."""
    columns = ["request_id", "item_id", "grade", "grade_weight", *FEATURES]
    return ctx.lake.read(of, columns, order_by=["request_id", "incoming_rank"], split=split)


def counted(ctx: Context, split: str, of: str = "candidate_features") -> pa.Table:
    """`lists` with what each counts in learning (`count`): its clicks' mean weight, where a log was debiased, else 1."""
    rows = lists(ctx, split, of)
    bounds, gain = groups(rows), np.exp2(rows["grade"].to_numpy()) - 1.0
    weight = gain * np.nan_to_num(rows["grade_weight"].to_numpy().astype(np.float64), nan=1.0)
    clicked, total = (np.add.reduceat(v, bounds[:-1]) if len(v) else v for v in (gain, weight))
    count = np.divide(total, clicked, out=np.ones_like(total), where=clicked > 0)
    return rows.append_column("count", pa.array(np.repeat(count, np.diff(bounds)), pa.float64()))


def matrix(rows: pa.Table) -> np.ndarray:
    """Feature matrix (rows, features), NaN where unknown."""
    return np.column_stack([rows[c].to_numpy().astype(np.float64) for c in FEATURES])


def groups(rows: pa.Table) -> np.ndarray:
    """Start of each request's rows, and the end of the last: (requests + 1,)."""
    ids = rows["request_id"].to_numpy()
    if not len(ids):
        return np.zeros(1, np.int64)
    return np.concatenate([[0], np.flatnonzero(ids[1:] != ids[:-1]) + 1, [len(ids)]])


def order_rows(rows: pa.Table, split: str, model: str, *scores: np.ndarray) -> pa.Table:
    """`baselines` rows of one model: each request's candidates by descending scores (the first decides), ties in incoming order."""
    bounds = groups(rows)
    request = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    order = np.lexsort((rows["incoming_rank"].to_numpy(), *(-s for s in reversed(scores)), request))
    contract = schemas.get("baselines").arrow()
    ordered = pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), rows["item_id"].combine_chunks().take(pa.array(order)))
    n = len(bounds) - 1
    columns = {
        "request_id": rows["request_id"].combine_chunks().take(pa.array(bounds[:-1])),
        "model": pa.array([model] * n, pa.string()),
        "split": pa.array([split] * n, pa.string()),
        "new_order": ordered.cast(contract.field("new_order").type),
    }
    return pa.table(columns, schema=contract)


def _simple(seed: int, rows: pa.Table) -> dict[str, list[np.ndarray]]:
    """Scores of the baselines that need no training: arrays over candidates, the first one decides."""
    keys = zip(rows["request_id"].to_pylist(), rows["item_id"].to_pylist(), strict=True)
    popularity = rows["popularity"].to_numpy()
    return {
        "prerank": [-rows["incoming_rank"].to_numpy().astype(np.float64)],
        "random": [np.array([zlib.crc32(f"{seed}\0{request}\0{item}".encode()) for request, item in keys], np.float64)],
        "popularity": [popularity],
        "transition": [rows["pair_next"].to_numpy(), popularity],
        "oracle": [rows["grade"].to_numpy().astype(np.float64)],
    }


def fit_lambdamart(lessons: Mapping[str, Mapping[str, pa.Table]], seed: int) -> tuple[Any, Any, dict[str, Any]]:
    """LambdaMART (Burges 2010, as LightGBM has it) on lists with a positive; depth of lists, size and rounds by NDCG@3 on valid as shown.

    `lessons`: for each depth, SHOWN among them, the lists of rerank and valid. Returns the booster fitted on rerank, one fitted on both
    with what was picked, and what that is, with each feature's share of the gain. Raises InputError if there is nothing to learn from.
    """
    import lightgbm

    held_out = dataset([lessons[SHOWN]["valid"]])
    best: tuple[float, Any, str, dict[str, Any]] | None = None
    for kind, tables in lessons.items():
        data = dataset([tables["rerank"]])
        held = held_out.set_reference(data)
        for choice in GRID:
            stop = lightgbm.early_stopping(PATIENCE, verbose=False)
            booster = lightgbm.train(settings(choice, seed), data, ROUNDS, valid_sets=[held], valid_names=["valid"], callbacks=[stop])
            value = booster.best_score["valid"][f"ndcg@{PICK_AT}"]
            if best is None or value > best[0]:
                best = (value, booster, kind, choice)
    assert best is not None
    value, booster, kind, choice = best
    both = dataset(list(lessons[kind].values()))
    again = lightgbm.train(settings(choice, seed), both, booster.best_iteration)
    gain = again.feature_importance("gain")
    shares = {name: round(float(g / max(gain.sum(), 1e-12)), 4) for name, g in zip(FEATURES, gain, strict=True)}
    picked = {**choice, "lists": kind, "rounds": booster.best_iteration, f"valid_ndcg@{PICK_AT}": round(float(value), 6)}
    counts = {"requests": len(both.get_group()), "gain": dict(sorted(shares.items(), key=lambda kv: -kv[1]))}
    return booster, again, {**picked, **counts}


def settings(choice: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """LightGBM's parameters for one configuration of GRID."""
    return {
        **choice, "objective": "lambdarank", "metric": "ndcg", "eval_at": [PICK_AT], "verbosity": -1,
        "deterministic": True, "force_row_wise": True, "num_threads": 2, "seed": seed, "feature_pre_filter": False,
    }  # fmt: skip


def dataset(tables: Sequence[pa.Table]) -> Any:
    """The lists with a positive, for LightGBM. Raises InputError if there is none."""
    import lightgbm

    kept = [_with_positive(table) for table in tables]
    rows = pa.concat_tables(kept)
    if not rows.num_rows:
        raise InputError("no list of split rerank or valid holds its target: LambdaMART cannot learn; take it out of evaluation.baselines")
    sizes = np.concatenate([np.diff(groups(table)) for table in kept])
    data = {"label": rows["grade"].to_numpy(), "weight": rows["count"].to_numpy(), "group": sizes, "feature_name": list(FEATURES)}
    return lightgbm.Dataset(matrix(rows), **data, free_raw_data=False)


def _with_positive(rows: pa.Table) -> pa.Table:
    bounds = groups(rows)
    if not rows.num_rows:
        return rows
    positive = np.add.reduceat(rows["grade"].to_numpy() > 0, bounds[:-1]) > 0
    return rows.filter(pa.array(np.repeat(positive, np.diff(bounds))))
