"""Reading what comes from outside: files under their root, lines as text, days, refused rows.

Nothing is trusted before a rule has judged it: every field arrives as a string, and a file that cannot be read whole is an InputError
that names it. Used by `sources.py` and the stages `events` and `items`.
"""

import contextlib
import datetime as dt
import fnmatch
import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from gr2.context import Context
from gr2.errors import AuditError, InputError
from spark_jobs.publish import publish

IDENTIFIER = r'^[^\s{}\[\]"]{1,128}$'  # an object or a list in the place of an id does not match
RECORD = 500  # characters that quarantine keeps


def files(root: Path, patterns: Sequence[str], folders: bool = False) -> list[Path]:
    """Files (or folders, for tables) under `root` that match a pattern and none that begins with `!`, in order; none is no error here.

    Raises InputError for one that leads out of the root, and for one of zero bytes.
    """
    inside, left_out = root.resolve(), [p[1:] for p in patterns if p.startswith("!")]
    found = sorted({p for pattern in patterns if not pattern.startswith("!") for p in root.glob(pattern) if p.is_dir() == folders})
    kept = [p for p in found if not any(fnmatch.fnmatch(p.name, pattern) for pattern in left_out)]
    for path in kept:
        if not path.resolve().is_relative_to(inside):
            raise InputError(f"{path.relative_to(root)} leads out of the data folder: only files under it are read")
        if not folders and path.stat().st_size == 0:
            raise InputError(f"{path.relative_to(root)} has no bytes: not even a gzip header; fetch it again")
    return kept


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


def open_text(path: Path) -> IO[str]:
    """A text file, gzipped or not, for reading its beginning here."""
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def header(path: Path) -> list[str]:
    """Column names of a CSV file. Raises InputError for a file without a readable first line."""
    try:
        with open_text(path) as file:
            return file.readline().rstrip("\r\n").split(",")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the header of {path.name}: {error}") from None


def lines(ctx: Context, paths: list[Path], depth: int) -> DataFrame:
    """Lines of text files as columns `record`, `source_file`: the file's last `depth` path components."""
    return ctx.spark.read.text([str(p) for p in paths]).select(
        F.col("value").alias("record"), F.substring_index("_metadata.file_path", "/", -depth).alias("source_file")
    )


def with_reason(frame: DataFrame, rules: dict[str, Column], names: Sequence[str]) -> DataFrame:
    """Adds `reason`, and for refused rows what is kept of them: `record_hash`, and `kept`, the fields that a contract declares.

    `names`: how the files call those fields. Of a line that could not be parsed, the pairs `"name": value` that can be told are kept: what
    else stands in it may be personal.
    """
    first = (F.when(F.coalesce(refuses, F.lit(False)), F.lit(name)) for name, refuses in rules.items())  # unknown is not a refusal
    judged = frame.withColumn("reason", F.coalesce(*first))
    refused, known = F.col("reason").isNotNull(), "|".join(re.escape(name) for name in names)
    fields = F.to_json(F.map_filter("fields", lambda name, value: value.isNotNull() & name.isin(*names)))
    pairs = F.regexp_extract_all("record", F.lit(rf"""["'](?:{known})["']\s*:\s*(?:"[^"]*"?|'[^']*'?|[^,"'}}\]]*)"""), F.lit(0))
    text = F.substring(F.when(F.col("parsed"), fields).otherwise(F.array_join(pairs, ", ")), 1, RECORD)
    return judged.withColumns({"kept": F.when(refused, text), "record_hash": F.when(refused, F.sha2("record", 256))})


def quarantined(frame: DataFrame, target: str) -> DataFrame:
    """Refused rows (columns kept, record_hash, source_file, reason, ingest_date) in the contract of `quarantine`, equal ones once."""
    identity = F.sha2(F.concat_ws("\n", "source_file", F.lit(target), "reason", "record_hash"), 256)
    return (
        frame.groupBy(F.substring(identity, 1, 32).alias("quarantine_id"), "reason", "source_file", "record_hash", "kept")
        .agg(F.min("ingest_date").alias("ingest_date"))
        .select(
            "quarantine_id",
            F.lit(target).alias("target"),
            "reason",
            "source_file",
            F.substring("record_hash", 1, 16).alias("locator"),
            F.coalesce("kept", F.lit("")).alias("record"),
            "ingest_date",
        )
    )


def unknown_columns(judged: DataFrame) -> dict[str, int]:
    """Rows by name of a field that no contract declares, the twenty most frequent: they are dropped, and counted."""
    named = judged.select(F.explode("unknown").alias("name")).groupBy("name").count().orderBy(F.desc("count"), "name").limit(20).collect()
    return {row["name"]: row["count"] for row in named}


def too_many(ctx: Context, refused: int, rows_in: int) -> bool:
    """Whether more than `data.max_quarantine_share` of the rows were refused."""
    return refused > ctx.cfg.data.max_quarantine_share * rows_in


def keep_refused(ctx: Context, frame: DataFrame, target: str, reasons: dict[str, int], rows_in: int) -> None:
    """Publishes refused rows, then fails the gate if there are more than `data.max_quarantine_share` of them: the evidence stays.

    Raises AuditError with the reasons and their counts.
    """
    bad = sum(reasons.values())
    if bad or not ctx.lake.exists("quarantine"):
        publish(ctx, "quarantine", quarantined(frame, target))
    if too_many(ctx, bad, rows_in):
        raise AuditError(
            f"{target}: {bad} of {rows_in} rows refused, more than data.max_quarantine_share = "
            f"{ctx.cfg.data.max_quarantine_share}: {reasons}; "
            "nothing published; the rows are in table quarantine: `gr2 sql --latest`, since a release is from before"
        )


def known_days(ctx: Context) -> list[dt.date]:
    """The days to read: the one of --date, else all up to the processed day (simulated), or all that have a folder.

    Raises InputError for a folder that names no day, or where there is none to read.
    """
    if ctx.date:
        return [ctx.date]
    if ctx.cfg.data.source == "simulator":
        start = dt.date.fromisoformat(ctx.cfg.simulator.start)
        return [start + dt.timedelta(days=i) for i in range((ctx.day - start).days + 1)]
    days = [_day_of(folder.name) for folder in sorted(ctx.raw_path().glob("day=*"))]
    if not (due := [day for day in days if day <= ctx.day]):
        raise InputError(f"{ctx.raw_path()} has no day=YYYY-MM-DD up to {ctx.day}")
    return due


def _day_of(folder: str) -> dt.date:
    """The day of `day=YYYY-MM-DD`."""
    with contextlib.suppress(ValueError):
        day = dt.date.fromisoformat(folder.removeprefix("day="))
        if folder == f"day={day}":
            return day
    raise InputError(f"{folder} is not a folder of a day: name it day=YYYY-MM-DD")
