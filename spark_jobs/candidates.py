"""Stage `candidates`: the lists that the re-ranker gets, one a request, and the evidence of each candidate.

Without --date those of an experiment, with targets (logged slates: `logged_lists.py`); with --date those of a night (`night_lists.py`).

Reads    `interactions`, `semantic_ids`, `item_pairs`, the models `midtrain` and `sasrec` (requests of rerank and valid), `midtrain-refit`
         and `sasrec-refit` (test); with candidates.source = log `interactions` and `impressions` instead. Then evidence and items, for the
         features.
Writes   `candidates`: one request; key request_id. `candidate_features`: one candidate of a request; key request_id, item_id.
         `program_lists`: the same for the lists that teach the evidence program, candidates.depth deep.
Rerun    requests are drawn by hash, beams are exact, the experiment's partitions are replaced: equal inputs give equal content.

Every target is ranked by a pre-ranker that did not train on it (DESIGN section 4). The history is all that the user chose before the
target; its items are never candidates, and a target that stands in its own history is no request. Leave-one-out gives one request per
user and split, the time protocol up to data.max_requests_per_user, there also without items first known after the request's day.

Spark cuts the requests; the beams run in this process, in chunks of candidates.batch requests of like length: torch uses all cores, so
a pool of Python workers would only hold more copies of the model.

    gr2 stage candidates --profile demo [--date 2026-01-05]
"""

import datetime as dt
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.window import Window

from gr2.artifacts import Artifact
from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import InputError
from gr2.sids import Trie, live_codes
from schemas import get
from schemas.candidates import EXPERIMENT
from schemas.program_lists import TAUGHT
from spark_jobs.features import with_features
from spark_jobs.publish import publish
from spark_jobs.session import frame_of, read

SPLITS = ("rerank", "valid", "test")
FIT = {"rerank": "train", "valid": "train", "test": "refit"}
MODEL = {"train": "midtrain", "refit": "midtrain-refit"}
SASREC = {"train": "sasrec", "refit": "sasrec-refit", "live": "sasrec-refit"}
PAIR = ("item_id", "next_item_id", "count")
REQUEST = ("request_id", "split", "user_id", "as_of", "history_ids", "history_days", "target_id", "slice", "seen_ids")


def run(cfg: Config, ctx: Context) -> Result:
    """Builds the tables. Raises InputError if no split has a request."""
    from spark_jobs import logged_lists, night_lists  # here, since both build on this module

    if ctx.date:
        return night_lists.build(cfg, ctx, ctx.date)
    interactions = read(ctx, "interactions")
    if cfg.candidates.source == "log":
        frame = logged_lists.logged(cfg, interactions, read(ctx, "impressions"))
        if frame.isEmpty():
            raise InputError("no logged slate has a click and a user with a history: there is nothing to re-rank in these data")
    else:
        table, deep = beamed(cfg, ctx, sampled(requests(cfg, interactions, read(ctx, "items")), cfg).toArrow())
        if not table.num_rows:
            raise InputError("no user has a target beyond the pretrain split: there is nothing to re-rank in these data")
        frame = frame_of(ctx, table)
    rows = publish(ctx, "candidates", frame, {"night": EXPERIMENT})
    features = publish_features(ctx, None if cfg.candidates.source == "log" else frame_of(ctx, deep))
    detail = ceilings(ctx)
    ctx.log(f"candidates: {detail}")
    return Result(rows_in=rows, rows_out=rows + features, detail=detail)


def publish_features(ctx: Context, lessons: DataFrame | None = None) -> int:
    """`candidate_features` of the lists published for experiments, and `program_lists`; returns their rows.

    `lessons`: the lists that teach the evidence program; without them the same lists, those of its splits with something relevant in them.
    """
    lists = read(ctx, "candidates").where(F.col("night") == EXPERIMENT)
    if lessons is None:
        lessons = lists.where(F.col("split").isin(*TAUGHT) & F.exists("grades", lambda grade: grade > 0))
    made = {"candidate_features": lists, "program_lists": lessons}
    return sum(publish(ctx, name, with_features(ctx, of), {"night": EXPERIMENT}) for name, of in made.items())


# -- requests ---------------------------------------------------------------------------------------------------------


def requests(cfg: Config, interactions: DataFrame, items: DataFrame) -> DataFrame:
    """Targets beyond the pretrain split with all that lies before them: the columns of REQUEST.

    `history_ids` is cut to the last data.max_history items, `seen_ids` is not. A request needs a history that lacks its target.
    """
    step = F.struct("ordinal", "item_id", "event_date", "day_known", "split", "asin")
    named = interactions.join(items.select("item_id", "asin"), on="item_id", how="left")
    users = named.groupBy("user_id").agg(F.sort_array(F.collect_list(step)).alias("steps"))
    each = users.select("user_id", "steps", F.posexplode("steps").alias("place", "target")).where(F.col("target.split").isin(*SPLITS))
    before = each.withColumn("before", F.slice("steps", 1, F.col("place"))).withColumn("last", F.try_element_at("before", F.lit(-1)))
    fresh = before.where((F.col("place") > 0) & ~F.array_contains("before.item_id", F.col("target.item_id")))
    kept = fresh.withColumn("kept", tail("before", cfg.data.max_history))
    split = F.col("target.split")
    rows = kept.select(
        F.concat_ws(":", split, "user_id", F.col("target.ordinal").cast("string")).alias("request_id"),
        split.alias("split"),
        "user_id",
        F.col("target.event_date").alias("as_of"),
        F.col("kept.item_id").alias("history_ids"),
        F.transform("kept.event_date", lambda day: F.greatest(F.datediff(F.col("target.event_date"), day), F.lit(0))).alias("history_days"),
        F.col("target.item_id").alias("target_id"),
        slice_of(
            F.col("target.event_date"),
            F.col("last.event_date"),
            F.col("target.day_known") & F.col("last.day_known"),
            F.col("target.asin") < F.col("last.asin") if cfg.data.source == "amazon2014" else None,  # its rows of one day ascend by ASIN
        ).alias("slice"),
        F.array_distinct("before.item_id").alias("seen_ids"),
    )
    most = 1 if cfg.data.protocol == "leave_one_out" else cfg.data.max_requests_per_user
    return first_of(rows, ["split", "user_id"], most, cfg.seed).select(*REQUEST)


def sampled(rows: DataFrame, cfg: Config) -> DataFrame:
    """A seeded sample of each split, as candidates.max_requests (max_rerank, max_valid) say; sorted, so that no partition shows."""
    chosen = cfg.candidates
    own = {"rerank": chosen.max_rerank, "valid": chosen.max_valid}
    for split in SPLITS:
        if most := own.get(split) or chosen.max_requests:
            ranked = F.row_number().over(_seeded(["split"], cfg.seed))
            rows = rows.withColumn("draw", ranked).where((F.col("split") != split) | (F.col("draw") <= most)).drop("draw")
    return rows.orderBy("request_id")


def slice_of(target_day: Column, last_day: Column, known: Column, descends: Column | None = None) -> Column:
    """same_day or later_day: time between the target and the item before. Where days are unknown, or fall: provably_later or unknown_day.

    `descends`: whether the target sorts below the item before, where the rows of one day are known to ascend.
    """
    found = F.when(known & (target_day == last_day), "same_day").when(known & (target_day > last_day), "later_day")
    if descends is not None:
        found = found.when(descends, "provably_later")
    return found.otherwise("unknown_day")


def tail(array: str, count: int) -> Column:
    return F.slice(array, F.greatest(F.size(array) - count, F.lit(0)) + 1, count)


def _seeded(partition: list[str], seed: int) -> Any:
    return Window.partitionBy(*partition).orderBy(F.xxhash64(F.lit(seed), "request_id"), "request_id")


def first_of(rows: DataFrame, partition: list[str], most: int, seed: int) -> DataFrame:
    return rows.withColumn("draw", F.row_number().over(_seeded(partition, seed))).where(F.col("draw") <= most).drop("draw")


# -- lists of the generative pre-ranker -------------------------------------------------------------------------------


def beamed(cfg: Config, ctx: Context, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Runs the exact constrained beams for all requests: their lists, and the deeper ones of those that may teach, in the same columns."""
    listed, deep, n = [], [], cfg.candidates.n
    for fit, name in MODEL.items():
        chosen = [row for row in rows.to_pylist() if FIT[row["split"]] == fit]
        if chosen:
            pairs = ctx.lake.read("item_pairs", list(PAIR), fit=fit)
            for row in ranked(cfg, ctx, chosen, fit, ctx.model(name), pairs, max(n, cfg.candidates.depth)):
                listed.append(cut(row, n))
                if row["split"] in TAUGHT and row["target_rank"]:
                    deep.append(row)
    first, second = (pa.Table.from_pylist(rows, schema=get("candidates").arrow()) for rows in (listed, deep))
    return first, second


def cut(row: dict[str, Any], n: int) -> dict[str, Any]:
    """A list's first `n` candidates."""
    rank = row["target_rank"]
    shorter = {name: row[name][:n] for name in ("candidate_ids", "prior_scores", "grades")}
    return {**row, **shorter, "target_rank": rank if rank and rank <= n else None}


def ranked(
    cfg: Config, ctx: Context, rows: list[dict[str, Any]], fit: str, artifact: Artifact, pairs: pa.Table, most: int
) -> Iterator[dict[str, Any]]:
    """One row of `candidates` for each request, by the pre-ranker `artifact` and what `pairs` (columns PAIR) say followed what.

    Lists hold `most` candidates.
    """
    from scoring.beams import beam_search, judged
    from scoring.model import item_tokens, load, sid_ids
    from scoring.own_vectors import attach, item_vectors, own_vectors
    from training.midtrain import start_id

    model, tokenizer = load(artifact.path)
    ids, codes_NL = live_codes(ctx)
    place_of = {item: i for i, item in enumerate(ids)}
    trie = Trie.build(codes_NL)
    hidden = _unknown_on(ctx, cfg, place_of)
    ids_LK = sid_ids(tokenizer)
    tokens_NL = item_tokens(ids_LK, codes_NL)
    attach(model, codes_NL, artifact.path)
    own = own_vectors(model)
    items_ND, known_N = item_vectors(model, tokens_NL).detach(), own.known_N if own else None
    prompts = Prompts(start_id(tokenizer), tokens_NL, place_of, cfg.midtrain.history_items)
    chosen = cfg.candidates
    early = dt.timedelta(days=1 if fit == "live" else 0)  # a night's requests are for the day after, of which nothing is known yet
    others = _others(cfg, ctx, fit, pairs, place_of)
    rows = sorted(rows, key=lambda row: (len(row["history_ids"]), row["request_id"]))
    size = chosen.batch
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    for chunk in ctx.track(chunks, f"beams of {artifact.name}", len(chunks)):
        exclude = [sorted({place_of[i] for i in row["seen_ids"] if i in place_of} | hidden(row["as_of"] - early)) for row in chunk]
        texts = [prompts.of(row["history_ids"]) for row in chunk]
        known = [[place_of[i] for i in row["history_ids"] if i in place_of] for row in chunk]
        mixture = mixed(others, known, exclude)
        found = beam_search(model, ids_LK, trie, texts, chosen.beam, exclude, mixture, pad=tokenizer.pad_token_id, batch=size)
        found = judged(found, items_ND, chosen.item_weight, mixture, known_N)
        for row, places, scores in zip(chunk, found.items_BW, found.logprobs_BW, strict=True):
            yield row_of(row, fit, artifact.id, [ids[p] for p in places if p >= 0], scores, most)


def _others(cfg: Config, ctx: Context, fit: str, pairs: pa.Table, place_of: dict[str, int]) -> list[tuple[float, Any]]:
    """What is mixed with the network: counts and a model of whole items, as profiles ask, each with its share of the whole."""
    from scoring.sasrec import NextItem, load

    counts = cfg.candidates.pair_share
    found: list[tuple[float, Any]] = [(counts, _followers(cfg, pairs, place_of))] if counts else []
    if cfg.sasrec.share:
        model = load(ctx.model(SASREC[fit]).path)
        found.append(((1 - counts) * cfg.sasrec.share, NextItem(model, place_of, cfg.sasrec.keep)))
    return found


def mixed(others: list[tuple[float, Any]], known: list[list[int]], exclude: list[list[int]]) -> Any:
    """The sparse rows of all of them as one `scoring.beams.Mixture`, each by its share; None where there is nothing to mix in."""
    from scoring.beams import Mixture

    total = sum(share for share, _ in others)
    return Mixture(total, sum(share / total * other.after(known, exclude) for share, other in others).tocsr()) if others else None


def _followers(cfg: Config, pairs: pa.Table, place_of: dict[str, int]) -> Any:
    """Pairs of live items as a table of counts."""
    from scoring.followers import Followers

    places = [[place_of.get(item, -1) for item in pairs[column].to_pylist()] for column in PAIR[:2]]
    earlier_P, later_P = (np.array(column, dtype=np.int64) for column in places)
    live_P = (earlier_P >= 0) & (later_P >= 0)
    counts_P = pairs["count"].to_numpy()[live_P]
    chosen = cfg.candidates
    return Followers(len(place_of), earlier_P[live_P], later_P[live_P], counts_P, chosen.pair_back, chosen.pair_decay)


class Prompts:
    """What the pre-ranker reads: <bos> and the IDs of the last items, as many as leave room in a training window for one more."""

    def __init__(self, bos: int, tokens_NL: NDArray[np.int64], place_of: dict[str, int], window: int) -> None:
        self.tokens_NL = tokens_NL
        self.place_of, self.window, self.bos = place_of, max(1, window - 1), bos

    def of(self, history: list[str]) -> list[int]:
        """Token ids of one history."""
        places = [self.place_of[item] for item in history if item in self.place_of][-self.window :]
        return [self.bos, *self.tokens_NL[places].reshape(-1).tolist()]


def _unknown_on(ctx: Context, cfg: Config, place_of: dict[str, int]) -> Any:
    """`day -> places of items first known after it`: they could not have been shown. Leave-one-out ranks all items, as papers do."""
    if cfg.data.protocol == "leave_one_out":
        return lambda day: set()
    table = ctx.lake.read("items", ["item_id", "first_seen"], order_by=["item_id"])
    seen = [
        (d, place_of[i]) for i, d in zip(table["item_id"].to_pylist(), table["first_seen"].to_pylist(), strict=True) if d and i in place_of
    ]

    def after(day: dt.date) -> set[int]:
        return {place for first, place in seen if first > day}

    return after


def row_of(row: dict[str, Any], fit: str, model_id: str, items: list[str], scores: Any, n: int) -> dict[str, Any]:
    """One request with the first `n` of its items as its list, in the contract's columns."""
    target = row["target_id"]
    rank = items.index(target) + 1 if target in items else None
    return {
        **{name: row[name] for name in REQUEST if name != "seen_ids"},
        "source": "beam",
        "model_id": model_id,
        "fit": fit,
        "candidate_ids": items[:n],
        "prior_scores": [float(s) for s in scores[: len(items[:n])]],  # places behind the last item hold none
        "grades": [int(item == target) for item in items[:n]],
        "weights": None,
        "target_rank": rank if rank and rank <= n else None,
        "full_rank": rank,
        "night": row.get("night", EXPERIMENT),
    }


def ceilings(ctx: Context) -> dict[str, float]:
    """Requests by split, and the share whose target is in the list: what no re-ranker can exceed."""
    table = ctx.lake.read("candidates", ["split", "target_rank"])
    splits, ranks = np.array(table["split"].to_pylist()), np.array([r is not None for r in table["target_rank"].to_pylist()])
    found: dict[str, float] = {}
    for split in SPLITS:
        if (splits == split).any():
            found |= {f"{split} requests": int((splits == split).sum()), f"{split} recall": round(float(ranks[splits == split].mean()), 4)}
    return found
