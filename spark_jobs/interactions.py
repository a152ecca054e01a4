"""Stage `interactions`: what each user chose, in order, cut by the profile's protocol.

Reads   `events` (kinds click, purchase, review; what was only seen is no choice).
Writes  `interactions` (one deduplicated, sessionised interaction; user_id, ordinal), `histories` (one user as of a day; user_id, as_of).
Rerun   both tables depend on the events alone, not on the day of the run, so backfills in any order end alike.
Run     gr2 stage interactions --profile demo [--date 2026-01-05]

Without --date both tables are built whole. With it only users with new events are built again, from their first new day on, and only the
periods since then are replaced (and those that a window moved over): equal, row for row, to what a whole build gives.

A user's order is the source's own where it has one, else the time. Of several events with one item in one session the strongest
stands (purchase > click > review). Splits: `time` cuts the days from the first to the last one by `data.windows`; `leave_one_out` counts
from the user's end (test, valid, rerank), but a user's first interaction always stays in `pretrain`, since a target needs a history:
with 3 interactions there is no rerank target, with 2 only a test target, with 1 none.
"""

import datetime as dt
from dataclasses import dataclass

from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

import schemas
from gr2.config import Config, Data
from gr2.context import Context, Result
from spark_jobs.events import PERIODS
from spark_jobs.increments import Built, added, building, last_built, until_settled
from spark_jobs.publish import publish
from spark_jobs.session import read, together, values

TABLES = ("interactions", "histories")
STRENGTH = {"purchase": 3, "click": 2, "review": 1}
SPLITS = ("pretrain", "rerank", "valid", "test")
ORDER = ("source_order", "event_time", "event_id")


def run(cfg: Config, ctx: Context) -> Result:
    """Builds both tables. Raises MissingInputError without `events`, AuditError if there is no interaction at all."""
    return until_settled(ctx, lambda: _build(cfg, ctx))


def _build(cfg: Config, ctx: Context) -> Result:
    now = [building(cfg, ctx, "interactions", target, "events") for target in TABLES]
    acts = read(ctx, "events", now[0].version).where(F.col("kind").isin(*STRENGTH))
    if ctx.date and (new := new_choices(cfg, ctx, now)):
        return _increment(cfg, ctx, acts, new, now)
    span = days_of(acts)
    now[0].settings["span"] = [str(day) for day in span]
    interactions = to_interactions(acts, cfg.data, cfg.seed, cuts(span, cfg.data)).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        kept, as_of = together(
            lambda: publish(ctx, "interactions", interactions, built=now[0]),
            lambda: publish(ctx, "histories", to_histories(interactions, cfg.data), built=now[1]),
        )
        splits = {r["split"]: r["count"] for r in interactions.groupBy("split").count().collect()}
    finally:
        interactions.unpersist()
    rows_in = acts.count()
    detail = {"splits": {s: splits.get(s, 0) for s in SPLITS}, "histories": as_of}
    ctx.log(f"interactions: {detail['splits']}")
    return Result(rows_in=rows_in, rows_out=kept, duplicates=rows_in - kept, detail=detail)


# -- a night ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class New:
    """What the tables do not hold yet."""

    users: DataFrame  # user_id, since: those with new choices, and the first day of these
    first: dt.date | None  # of all new choices; none where there is none
    was: list[dt.date]  # the days spanned before
    span: list[dt.date]  # and with them


def new_choices(cfg: Config, ctx: Context, now: list[Built]) -> New | None:
    """Choices that the tables do not hold yet.

    Nothing where all must be built. Only the order of time can be continued: under leave-one-out a new event moves the user's splits, and
    a source's own order, a day that was filled in, or a day that was shuffled can change any earlier row.
    """
    before = [last_built(ctx, target, b) for target, b in zip(TABLES, now, strict=True)]
    known = [b for b in before if b is not None]
    if len(known) < len(before) or cfg.data.protocol != "time" or cfg.data.same_day_order != "as_published":
        return None
    rows = added(ctx, now[0], min(known, key=lambda b: b.version))
    if rows is None:
        return None
    chosen = rows.where(F.col("kind").isin(*STRENGTH))
    odd = F.count_if(~F.col("day_known") | F.col("source_order").isNotNull())
    strange, first, last = chosen.agg(odd, F.min("event_date"), F.max("event_date")).collect()[0]
    old = [dt.date.fromisoformat(day) for day in known[0].settings.get("span", [])]
    if strange or not old:
        return None
    span = old if first is None else [min(old[0], first), max(old[1], last)]
    return New(chosen.groupBy("user_id").agg(F.min("event_date").alias("since")), first, old, span)


def _increment(cfg: Config, ctx: Context, acts: DataFrame, new: New, now: list[Built]) -> Result:
    """Builds the touched users again from their first new day on, and replaces the periods in which something changed."""
    now[0].settings["span"] = [str(day) for day in new.span]
    fresh, windows = new.users.persist(), cuts(new.span, cfg.data)
    there = read(ctx, "interactions", now[0].base)
    mine = continued(acts, there, fresh, new.first, cfg.data, windows).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        changed = mine.join(fresh, on="user_id").where(F.col("event_date") >= F.col("since"))
        elsewhere = there.where(_moved(cuts(new.was, cfg.data), windows))
        periods, moved = together(lambda: values(changed, "period"), lambda: values(elsewhere, "period"))
        moved |= periods
        if not moved:
            ctx.log("interactions: nothing new")
            return Result(detail={"periods": 0})
        now[0].settings["periods"] = sorted(moved)  # who builds on this table need not look for what changed
        others = there.where(F.col("period").isin(*moved)).join(fresh, on="user_id", how="left_anti").drop("split")
        others = with_split(others, cfg.data, windows).select(*mine.columns)
        replaced = others.unionByName(mine.where(F.col("period").isin(*moved)))
        work = [lambda: publish(ctx, "interactions", replaced, {"period": moved}, now[0]), fresh.count]
        if periods:
            rest = read(ctx, "histories", now[1].base).where(F.col("period").isin(*periods)).join(fresh, on="user_id", how="left_anti")
            again = rest.unionByName(to_histories(mine, cfg.data).where(F.col("period").isin(*periods)))
            work.append(lambda: publish(ctx, "histories", again, {"period": periods}, now[1]))
        kept, users, *_ = together(*work)
    finally:
        mine.unpersist()
        fresh.unpersist()
    ctx.log(f"interactions: {users} users had new events; {len(moved)} periods replaced")
    return Result(rows_in=kept, rows_out=kept, detail={"users": users, "periods": len(moved)})


def continued(acts: DataFrame, there: DataFrame, fresh: DataFrame, first: dt.date | None, data: Data, windows: list[dt.date]) -> DataFrame:
    """All interactions of the touched users: those before their first new day as they are, the later ones built from events.

    A new day begins a new session, so that places and sessions go on counting from those before. `first`: the first new day of all.
    """
    late = acts.where(F.col("event_date") >= F.lit(first)) if first else acts.limit(0)  # what lies before is not even read
    new = late.join(fresh, on="user_id").where(F.col("event_date") >= F.col("since")).drop("since")
    kept = there.join(fresh, on="user_id").where(F.col("event_date") < F.col("since")).drop("since", "split", "gap_days")
    done = kept.groupBy("user_id").agg(F.max("ordinal").alias("ordinals"), F.max("session").alias("sessions"))
    ordered = with_ordinal(strongest(with_session(new, data.session_gap_minutes))).join(done, on="user_id", how="left")
    counted = ordered.withColumns(
        {
            "ordinal": (F.col("ordinal") + F.coalesce("ordinals", F.lit(0))).cast("int"),
            "session": (F.col("session") + F.coalesce("sessions", F.lit(0))).cast("int"),
            "period": F.date_format("event_date", PERIODS[data.period]),
        }
    )
    return finished(with_split(kept.unionByName(counted.select(*kept.columns)), data, windows), data)


def _moved(was: list[dt.date], became: list[dt.date]) -> Column:
    """Whether a row lies on a day that belongs to another window now."""
    moved = F.lit(False)
    for old, new in zip(was, became, strict=False):
        moved |= (F.col("event_date") >= F.lit(min(old, new))) & (F.col("event_date") < F.lit(max(old, new)))
    return moved


# -- from events to rows ----------------------------------------------------------------------------------------------


def to_interactions(acts: DataFrame, data: Data, seed: int, windows: list[dt.date]) -> DataFrame:
    """Events that are choices, in the contract of `interactions`. `windows`: their `cuts`."""
    ordered = with_ordinal(strongest(with_session(acts, data.session_gap_minutes)))
    split = with_split(ordered, data, windows)
    return finished(shuffled_days(split, seed) if data.same_day_order == "shuffled" else split, data)


def finished(split: DataFrame, data: Data) -> DataFrame:
    """Adds what follows from a user's order; the columns of the contract."""
    order = Window.partitionBy("user_id").orderBy("ordinal")
    gap = F.date_diff("event_date", F.lag("event_date").over(order)).cast("int")
    rows = split.withColumns({"gap_days": gap, "period": F.date_format("event_date", PERIODS[data.period])})
    return rows.select(*schemas.get("interactions").names())


def days_of(acts: DataFrame) -> list[dt.date]:
    """First and last day that is known; none where no day is."""
    first, last = acts.where("day_known").agg(F.min("event_date"), F.max("event_date")).collect()[0]
    return [] if first is None else [first, last]


def cuts(span: list[dt.date], data: Data) -> list[dt.date]:
    """First days of the windows rerank, valid and test under the time protocol; none without days, or under leave-one-out."""
    if data.protocol == "leave_one_out" or not span:
        return []
    days = (span[1] - span[0]).days + 1
    return [span[0] + dt.timedelta(days=int(share * days + 1e-9)) for share in data.windows]


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


def with_split(ordered: DataFrame, data: Data, windows: list[dt.date]) -> DataFrame:
    """Adds `split`, by data.protocol."""
    if data.protocol == "leave_one_out":
        named = {1: "test", 2: "valid", 3: "rerank"}
        targets = F.create_map(*(F.lit(v) for pair in named.items() for v in pair))
        target = F.when(F.col("ordinal") > 1, targets[F.col("from_end")])
        return ordered.withColumn("split", F.coalesce(target, F.lit("pretrain")))
    cut: Column = F.lit(SPLITS[3] if windows else SPLITS[0])
    for end, name in reversed(list(zip(windows, SPLITS[:3], strict=False))):
        cut = F.when(F.col("event_date") < F.lit(end), F.lit(name)).otherwise(cut)
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
    again = Window.partitionBy("user_id").orderBy("run", "drawn", "ordinal")
    return marked.withColumn("ordinal", F.row_number().over(again))


def to_histories(interactions: DataFrame, data: Data) -> DataFrame:
    """The last data.max_history items of each user at the end of each day with an interaction."""
    order = Window.partitionBy("user_id").orderBy("ordinal")
    recent = order.rowsBetween(1 - data.max_history, 0)
    as_of = F.max("event_date").over(order.rowsBetween(Window.unboundedPreceding, 0))  # never goes back, whatever the source's order
    dated = interactions.withColumn("as_of", as_of)
    return (
        dated.withColumns(
            {
                "item_ids": F.collect_list("item_id").over(recent),
                "days": F.collect_list(F.unix_date("event_date")).over(recent),
                "last_of_day": F.coalesce(F.lead("as_of").over(order) != F.col("as_of"), F.lit(True)),
                "length": F.col("ordinal"),
                "period": F.date_format("as_of", PERIODS[data.period]),
            }
        )
        .where("last_of_day")
        .select(*schemas.get("histories").names())
    )
