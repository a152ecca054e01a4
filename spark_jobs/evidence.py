"""Stage `evidence`: what tends to follow what, and how often and lately each item was chosen.

Reads   `interactions`: split pretrain for fit `train`, pretrain and rerank for fit `refit`.
Writes  `item_pairs` (one directed pair and fit; fit, item_id, next_item_id), `item_stats` (one item and fit; fit, item_id).
Rerun   both tables are replaced. Sums are exact (whole units of 1e-12), so that the order in which Spark adds does not change a digit.
Run     gr2 stage evidence --profile demo

An occurrence of (a, b), b within `window` steps after a, weighs 0.5^(age of b / half-life) / steps; ages count from the last day of what
is fitted. lift = weight * total / (weight of a as the earlier item * weight of b as the later one): 1 under independence.
"""

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
UNIT = 1e-12  # weights are added up in whole units of this


def run(cfg: Config, ctx: Context) -> Result:
    """Builds both tables for both fits. Raises MissingInputError without `interactions`."""
    interactions = read(ctx, "interactions")
    fitted = with_decay(by_fit(interactions), cfg.evidence).persist(StorageLevel.MEMORY_AND_DISK)
    counted = pair_counts(fitted, cfg.evidence.window).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        pairs = publish(ctx, "item_pairs", item_pairs(counted, cfg.evidence))
        items = publish(ctx, "item_stats", item_stats(fitted))
    finally:
        counted.unpersist()
        fitted.unpersist()
    return Result(rows_in=interactions.count(), rows_out=pairs + items, detail={"pairs": pairs, "stats": items})


def by_fit(interactions: DataFrame) -> DataFrame:
    """Each interaction once for every fit that may see it (column `fit`); those of the valid and test splits for none."""
    fits = F.array_compact(F.array(*(F.when(F.col("split").isin(*splits), F.lit(fit)) for fit, splits in FITS.items())))
    return interactions.withColumn("fit", F.explode(fits))


def with_decay(fitted: DataFrame, evidence: Evidence) -> DataFrame:
    """Adds `reference_date`, the last day of the fit, and `decay`. A user without any known day counts as one half-life old."""
    ends = fitted.groupBy("fit").agg(F.max("event_date").alias("reference_date"))
    age = F.date_diff("reference_date", "event_date").cast("double")
    undated = ~F.col("day_known") & (F.col("event_date") == F.lit("1970-01-01").cast("date")) & (age > 0)
    half_lives = F.when(undated, F.lit(1.0)).otherwise(age / evidence.half_life_days)
    return fitted.join(F.broadcast(ends), on="fit", how="inner").select(
        "fit", "user_id", "ordinal", "item_id", "event_date", "day_known", "reference_date", F.pow(F.lit(0.5), half_lives).alias("decay")
    )


def _units(weight: Column) -> Column:
    """A weight in whole units, at least one: nothing that happened weighs nothing."""
    return F.greatest(F.round(weight / UNIT).cast("long"), F.lit(1))


def pair_counts(fitted: DataFrame, window: int) -> DataFrame:
    """(fit, item_id, next_item_id) with units, count, next_count and median gap: linear in interactions, `window` rows each."""
    order = Window.partitionBy("fit", "user_id").orderBy("ordinal")
    latest = Window.partitionBy("fit", "user_id").orderBy(F.desc("ordinal"))
    later = [
        F.struct(
            F.lead("item_id", step).over(order).alias("next_item_id"),
            F.lead("decay", step).over(order).alias("decay"),
            F.lead("event_date", step).over(order).alias("date"),
            F.lit(step).alias("step"),
        )
        for step in range(1, window + 1)
    ]
    return (
        fitted.withColumn("from_last", F.row_number().over(latest))
        .where(F.col("from_last") <= MAX_STEPS)
        .select("fit", "item_id", "event_date", F.array(*later).alias("later"))
        .select("fit", "item_id", "event_date", F.explode("later").alias("pair"))
        .select("fit", "item_id", "event_date", "pair.*")
        .where(F.col("next_item_id").isNotNull() & (F.col("next_item_id") != F.col("item_id")))
        .groupBy("fit", "item_id", "next_item_id")
        .agg(
            F.sum(_units(F.col("decay") / F.col("step"))).alias("units"),
            F.count(F.lit(1)).alias("count"),
            F.count_if(F.col("step") == 1).alias("next_count"),
            F.median(F.date_diff("date", "event_date")).alias("median_gap_days"),
        )
    )


def item_pairs(counted: DataFrame, evidence: Evidence) -> DataFrame:
    """Pair counts in the contract of `item_pairs`: lift over all pairs, then the strongest of each item."""
    sums = F.sum(F.col("units").cast("decimal(28,0)")).cast("double")
    ahead = counted.groupBy("fit", "item_id").agg(sums.alias("ahead"))
    behind = counted.groupBy("fit", "next_item_id").agg(sums.alias("behind"))
    total = counted.groupBy("fit").agg(sums.alias("total"))
    best = Window.partitionBy("fit", "item_id").orderBy(F.desc("units"), "next_item_id")
    return (
        counted.where(F.col("count") >= evidence.min_count)
        .withColumn("rank", F.row_number().over(best))
        .where(F.col("rank") <= evidence.max_pairs_per_item)
        .join(ahead, on=["fit", "item_id"], how="inner")
        .join(behind, on=["fit", "next_item_id"], how="inner")
        .join(F.broadcast(total), on="fit", how="inner")
        .withColumns({"weight": F.col("units") * UNIT, "lift": F.col("units") * F.col("total") / (F.col("ahead") * F.col("behind"))})
        .select(*schemas.get("item_pairs").names())
    )


def item_stats(fitted: DataFrame) -> DataFrame:
    """Interactions with their decay, in the contract of `item_stats`."""
    order = Window.partitionBy("fit").orderBy(F.desc("count"), "item_id")
    return (
        fitted.groupBy("fit", "item_id")
        .agg(
            F.count(F.lit(1)).alias("count"),
            F.count_distinct("user_id").alias("users"),
            (F.sum(_units(F.col("decay"))) * UNIT).alias("recent"),
            F.max(F.when(F.col("day_known"), F.col("event_date"))).alias("last_date"),
            F.max("reference_date").alias("reference_date"),
        )
        .withColumn("popularity_rank", F.row_number().over(order))
        .select(*schemas.get("item_stats").names())
    )
