"""Stage `interactions`: what each user chose, in order, cut by the profile's protocol.

Reads   `events` (kinds click, purchase, review; what was only seen is no choice).
Writes  `interactions` (one deduplicated, sessionised interaction; user_id, ordinal), `histories` (one user as of a day; user_id, as_of).
Rerun   both tables are replaced; they depend on the events alone, not on the day of the run, so backfills in any order end alike.
Run     gr2 stage interactions --profile demo

A user's order is the source's own where it has one, else the time. Of several events with one item in one session the strongest
stands (purchase > click > review). Splits: `time` cuts the days from the first to the last one by `data.windows`; `leave_one_out` counts
from the user's end (test, valid, rerank), but a user's first interaction always stays in `pretrain`, since a target needs a history:
with 3 interactions there is no rerank target, with 2 only a test target, with 1 none.
"""

from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

import schemas
from gr2.config import Config, Data
from gr2.context import Context, Result
from spark_jobs.publish import publish
from spark_jobs.session import read

STRENGTH = {"purchase": 3, "click": 2, "review": 1}
SPLITS = ("pretrain", "rerank", "valid", "test")
ORDER = ("source_order", "event_time", "event_id")


def run(cfg: Config, ctx: Context) -> Result:
    """Builds both tables. Raises MissingInputError without `events`, AuditError if there is no interaction at all."""
    acts = read(ctx, "events").where(F.col("kind").isin(*STRENGTH))
    interactions = to_interactions(acts, cfg.data, cfg.seed).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        kept = publish(ctx, "interactions", interactions)
        as_of = publish(ctx, "histories", to_histories(interactions, cfg.data.max_history))
        splits = {r["split"]: r["count"] for r in interactions.groupBy("split").count().collect()}
    finally:
        interactions.unpersist()
    rows_in = acts.count()
    detail = {"splits": {s: splits.get(s, 0) for s in SPLITS}, "histories": as_of}
    ctx.log(f"interactions: {detail['splits']}")
    return Result(rows_in=rows_in, rows_out=kept, duplicates=rows_in - kept, detail=detail)


def to_interactions(acts: DataFrame, data: Data, seed: int) -> DataFrame:
    """Events that are choices, in the contract of `interactions`."""
    ordered = with_ordinal(strongest(with_session(acts, data.session_gap_minutes)))
    split = with_split(ordered, data)
    if data.same_day_order == "shuffled":
        split = shuffled_days(split, seed)
    order = Window.partitionBy("user_id").orderBy("ordinal")
    return split.withColumn("gap_days", F.date_diff("event_date", F.lag("event_date").over(order)).cast("int")).select(
        *schemas.get("interactions").names()
    )


def with_session(acts: DataFrame, gap_minutes: int) -> DataFrame:
    """Adds `session`, from 1: a new one after a gap, and on a new day."""
    order = Window.partitionBy("user_id").orderBy(*ORDER)
    gap = F.unix_timestamp("event_time") - F.lag(F.unix_timestamp("event_time")).over(order)
    new_day = F.col("event_date") != F.lag("event_date").over(order)
    starts = F.coalesce(new_day | F.coalesce(gap > gap_minutes * 60, F.lit(False)), F.lit(True))
    return acts.withColumn("starts", starts.cast("int")).withColumn(
        "session", F.sum("starts").over(order.rowsBetween(Window.unboundedPreceding, 0)).cast("int")
    )


def strongest(acts: DataFrame) -> DataFrame:
    """One event for each user, session and item: the strongest; of equal ones the first."""
    strength = F.create_map(*(F.lit(v) for pair in STRENGTH.items() for v in pair))[F.col("kind")]
    best = Window.partitionBy("user_id", "session", "item_id").orderBy(F.desc("strength"), *ORDER)
    return acts.withColumn("strength", strength).withColumn("place", F.row_number().over(best)).where(F.col("place") == 1)


def with_ordinal(chosen: DataFrame) -> DataFrame:
    """Adds `ordinal` (1 is the oldest) and `from_end` (1 is the last)."""
    order = Window.partitionBy("user_id").orderBy(*ORDER)
    whole = Window.partitionBy("user_id").rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    return chosen.withColumn("ordinal", F.row_number().over(order)).withColumn(
        "from_end", (F.count(F.lit(1)).over(whole) - F.col("ordinal") + 1).cast("int")
    )


def with_split(ordered: DataFrame, data: Data) -> DataFrame:
    """Adds `split`, by data.protocol."""
    if data.protocol == "leave_one_out":
        named = {1: "test", 2: "valid", 3: "rerank"}
        targets = F.create_map(*(F.lit(v) for pair in named.items() for v in pair))
        target = F.when(F.col("ordinal") > 1, targets[F.col("from_end")])
        return ordered.withColumn("split", F.coalesce(target, F.lit("pretrain")))
    first, last = ordered.where("day_known").agg(F.min("event_date"), F.max("event_date")).collect()[0]
    if first is None:
        return ordered.withColumn("split", F.lit("pretrain"))
    days = (last - first).days + 1
    ends = [int(share * days + 1e-9) for share in data.windows]  # the first day number that is beyond each window
    number = F.date_diff("event_date", F.lit(first))
    cut: Column = F.lit(SPLITS[3])
    for end, name in reversed(list(zip(ends, SPLITS[:3], strict=True))):
        cut = F.when(number < end, F.lit(name)).otherwise(cut)
    return ordered.withColumn("split", cut)


def shuffled_days(split: DataFrame, seed: int) -> DataFrame:
    """Reorders the train prefix inside each known day by a seeded hash, since a source may list a day in an order that is not time.

    Targets never move, nor does what has no known day.
    """
    order = Window.partitionBy("user_id").orderBy("ordinal")
    fixed = (F.col("split") != "pretrain") | ~F.col("day_known")
    starts = F.coalesce((F.col("event_date") != F.lag("event_date").over(order)) | fixed | F.lag(fixed).over(order), F.lit(True))
    drawn = F.when(~fixed, F.xxhash64(F.lit(seed), "event_id"))
    marked = split.withColumn("starts", starts.cast("int")).withColumns(
        {"run": F.sum("starts").over(order.rowsBetween(Window.unboundedPreceding, 0)), "drawn": drawn}
    )
    whole = Window.partitionBy("user_id").rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    again = Window.partitionBy("user_id").orderBy("run", "drawn", "ordinal")
    return marked.withColumn("ordinal", F.row_number().over(again)).withColumn(
        "from_end", (F.count(F.lit(1)).over(whole) - F.col("ordinal") + 1).cast("int")
    )


def to_histories(interactions: DataFrame, keep: int) -> DataFrame:
    """The last `keep` items of each user at the end of each day with an interaction."""
    order = Window.partitionBy("user_id").orderBy("ordinal")
    recent = order.rowsBetween(1 - keep, 0)
    as_of = F.max("event_date").over(order.rowsBetween(Window.unboundedPreceding, 0))  # never goes back, whatever the source's order
    dated = interactions.withColumn("as_of", as_of)
    return (
        dated.withColumns(
            {
                "item_ids": F.collect_list("item_id").over(recent),
                "days": F.collect_list(F.unix_date("event_date")).over(recent),
                "last_of_day": F.coalesce(F.lead("as_of").over(order) != F.col("as_of"), F.lit(True)),
                "length": F.col("ordinal"),
            }
        )
        .where("last_of_day")
        .select(*schemas.get("histories").names())
    )
