"""Stage `evidence`: what tends to follow what, and how often and lately each item was chosen.

Reads   `interactions`: split pretrain for fit `train`, pretrain and rerank for fit `refit`.
Writes  `item_pairs` (one directed pair and fit; fit, item_id, next_item_id), `item_stats` (one item and fit; fit, item_id).
Rerun   both tables are replaced. Sums are exact (decimal), so that the order in which Spark adds does not change a digit.
Run     gr2 stage evidence --profile demo

An occurrence of (a, b), b within `window` steps after a, weighs 0.5^(age of b / half-life) / steps; ages count from the last day of what is fitted.
lift = weight * total / (weight of a as the earlier item * weight of b as the later one): 1 under independence.
"""

from functools import reduce

from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

import schemas
from gr2.config import Config, Evidence
from gr2.context import Context, Result
from spark_jobs.publish import publish
from spark_jobs.session import read

FITS = {"train": ("pretrain",), "refit": ("pretrain", "rerank")}
MAX_STEPS = 1000  # interactions of one user that count, the latest: a robot must not weigh more than that
EXACT = "decimal(28,18)"


def run(cfg: Config, ctx: Context) -> Result:
    """Builds both tables for both fits. Raises MissingInputError without `interactions`."""
    interactions = read(ctx, "interactions")
    fitted = {fit: with_age(interactions.where(F.col("split").isin(*splits)), cfg.evidence) for fit, splits in FITS.items()}
    pairs = reduce(DataFrame.unionByName, (item_pairs(frame, fit, cfg.evidence) for fit, frame in fitted.items()))
    stats = reduce(DataFrame.unionByName, (item_stats(frame, fit) for fit, frame in fitted.items()))
    rows = publish(ctx, "item_pairs", pairs.persist(StorageLevel.MEMORY_AND_DISK))
    pairs.unpersist()
    items = publish(ctx, "item_stats", stats)
    return Result(rows_in=interactions.count(), rows_out=rows + items, detail={"pairs": rows, "stats": items})


def with_age(interactions: DataFrame, evidence: Evidence) -> DataFrame:
    """Adds `decay` (exact) and `reference_date`, the last day of what is fitted. A day that was filled in for want of any counts one half-life."""
    whole = interactions.agg(F.max("event_date").alias("reference_date"))
    age = F.date_diff("reference_date", "event_date").cast("double")
    nowhere = (
        ~F.col("day_known") & (F.col("event_date") == F.lit("1970-01-01").cast("date")) & (F.col("reference_date") > F.col("event_date"))
    )
    years = F.when(nowhere, F.lit(evidence.half_life_days)).otherwise(age)
    return interactions.crossJoin(F.broadcast(whole)).withColumn("decay", F.pow(F.lit(0.5), years / evidence.half_life_days))


def _exact(value: Column) -> Column:
    """A weight as a decimal, at least the smallest one: nothing that happened weighs nothing."""
    return F.greatest(value.cast(EXACT), F.lit("0.000000000000000001").cast(EXACT))


def item_pairs(fitted: DataFrame, fit: str, evidence: Evidence) -> DataFrame:
    """Interactions with their decay, in the contract of `item_pairs`."""
    order = Window.partitionBy("user_id").orderBy("ordinal")
    later = [
        F.struct(
            F.lead("item_id", step).over(order).alias("next_item_id"),
            F.lead("decay", step).over(order).alias("decay"),
            F.date_diff(F.lead("event_date", step).over(order), "event_date").alias("gap"),
            F.lit(step).alias("step"),
        )
        for step in range(1, evidence.window + 1)
    ]
    latest = Window.partitionBy("user_id").orderBy(F.desc("ordinal"))
    steps = (
        fitted.withColumn("from_last", F.row_number().over(latest))
        .where(F.col("from_last") <= MAX_STEPS)
        .select("item_id", F.array(*later).alias("later"))
        .select("item_id", F.explode("later").alias("pair"))
        .select("item_id", "pair.*")
        .where(F.col("next_item_id").isNotNull() & (F.col("next_item_id") != F.col("item_id")))
    )
    pairs = steps.groupBy("item_id", "next_item_id").agg(
        F.sum(_exact(F.col("decay") / F.col("step"))).alias("exact"),
        F.count(F.lit(1)).alias("count"),
        F.count_if(F.col("step") == 1).alias("next_count"),
        F.median("gap").alias("median_gap_days"),
    )
    ahead = pairs.groupBy("item_id").agg(F.sum("exact").alias("ahead"))
    behind = pairs.groupBy("next_item_id").agg(F.sum("exact").alias("behind"))
    total = pairs.agg(F.sum("exact").alias("total"))
    independent = F.col("ahead").cast("double") * F.col("behind").cast("double") / F.col("total").cast("double")
    best = Window.partitionBy("item_id").orderBy(F.desc("exact"), "next_item_id")
    return (
        pairs.where(F.col("count") >= evidence.min_count)
        .join(ahead, on="item_id", how="inner")
        .join(behind, on="next_item_id", how="inner")
        .crossJoin(F.broadcast(total))
        .withColumns(
            {
                "fit": F.lit(fit),
                "weight": F.col("exact").cast("double"),
                "lift": F.col("exact").cast("double") / independent,
                "rank": F.row_number().over(best),
            }
        )
        .where(F.col("rank") <= evidence.max_pairs_per_item)
        .select(*schemas.get("item_pairs").names())
    )


def item_stats(fitted: DataFrame, fit: str) -> DataFrame:
    """Interactions with their decay, in the contract of `item_stats`."""
    counted = fitted.groupBy("item_id").agg(
        F.count(F.lit(1)).alias("count"),
        F.count_distinct("user_id").alias("users"),
        F.sum(_exact(F.col("decay"))).cast("double").alias("recent"),
        F.max(F.when(F.col("day_known"), F.col("event_date"))).alias("last_date"),
        F.max("reference_date").alias("reference_date"),
    )
    order = Window.orderBy(F.desc("count"), "item_id")
    return counted.withColumns({"fit": F.lit(fit), "popularity_rank": F.row_number().over(order)}).select(
        *schemas.get("item_stats").names()
    )
