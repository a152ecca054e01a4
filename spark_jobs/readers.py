"""Reading what comes from outside: files under their root, lines as text, fields as text, refused rows.

Nothing is trusted before a rule has judged it: every field arrives as a string, and a file that cannot be read whole is an InputError
that names it. Used by the stages `events` and `items`.
"""

import contextlib
import datetime as dt
import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from gr2.context import Context
from gr2.errors import AuditError, InputError
from spark_jobs.publish import publish

IDENTIFIER = r'^[^\s{}\[\]"]{1,128}$'  # an object or a list in the place of an id does not match
PERSONAL = (
    r"(reviewer_?name|reviewer_?id|reviewer_?text|review_?text|first_?name|last_?name|full_?name|user_?name|e_?mail|phone|address|ip)"
)
RECORD = 500  # characters that quarantine keeps


def files(root: Path, patterns: list[str], required: bool = True) -> list[Path]:
    """Files under `root` that match, in order.

    Raises InputError for none at all, for one that leads out of the root, or for one of zero bytes.
    """
    inside, found = root.resolve(), sorted({p for pattern in patterns for p in root.glob(pattern)})
    for path in found:
        if not path.resolve().is_relative_to(inside):
            raise InputError(f"{path.relative_to(root)} leads out of the data folder: only files under it are read")
        if path.stat().st_size == 0:
            raise InputError(f"{path.relative_to(root)} has no bytes: not even a gzip header; fetch it again")
    if required and not found:
        raise InputError(f"{root} has no {' or '.join(patterns)}")
    return found


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turns Spark's failure to read a file (truncated, not gzip) into an InputError that names the file."""
    try:
        yield
    except (Py4JJavaError, PySparkException) as error:
        if broken := re.search(r"FAILED_READ_FILE\.\w+\] Encountered error while reading file (\S+?)\.?\s", str(error)):
            raise InputError(
                f"cannot read {Path(broken[1]).name} to its end (truncated, or not gzip): {broken[1]}; nothing published"
            ) from None
        raise


def header(path: Path) -> list[str]:
    """Column names of a CSV file. Raises InputError for a file without a readable first line."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.readline().rstrip("\r\n").split(",")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the header of {path.name}: {error}") from None


def lines(ctx: Context, paths: list[Path], depth: int) -> DataFrame:
    """Lines of text files as columns `record`, `source_file`: the file's last `depth` path components."""
    return ctx.spark.read.text([str(p) for p in paths]).select(
        F.col("value").alias("record"), F.substring_index("_metadata.file_path", "/", -depth).alias("source_file")
    )


def day_of_file(source_file: str = "source_file") -> Column:
    """The day of a path `day=YYYY-MM-DD/...`."""
    return F.regexp_extract(source_file, r"day=(\d{4}-\d{2}-\d{2})", 1).cast("date")


def json_fields(frame: DataFrame, known: tuple[str, ...]) -> DataFrame:
    """Adds `parsed` (whether the line is one JSON object), each known field as text (null where absent), and `unknown`: other field names.

    Parsing into a map of strings keeps names that nobody declared, so that they can be counted, and leaves judging types to the rules.
    """
    fields = F.when(F.col("record").rlike(r"\}\s*$"), F.from_json("record", "map<string,string>"))
    return frame.withColumn("fields", fields).select(
        "*",
        F.col("fields").isNotNull().alias("parsed"),
        *(F.col("fields")[name].alias(name) for name in known),
        F.array_except(F.map_keys("fields"), F.array(*(F.lit(k) for k in known))).alias("unknown"),
    )


def csv_fields(frame: DataFrame, columns: list[str], known: tuple[str, ...]) -> DataFrame:
    """As `json_fields` for lines of CSV under a header; a line with more or fewer fields is not parsed."""
    schema = ", ".join(f"`{c.replace('`', '')}` string" for c in [*columns, "_broken"])
    options = {"columnNameOfCorruptRecord": "_broken", "mode": "PERMISSIVE"}
    extra = [c for c in columns if c not in known]
    return (
        frame.where(F.col("record") != ",".join(columns))
        .withColumn("fields", F.from_csv("record", F.lit(schema), options))
        .select(
            "*",
            F.col("fields._broken").isNull().alias("parsed"),
            *((F.col(f"fields.`{k}`") if k in columns else F.lit(None).cast("string")).alias(k) for k in known),
            F.array(*(F.lit(c) for c in extra)).cast("array<string>").alias("unknown"),
        )
    )


def first_reason(rules: dict[str, Column]) -> Column:
    """The name of the first rule that refuses the row, or null. A rule is true where it refuses; unknown is not a refusal."""
    return F.coalesce(*(F.when(F.coalesce(refuses, F.lit(False)), F.lit(name)) for name, refuses in rules.items()))


def quarantined(frame: DataFrame, target: str) -> DataFrame:
    """Refused rows (columns record, source_file, reason, ingest_date) in the contract of `quarantine`, equal ones once."""
    safe = F.regexp_replace("record", rf'(?i)"{PERSONAL}"\s*:\s*("([^"\\]|\\.)*"?|[^,}}\]]*)', '"$1":"removed"')
    locator = F.substring(F.sha2("record", 256), 1, 16)
    identity = F.sha2(F.concat_ws("\n", "source_file", F.lit(target), "reason", "record"), 256)
    return (
        frame.groupBy(F.substring(identity, 1, 32).alias("quarantine_id"), "reason", "source_file", "record")
        .agg(F.min("ingest_date").alias("ingest_date"))
        .select(
            "quarantine_id",
            F.lit(target).alias("target"),
            "reason",
            "source_file",
            locator.alias("locator"),
            F.substring(safe, 1, RECORD).alias("record"),
            "ingest_date",
        )
    )


def keep_refused(ctx: Context, frame: DataFrame, target: str, reasons: dict[str, int], rows_in: int) -> None:
    """Publishes refused rows, then fails the gate if there are more than `data.max_quarantine_share` of them: the evidence stays.

    Raises AuditError with the reasons and their counts.
    """
    bad = sum(reasons.values())
    if bad or not ctx.lake.exists("quarantine"):
        publish(ctx, "quarantine", quarantined(frame, target))
    limit = ctx.cfg.data.max_quarantine_share
    if bad > limit * rows_in:
        raise AuditError(
            f"{target}: {bad} of {rows_in} rows refused, more than data.max_quarantine_share = {limit}: {reasons}; "
            "nothing published; the rows are in table quarantine"
        )


def known_days(ctx: Context) -> list[dt.date]:
    """The days to read: the one of --date, else all up to the processed day (simulated), or all that have a folder.

    Raises InputError for a folder that names no day, or where there is none to read.
    """
    if ctx.date:
        return [ctx.date]
    if ctx.cfg.data.source == "jsonl":
        days = [_day_of(folder.name) for folder in sorted(ctx.raw_path().glob("day=*"))]
        if not (due := [day for day in days if day <= ctx.day]):
            raise InputError(f"{ctx.raw_path()} has no day=*/events.jsonl.gz up to {ctx.day}")
        return due
    start = dt.date.fromisoformat(ctx.cfg.simulator.start)
    return [start + dt.timedelta(days=i) for i in range((ctx.day - start).days + 1)]


def _day_of(folder: str) -> dt.date:
    """The day of `day=YYYY-MM-DD`."""
    with contextlib.suppress(ValueError):
        day = dt.date.fromisoformat(folder.removeprefix("day="))
        if folder == f"day={day}":
            return day
    raise InputError(f"{folder} is not a folder of a day: name it day=YYYY-MM-DD")
