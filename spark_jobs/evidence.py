"""Stage `evidence`: what tends to follow what, and how often and lately each item was chosen.

Reads   `interactions`: split pretrain for fit `train`, pretrain and rerank for fit `refit`.
Writes  `pair_days` (one directed pair on one day; event_date, split, item_id, next_item_id), and without --date what models are trained
        with: `item_pairs` (one directed pair and fit; fit, item_id, next_item_id), `item_stats` (one item and fit; fit, item_id).
Rerun   tables are replaced, `pair_days` with --date only in the periods whose interactions changed. Sums are exact (whole units of
        1e-12), so that the order in which Spark adds does not change a digit.
Run     gr2 stage evidence --profile demo [--date 2026-01-05]

An occurrence of (a, b), b within `window` steps after a, weighs 0.5^(age of b / half-life) / steps; ages count from the last day of what
is fitted. lift = weight * total / (weight of a as the earlier item * weight of b as the later one): 1 under independence.
"""

import datetime as dt

from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

import schemas
from gr2.config import Config, Evidence
from gr2.context import Context, Result
from schemas.interactions import FITS
from spark_jobs.increments import building, last_built, replaced, until_settled
from spark_jobs.publish import publish
from spark_jobs.session import read

MAX_STEPS = 1000  # interactions of one user in one period that count, the first: a robot must not weigh more than that
UNIT = 1e-12  # weights are added up in whole units of this
UNDATED = dt.date(1970, 1, 1)  # the day of a user without any known day


def run(cfg: Config, ctx: Context) -> Result:
    """Builds the tables. Raises MissingInputError without `interactions`."""
    return until_settled(ctx, lambda: _build(cfg, ctx))


def _build(cfg: Config, ctx: Context) -> Result:
    now = building(cfg, ctx, "evidence", "pair_days", "interactions")
    interactions = read(ctx, "interactions", now.version)
    before = last_built(ctx, "pair_days", now) if ctx.date else None
    periods = replaced(ctx, now, before) if before else None
    if periods is None:
        days = publish(ctx, "pair_days", pair_days(interactions, cfg.evidence.window), built=now)
    else:
        mine = pair_days(reaching(interactions, cfg.evidence.window, periods), cfg.evidence.window, periods)
        days = publish(ctx, "pair_days", mine, {"period": periods}, now) if periods else 0
    if ctx.date:
        return Result(rows_in=days, rows_out=days, detail={"pair_days": days})
    facts = by_fit(read(ctx, "pair_days"))
    fitted = with_decay(by_fit(interactions), cfg.evidence).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        counted = pair_counts(facts, ends_of(fitted), cfg.evidence).persist(StorageLevel.MEMORY_AND_DISK)
        pairs = publish(ctx, "item_pairs", item_pairs(counted, cfg.evidence))
        counted.unpersist()
        items = publish(ctx, "item_stats", item_stats(fitted))
    finally:
        fitted.unpersist()
    return Result(rows_in=interactions.count(), rows_out=days + pairs + items, detail={"days": days, "pairs": pairs, "stats": items})


def as_of(ctx: Context, evidence: Evidence, night: dt.date) -> tuple[DataFrame, DataFrame]:
    """What all days up to a night say, in the form of `item_pairs` and `item_stats`, as fit `live`. Nothing later is read."""
    known = F.col("event_date") <= F.lit(night)
    acts, facts = (read(ctx, table).where(known).withColumn("fit", F.lit("live")) for table in ("interactions", "pair_days"))
    fitted = with_decay(acts, evidence)
    return item_pairs(pair_counts(facts, ends_of(fitted), evidence), evidence), item_stats(fitted)


def by_fit(rows: DataFrame) -> DataFrame:
    """Each row once for every fit that may see its split (column `fit`); those of the valid and test splits for none."""
    fits = F.array_compact(F.array(*(F.when(F.col("split").isin(*splits), F.lit(fit)) for fit, splits in FITS.items())))
    return rows.withColumn("fit", F.explode(fits))


def with_decay(fitted: DataFrame, evidence: Evidence) -> DataFrame:
    """Adds `reference_date`, the last day of the fit, and `decay`."""
    ends = fitted.groupBy("fit").agg(F.max("event_date").alias("reference_date"))
    return fitted.join(F.broadcast(ends), on="fit", how="inner").select(
        "fit", "user_id", "ordinal", "item_id", "event_date", "day_known", "reference_date", decay(evidence).alias("decay")
    )


def ends_of(fitted: DataFrame) -> DataFrame:
    """`fit, reference_date`, of rows that `with_decay` gave."""
    return fitted.select("fit", "reference_date").distinct()


def decay(evidence: Evidence) -> Column:
    """0.5^(age at `reference_date` / half-life). A user without any known day counts as one half-life old."""
    age = F.date_diff("reference_date", "event_date").cast("double")
    undated = (F.col("event_date") == F.lit(UNDATED)) & (age > 0)
    return F.pow(F.lit(0.5), F.when(undated, F.lit(1.0)).otherwise(age / evidence.half_life_days))


def _units(weight: Column) -> Column:
    """A weight in whole units, at least one: nothing that happened weighs nothing."""
    return F.greatest(F.round(weight / UNIT).cast("long"), F.lit(1))


def reaching(interactions: DataFrame, window: int, periods: set[str]) -> DataFrame:
    """Rows of these periods, and of the same users what lies between them and `window` rows before."""
    span = (F.min("ordinal") - window).alias("first"), F.max("ordinal").alias("last")
    spans = interactions.where(F.col("period").isin(*periods)).groupBy("user_id").agg(*span)
    return interactions.join(spans, on="user_id").where(F.col("ordinal").between(F.col("first"), F.col("last"))).drop("first", "last")


def pair_days(interactions: DataFrame, window: int, periods: set[str] | None = None) -> DataFrame:
    """What followed what on each day (of `periods`), in the contract of `pair_days`: linear in interactions, `window` rows each.

    `interactions` hold whole users, or what `reaching` leaves of them.
    """
    order = Window.partitionBy("user_id").orderBy("ordinal")
    place = F.row_number().over(Window.partitionBy("user_id", "period").orderBy("ordinal"))
    earlier = [
        F.struct(
            F.lag("item_id", step).over(order).alias("item_id"),
            F.lag("event_date", step).over(order).alias("date"),
            F.lit(step).alias("step"),
        )
        for step in range(1, window + 1)
    ]
    rows = interactions.select("item_id", "event_date", "split", "period", F.array(*earlier).alias("earlier"), place.alias("place"))
    if periods is not None:
        rows = rows.where(F.col("period").isin(*periods))
    return (
        rows.where(F.col("place") <= MAX_STEPS)
        .select("event_date", "split", "period", F.col("item_id").alias("next_item_id"), F.explode("earlier").alias("pair"))
        .select("event_date", "split", "period", "next_item_id", "pair.*")
        .where(F.col("item_id").isNotNull() & (F.col("next_item_id") != F.col("item_id")))
        .groupBy("event_date", "split", "item_id", "next_item_id", "period")
        .agg(
            (F.sum(_units(1 / F.col("step"))) * UNIT).alias("closeness"),
            F.count(F.lit(1)).alias("count"),
            F.count_if(F.col("step") == 1).alias("next_count"),
            F.sort_array(F.collect_list(F.date_diff("event_date", "date"))).alias("gap_days"),
        )
        .select(*schemas.get("pair_days").names())
    )


def pair_counts(facts: DataFrame, ends: DataFrame, evidence: Evidence) -> DataFrame:
    """(fit, item_id, next_item_id) with units, count, next_count and median gap: days summed up, each decayed to the end of its fit.

    `facts`: rows of `pair_days` with the fit that sees them.
    """
    return (
        facts.join(F.broadcast(ends), on="fit", how="inner")
        .withColumn("decay", decay(evidence))
        .groupBy("fit", "item_id", "next_item_id")
        .agg(
            F.sum(_units(F.col("closeness") * F.col("decay"))).alias("units"),
            F.sum("count").alias("count"),
            F.sum("next_count").alias("next_count"),
            _median(F.sort_array(F.flatten(F.collect_list("gap_days")))).alias("median_gap_days"),
        )
    )


def _median(ordered: Column) -> Column:
    """Of an ascending list that is not empty."""
    low, high = F.floor((F.size(ordered) - 1) / 2), F.floor(F.size(ordered) / 2)
    return (F.get(ordered, low.cast("int")) + F.get(ordered, high.cast("int"))) / 2


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
