"""Stage `events`: raw logs to one row an event.

Reads   raw files of the profile's source (`sources.py`); simulated days are written first where they are missing.
Writes  `events` (one user-item event; event_id), `quarantine` (one refused row; quarantine_id).
Rerun   both tables are insert-only on a key that is a hash of content: rows that are there are left as they are, and so is a day that
        was filled in.
Run     gr2 stage events --profile demo [--date 2026-01-05]

Rows in = new rows published + duplicates + rows refused (DESIGN contract 5), and every accepted row is looked for in the table after.
A row that tells of several events, such as an impression with its click, counts as each of them.
"""

import time
from functools import partial
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

import schemas
from gr2 import simulate
from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import AuditError, ConfigError
from gr2.sections import Files
from spark_jobs import readers, sources
from spark_jobs.publish import publish
from spark_jobs.session import read, together

FIELDS = ("kind", "user_id", "item_id", "time", "request_id", "row", "col", "propensity", "rating", "position")
KINDS = ("view", "click", "purchase", "review", "impression")
ISO = r"^\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?(Z|[+-]\d{2}:?\d{2})$"  # a zone is required
EPOCH = r"^\d{1,14}$"  # seconds since 1970, or milliseconds where there are twelve digits
EARLIEST = "1990-01-01"  # before: a clock that was never set
PERIODS = {"day": "yyyy-MM-dd", "month": "yyyy-MM", "year": "yyyy"}


def run(cfg: Config, ctx: Context) -> Result:
    """Ingests the day of --date, or all there is.

    Raises ConfigError for periods other than the table's, InputError for an unreadable file, AuditError for a broken sum or too many
    refusals.
    """
    _same_periods(ctx, cfg.data.period)
    if cfg.data.source == "simulator":
        started = time.monotonic()
        written = simulate.write_days(cfg.simulator, cfg.seed, ctx.raw_path(), readers.known_days(ctx), ctx.root / "truth")
        ctx.log(f"events: simulated {len(written)} days in {time.monotonic() - started:.1f} s")
    raw = sources.open_source(ctx, "events", FIELDS, days=True)
    judged = judge(with_time(raw.frame, raw.files), raw.fields).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        return _ingest(cfg, ctx, judged, raw)
    finally:
        judged.unpersist()


def _same_periods(ctx: Context, period: str) -> None:
    """A key is looked for among the rows of its own period: under another length of periods no event would be found again."""
    there = ctx.lake.dataset("events").head(1, columns=["period"])["period"].to_pylist() if ctx.lake.exists("events") else []
    if there and len(there[0]) != len(PERIODS[period]):
        raise ConfigError(
            f"events lie in periods such as {there[0]}: with data.period={period} each would be added a second time; "
            "keep data.period as it was, or build under another paths.root"
        )


def with_time(frame: DataFrame, files: Files) -> DataFrame:
    """Adds `event_time` (null where it cannot be read) and `needs_time`."""
    if files.time == "iso":
        time = F.when(F.col("time").rlike(ISO), F.col("time").try_cast("timestamp"))
    else:
        text = F.regexp_replace("time", r"\.0+$", "")  # so whole numbers are written of a column that has gaps
        number = text.try_cast("long")
        time = F.when(text.rlike(EPOCH), F.when(F.length(text) < 12, F.timestamp_seconds(number)).otherwise(F.timestamp_millis(number)))
    return frame.withColumns({"event_time": time, "needs_time": F.lit(files.order == "time")})


def judge(frame: DataFrame, names: tuple[str, ...]) -> DataFrame:
    """Types the fields, and names in `reason` the first rule that refuses the row (null: none does). `names`: the files' own."""
    typed = {
        "slot_row": F.col("row").try_cast("int"),
        "slot_col": F.col("col").try_cast("int"),
        "propensity_value": F.col("propensity").try_cast("double"),
        "rating_value": F.col("rating").try_cast("double"),
        "source_order": F.col("position").try_cast("long"),
    }
    judged = readers.with_reason(frame.withColumns(typed), _rules(), names)
    texts = ("kind", "user_id", "item_id", "time", "request_id", "source_file", "ingest_date", "event_time", "unknown")
    return judged.select(*texts, *typed, "reason", "kept", "record_hash")


def _rules() -> dict[str, Column]:
    """Rule -> true where it refuses the row, in order of precedence."""
    kind, shown = F.col("kind"), F.col("kind") == "impression"

    def wrong(text: str, refuses: Column) -> Column:
        return F.col(text).isNotNull() & F.coalesce(refuses, F.lit(True))

    return {
        "not_json": ~F.col("parsed") & F.col("source_file").contains(".json"),
        "bad_line": ~F.col("parsed"),
        "bad_mark": kind == sources.UNREADABLE,
        "missing_kind": kind.isNull(),
        "unknown_kind": ~kind.isin(*KINDS),
        "missing_user": F.col("user_id").isNull(),
        "bad_user": ~F.col("user_id").rlike(readers.IDENTIFIER),
        "missing_item": F.col("item_id").isNull(),
        "bad_item": ~F.col("item_id").rlike(readers.IDENTIFIER),
        "missing_time": F.col("needs_time") & F.col("time").isNull(),
        "bad_time": wrong("time", F.col("event_time") < F.lit(EARLIEST).cast("timestamp")),
        "future_date": F.to_date("event_time") > F.col("ingest_date"),
        "bad_request": ~F.col("request_id").rlike(readers.IDENTIFIER),
        "missing_request": shown & F.col("request_id").isNull(),
        "bad_slot": wrong("row", F.col("slot_row") < 1) | wrong("col", F.col("slot_col") < 1),
        "missing_slot": shown & (F.col("row").isNull() | F.col("col").isNull()),
        "bad_propensity": wrong("propensity", (F.col("propensity_value") <= 0) | (F.col("propensity_value") > 1)),
        "bad_rating": wrong("rating", (F.col("rating_value") < 0) | (F.col("rating_value") > 10)),
        "bad_position": wrong("position", F.col("source_order") < 0),
    }


def to_events(frame: DataFrame, source: str, period: str, fill: bool) -> DataFrame:
    """Accepted rows in the contract of `events`, equal events once (the first file's row stands).

    `fill`: days that are not known are those of the user's event before (else after).
    """
    parts = ("user_id", "item_id", "kind", "time", "request_id", "slot_row", "slot_col", "source_order")
    identity = F.sha2(F.concat_ws("\n", F.lit(source), *(F.coalesce(F.col(p).cast("string"), F.lit("")) for p in parts)), 256)
    kept = ("source_file", *parts, "event_time", "rating_value", "propensity_value", "ingest_date")
    once = (
        frame.select(F.substring(identity, 1, 32).alias("event_id"), F.struct(*kept).alias("row"))
        .groupBy("event_id")
        .agg(F.min("row").alias("row"))
        .select("event_id", "row.*")
    )
    order = Window.partitionBy("user_id").orderBy("source_order", "event_id")
    before, after = order.rowsBetween(Window.unboundedPreceding, 0), order.rowsBetween(0, Window.unboundedFollowing)
    known = F.to_date("event_time")
    if fill:  # elsewhere every event has a time: no window over all rows is needed
        known = F.coalesce(
            F.last(known, ignorenulls=True).over(before), F.first(known, ignorenulls=True).over(after), F.lit("1970-01-01").cast("date")
        )
    return (
        once.withColumns({"event_date": known, "day_known": F.col("event_time").isNotNull()})
        .withColumnsRenamed({"rating_value": "rating", "propensity_value": "propensity"})
        .withColumn("period", F.date_format("event_date", PERIODS[period]))
        .select(*schemas.get("events").names())
    )


def _ingest(cfg: Config, ctx: Context, judged: DataFrame, raw: sources.Raw) -> Result:
    with readers.reading():
        counts = (
            judged.groupBy("source_file", "reason").agg(F.count(F.lit(1)).alias("n"), F.sum(F.size("unknown")).alias("unknown")).collect()
        )
    rows_in, good = sum(c["n"] for c in counts), sum(c["n"] for c in counts if c["reason"] is None)
    reasons: dict[str, int] = {}
    for c in counts:
        if c["reason"] is not None:
            reasons[c["reason"]] = reasons.get(c["reason"], 0) + c["n"]
    empty = sorted(set(raw.names) - {c["source_file"] for c in counts}) if raw.files.format != "parquet" else []  # those name their parts
    detail: dict[str, Any] = {
        "files": len(raw.names),
        "reasons": dict(sorted(reasons.items())),
        "unknown_columns": {},
        "empty_files": empty,
    }
    if empty:
        ctx.log(f"events: no rows in {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}")
    if rows_in == 0:
        ctx.log("events: nothing to publish")
        return Result(detail=detail)
    unknown = any(c["unknown"] and c["unknown"] > 0 for c in counts)
    keep = partial(readers.keep_refused, ctx, judged.where(F.col("reason").isNotNull()), "events", detail["reasons"], rows_in)
    if readers.too_many(ctx, rows_in - good, rows_in):
        keep()  # which raises: nothing else is published
    good_rows, fill = judged.where(F.col("reason").isNull()), raw.files.order == "position"
    (distinct, added, lost), detail["unknown_columns"], _ = together(
        lambda: _accept(ctx, to_events(good_rows, cfg.data.source, cfg.data.period, fill), fill),
        lambda: readers.unknown_columns(judged) if unknown else {},
        keep,
    )
    if unknown:
        ctx.log(f"events: dropped columns that no contract declares: {detail['unknown_columns']}")
    known = distinct - added  # some of them, it may be, by a run at the same time
    refused, duplicates = rows_in - good, (good - distinct) + known
    if lost or known < 0:
        raise AuditError(
            f"events: {distinct} distinct rows accepted, {added} published, and {lost} of them are not there: rows were lost or made"
        )
    late = {"already_known": known, "equal_in_files": good - distinct}
    return Result(rows_in=rows_in, rows_out=added, quarantined=refused, duplicates=duplicates, detail={**detail, **late})


def _accept(ctx: Context, accepted: DataFrame, fill: bool) -> tuple[int, int, int]:
    """Publishes events. Returns how many there are, how many were new, and how many are not in the table afterwards.

    `fill`: a day that was filled in may be another today, and with it the period of an event that is there.
    """
    events = accepted.persist(StorageLevel.MEMORY_AND_DISK)
    try:
        by_period = {row["period"]: row["count"] for row in events.groupBy("period").count().collect()}
        added = publish(ctx, "events", events, moving=fill)
        there = read(ctx, "events") if fill else read(ctx, "events").where(F.col("period").isin(*by_period))
        return sum(by_period.values()), added, events.join(there.select("event_id"), on="event_id", how="left_anti").count()
    finally:
        events.unpersist()
