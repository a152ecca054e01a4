"""Stage `events`: raw logs to one row an event.

Reads   raw files: a folder a day of JSON lines (simulated ones are written first where they are missing), or the Amazon 2014 format.
Writes  `events` (one user-item event; event_id), `quarantine` (one refused row; quarantine_id).
Rerun   both tables are insert-only on a key that is a hash of content: rows that are there are left as they are.
Run     gr2 stage events --profile demo [--date 2026-01-05]

Rows in = new rows published + duplicates + rows refused; the sum is checked from independent counts (DESIGN contract 5).
"""

import time
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

import schemas
from gr2 import simulate
from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import AuditError, InputError
from spark_jobs import readers
from spark_jobs.publish import publish
from spark_jobs.session import read

FIELDS = ("kind", "user_id", "item_id", "time", "request_id", "row", "col", "propensity", "rating", "position")
KINDS = ("view", "click", "purchase", "review", "impression")
ISO = r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?(Z|[+-]\d{2}:?\d{2})$"  # a zone is required
EARLIEST = "1990-01-01"  # before: a clock that was never set
PERIODS = {"day": "yyyy-MM-dd", "month": "yyyy-MM", "year": "yyyy"}


def run(cfg: Config, ctx: Context) -> Result:
    """Ingests the day of --date, or all there is.

    Raises InputError for an unreadable file, AuditError for a broken sum or too many refusals.
    """
    if cfg.data.source == "simulator":
        started = time.monotonic()
        written = simulate.write_days(cfg.simulator, cfg.seed, ctx.raw_path(), readers.known_days(ctx), ctx.root / "truth")
        ctx.log(f"events: simulated {len(written)} days in {time.monotonic() - started:.1f} s")
    lines, names = by_day(ctx) if cfg.data.dated else amazon2014(ctx)
    judged = judge(lines).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        return _ingest(cfg, ctx, judged, names)
    finally:
        judged.unpersist()


def by_day(ctx: Context) -> tuple[DataFrame, list[str]]:
    """Log lines of the days to read with their fields as text, and the files' names. Raises InputError for no such day."""
    root = ctx.raw_path()
    paths = readers.files(root, [f"day={d}/events.jsonl.gz" for d in readers.known_days(ctx)])
    frame = readers.json_fields(readers.lines(ctx, paths, depth=2), FIELDS)
    timed = F.when(F.col("time").rlike(ISO), F.col("time").try_cast("timestamp"))
    ready = frame.withColumns({"event_time": timed, "needs_time": F.lit(True), "ingest_date": readers.day_of_file()})
    return ready, [str(p.relative_to(root)) for p in paths]


def amazon2014(ctx: Context) -> tuple[DataFrame, list[str]]:
    """Reviews from `interactions.csv.gz` (user_id,item_id,position,timestamp in unix seconds), or, without it, from `sequences.txt.gz`."""
    root = ctx.raw_path()
    paths = readers.files(root, ["interactions.csv.gz"], required=False)
    if paths:
        columns = readers.header(paths[0])
        if missing := {"user_id", "item_id", "position"} - set(columns):
            raise InputError(f"interactions.csv.gz lacks the columns {sorted(missing)}; its header is {','.join(columns)}")
        known = tuple("timestamp" if f == "time" else f for f in FIELDS if f != "kind")
        frame = readers.csv_fields(readers.lines(ctx, paths, depth=1), columns, known).withColumnRenamed("timestamp", "time")
    else:
        paths = readers.files(root, ["interactions.csv.gz", "sequences.txt.gz"])
        frame = _sequences(readers.lines(ctx, paths, depth=1))
    seconds = F.when(F.col("time").rlike(r"^\d{1,12}$"), F.timestamp_seconds(F.col("time").cast("long")))
    ready = frame.withColumns({"kind": F.lit("review"), "event_time": seconds, "needs_time": F.lit(False), "ingest_date": F.lit(ctx.day)})
    return ready, [p.name for p in paths]


def _sequences(lines: DataFrame) -> DataFrame:
    """`user item item ...`, oldest first: one row an item; a line without items is one row that is not parsed."""
    words = F.split(F.trim("record"), r"\s+")
    empty = {f: F.lit(None).cast("string") for f in ("time", "request_id", "row", "col", "propensity", "rating")}
    return (
        lines.withColumn("words", words)
        .select("record", "source_file", "words", F.posexplode_outer(F.expr("slice(words, 2, size(words))")).alias("place", "item_id"))
        .withColumns(
            {
                "parsed": F.col("item_id").isNotNull(),
                "user_id": F.col("words")[0],
                "position": (F.col("place") + 1).cast("string"),
                "record": F.when(F.col("item_id").isNull(), F.col("record")).otherwise(
                    F.concat_ws(" ", F.col("words")[0], (F.col("place") + 1).cast("string"), "item_id")
                ),
                "unknown": F.array().cast("array<string>"),
                **empty,
            }
        )
    )


def judge(frame: DataFrame) -> DataFrame:
    """Types the fields, and names in `reason` the first rule that refuses the row (null: none does)."""
    typed = {
        "slot_row": F.col("row").try_cast("int"),
        "slot_col": F.col("col").try_cast("int"),
        "propensity_value": F.col("propensity").try_cast("double"),
        "rating_value": F.col("rating").try_cast("double"),
        "source_order": F.col("position").try_cast("long"),
    }
    judged = frame.withColumns(typed).withColumn("reason", readers.first_reason(_rules()))
    texts = ("kind", "user_id", "item_id", "time", "request_id", "record", "source_file", "ingest_date", "event_time", "unknown", "reason")
    return judged.select(*texts, *typed)


def _rules() -> dict[str, Column]:
    """Rule -> true where it refuses the row, in order of precedence."""
    kind, shown = F.col("kind"), F.col("kind") == "impression"

    def wrong(text: str, refuses: Column) -> Column:
        return F.col(text).isNotNull() & F.coalesce(refuses, F.lit(True))

    return {
        "not_json": ~F.col("parsed") & F.col("source_file").contains(".json"),
        "bad_line": ~F.col("parsed"),
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


def to_events(frame: DataFrame, source: str, period: str) -> DataFrame:
    """Accepted rows in the contract of `events`, equal events once (the first file's row stands)."""
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
    if source == "amazon2014":  # elsewhere every event has a time: no window over all rows is needed
        known = F.coalesce(
            F.last(known, ignorenulls=True).over(before), F.first(known, ignorenulls=True).over(after), F.lit("1970-01-01").cast("date")
        )
    return (
        once.withColumns({"event_date": known, "day_known": F.col("event_time").isNotNull()})
        .withColumnsRenamed({"rating_value": "rating", "propensity_value": "propensity"})
        .withColumn("period", F.date_format("event_date", PERIODS[period]))
        .select(*schemas.get("events").names())
    )


def _ingest(cfg: Config, ctx: Context, judged: DataFrame, names: list[str]) -> Result:
    with readers.reading():
        counts = (
            judged.groupBy("source_file", "reason").agg(F.count(F.lit(1)).alias("n"), F.sum(F.size("unknown")).alias("unknown")).collect()
        )
    rows_in, good = sum(c["n"] for c in counts), sum(c["n"] for c in counts if c["reason"] is None)
    reasons: dict[str, int] = {}
    for c in counts:
        if c["reason"] is not None:
            reasons[c["reason"]] = reasons.get(c["reason"], 0) + c["n"]
    empty = sorted(set(names) - {c["source_file"] for c in counts})
    detail: dict[str, Any] = {"files": len(names), "reasons": dict(sorted(reasons.items())), "unknown_columns": {}, "empty_files": empty}
    if empty:
        ctx.log(f"events: no rows in {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}")
    if rows_in == 0:
        ctx.log("events: nothing to publish")
        return Result(detail=detail)
    if any(c["unknown"] and c["unknown"] > 0 for c in counts):
        named = (
            judged.select(F.explode("unknown").alias("name")).groupBy("name").count().orderBy(F.desc("count"), "name").limit(20).collect()
        )
        detail["unknown_columns"] = {r["name"]: r["count"] for r in named}
        ctx.log(f"events: dropped columns that no contract declares: {detail['unknown_columns']}")
    readers.keep_refused(ctx, judged.where(F.col("reason").isNotNull()), "events", detail["reasons"], rows_in)

    events = to_events(judged.where(F.col("reason").isNull()), cfg.data.source, cfg.data.period).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        distinct = events.count()
        known = 0
        if ctx.lake.exists("events"):
            known = events.join(read(ctx, "events").select("event_id"), on="event_id", how="left_semi").count()
        added = publish(ctx, "events", events)
    finally:
        events.unpersist()
    refused, duplicates = rows_in - good, (good - distinct) + known
    if rows_in != added + duplicates + refused:
        raise AuditError(
            f"events: {rows_in} rows read, but {added} published + {duplicates} duplicates + {refused} refused: rows were lost or made"
        )
    late = {"already_known": known, "equal_in_files": good - distinct}
    return Result(rows_in=rows_in, rows_out=added, quarantined=refused, duplicates=duplicates, detail={**detail, **late})
