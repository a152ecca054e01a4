"""The lists of an impression log: slates as they were shown, with what came of them (stage `candidates` with candidates.source = log).

Reads    `interactions`, `impressions`.
Writes   rows of `candidates`, which that stage publishes: one clicked slate; split by its day.
Rerun    slates are drawn by hash, and the bias of slots is fitted without a draw: equal inputs give equal content.

A click says that an item was relevant and that somebody looked. With candidates.debias = position a position-based model of the training
windows' impressions tells how often each slot is looked at, and a click weighs the inverse (`gr2.clicks`): the evidence teacher and the
graded rewards then learn from what people like, not from where it stood. Figures and grades stay those of the log.
"""

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from gr2.clicks import examination, inverse_weights
from gr2.config import Config
from gr2.errors import ConfigError
from schemas.candidates import EXPERIMENT
from spark_jobs.candidates import FIT, SPLITS, first_of, sampled, slice_of, tail


def logged(cfg: Config, interactions: DataFrame, impressions: DataFrame) -> DataFrame:
    """Slates of the log with at least one click, in the contract's columns: incoming order is reading order, grades are the log's.

    A slate belongs to the split whose window its day lies in. With candidates.debias = position a click weighs what its slot takes from
    it. Raises ConfigError under leave-one-out, which cuts no days.
    """
    if cfg.data.protocol != "time":
        raise ConfigError("candidates.source=log needs data.protocol=time: a logged slate belongs to a window of days")
    windows = interactions.groupBy("split").agg(F.max("event_date").alias("until"))
    slate = F.sort_array(F.collect_list(F.struct("position", "item_id", "grade")))
    slates = impressions.groupBy("request_id", "user_id").agg(
        F.min("request_time").alias("at"), F.min("event_date").alias("as_of"), F.slice(slate, 1, cfg.candidates.n).alias("slate")
    )
    clicked = slates.where(F.exists("slate.grade", lambda grade: grade > 0))
    dated = clicked.join(F.broadcast(windows), on=F.col("as_of") <= F.col("until"), how="left").withColumn(
        "order", F.array_position(F.array(*(F.lit(s) for s in ("pretrain", *SPLITS))), F.coalesce("split", F.lit("test")))
    )
    split = dated.groupBy("request_id").agg(F.min_by("split", "order").alias("split"))  # the first window that ends on the day or later
    rows = (
        clicked.join(split, on="request_id", how="inner")
        .withColumn("split", F.coalesce("split", F.lit("test")))
        .where(F.col("split").isin(*SPLITS))
    )
    drawn = first_of(rows, ["split", "user_id"], cfg.data.max_requests_per_user, cfg.seed)
    weights = slot_weights(cfg, impressions, windows) if cfg.candidates.debias == "position" else []
    return _as_contract(sampled(_with_history(cfg, drawn, interactions), cfg), weights)


def slot_weights(cfg: Config, impressions: DataFrame, windows: DataFrame) -> list[float]:
    """What a click counts in each position, from the impressions of the training windows alone (up to the end of split rerank).

    Slots are compared within groups of like propensity, by powers of two; impressions without one are a group of their own.
    """
    until = windows.where(F.col("split").isin("pretrain", "rerank")).agg(F.max("until")).collect()[0][0]
    group = F.coalesce(F.floor(F.log2("propensity")).cast("int"), F.lit(1))
    counts = (
        impressions.where(F.col("event_date") <= F.lit(until))
        .groupBy("position", group.alias("group"))
        .agg(F.count(F.lit(1)).alias("shown"), F.count_if("click").alias("clicked"))
        .collect()
    )
    groups = sorted({row["group"] for row in counts})
    shown_KG, clicked_KG = (np.zeros((max((row["position"] for row in counts), default=1), len(groups))) for _ in range(2))
    for row in counts:
        place = row["position"] - 1, groups.index(row["group"])
        shown_KG[place], clicked_KG[place] = row["shown"], row["clicked"]
    return [float(w) for w in inverse_weights(examination(shown_KG, clicked_KG), cfg.candidates.max_weight)]


def _with_history(cfg: Config, rows: DataFrame, interactions: DataFrame) -> DataFrame:
    """Adds what the user chose before the slate was shown; slates of users without a history stay out."""
    acts = interactions.select("user_id", "ordinal", F.col("item_id").alias("history_item"), "event_time", "event_date", "day_known")
    earlier = rows.join(acts, on="user_id", how="inner").where(F.col("event_time") < F.col("at"))
    step = F.sort_array(F.collect_list(F.struct("ordinal", "history_item", "event_date", "day_known")))
    before = earlier.groupBy("request_id").agg(step.alias("before"))
    return rows.join(before, on="request_id", how="inner").withColumn("kept", tail("before", cfg.data.max_history))


def _as_contract(rows: DataFrame, weights: list[float]) -> DataFrame:
    last = F.try_element_at("kept", F.lit(-1))
    positive = F.filter("slate", lambda c: c["grade"] > 0)
    target = F.when(F.size(positive) == 1, F.get(positive, F.lit(0))["item_id"])
    by_slot = F.array(*(F.lit(w) for w in weights))
    fit = F.create_map(*(F.lit(v) for pair in FIT.items() for v in pair))
    return rows.withColumn("target_id", target).select(
        "request_id",
        "split",
        "user_id",
        F.lit("log").alias("source"),
        F.lit("log").alias("model_id"),
        fit[F.col("split")].alias("fit"),
        "as_of",
        F.col("kept.history_item").alias("history_ids"),
        F.transform("kept.event_date", lambda day: F.datediff("as_of", day)).alias("history_days"),
        F.col("slate.item_id").alias("candidate_ids"),
        F.transform("slate.position", lambda p: -p.cast("float")).alias("prior_scores"),
        F.col("slate.grade").alias("grades"),
        (F.transform("slate.position", lambda p: F.get(by_slot, p - 1)) if weights else F.lit(None)).cast("array<float>").alias("weights"),
        "target_id",
        F.when(F.col("target_id").isNotNull(), F.array_position("slate.item_id", F.col("target_id")).cast("int")).alias("target_rank"),
        F.lit(None).cast("int").alias("full_rank"),
        slice_of(F.col("as_of"), last["event_date"], last["day_known"]).alias("slice"),
        F.lit(EXPERIMENT).alias("night"),
    )
