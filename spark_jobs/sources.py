"""Raw formats: what files a source has, and how their rows become text fields under the contract's names. Not a stage.

    raw = open_source(ctx, "events", FIELDS)         # or "items"
    raw.frame                                        # record, source_file, parsed, fields, unknown, ingest_date, and each field as text

A source is data: patterns, a format, and which field is which (`gr2.sections.Files`). A profile can replace either half of one, or name its
own with data.source = files. Nothing is judged here; the rules of `events` and `items` do that.
"""

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, MapType, StructType, TimestampType

from gr2.config import Data
from gr2.context import Context
from gr2.errors import InputError
from gr2.sections import Files
from spark_jobs import readers

MOST = 1_000_000  # items of one sequence
LONGEST = 1_000_000  # characters of a Python literal: a longer line is refused, not parsed
UNREADABLE = "unreadable"  # kind of a row whose mark of a click or a purchase cannot be read
STAMP, REVIEWED = {"time": ("timestamp",)}, {"kind": "review"}
REVIEW = Files(
    files=("*.json.gz", "*.jsonl.gz", "*.json", "*.jsonl", "!meta_*"),
    columns={
        "user_id": ("reviewerID", "user_id"), "item_id": ("parent_asin", "asin"), "time": ("unixReviewTime", "timestamp"),
        "rating": ("overall", "rating"),
    },
    constants=REVIEWED, time="epoch",
)  # fmt: skip
PRODUCT = Files(
    files=("meta_*.json.gz", "meta_*.jsonl.gz", "meta_*.json", "meta_*.jsonl"),
    columns={"item_id": ("parent_asin", "asin"), "brand": ("brand", "store"), "categories": ("category", "categories")},
    loose_price=True,
)  # fmt: skip
# source -> what -> the ways it may be stored: the first whose files are there counts.
SOURCES: dict[str, dict[str, tuple[Files, ...]]] = {
    "jsonl": {"events": (Files(files=("day=*/events.jsonl.gz",)),), "items": (Files(files=("day=*/items.jsonl.gz",)),)},
    "amazon2014": {
        "events": (
            Files(
                files=("interactions.csv.gz", "interactions.csv"), format="csv", columns=STAMP, constants=REVIEWED, time="epoch",
                order="position",
            ),
            Files(
                files=("sequences.txt.gz", "sequences.txt", "sequences*.jsonl.gz"), format="sequences", constants=REVIEWED,
                order="position",
            ),
        ),
        "items": (Files(files=("items.jsonl.gz", "items.jsonl"), loose_price=True),),
    },
    "amazon_reviews": {"events": (REVIEW,), "items": (PRODUCT,)},
    "open_bandit": {  # one campaign: the campaigns number their items alike; of a folder with several, name the files in data.events
        "events": (
            Files(
                files=("*.csv.gz", "*.csv", "!*item_context*"), format="csv",
                columns={"time": ("timestamp",), "col": ("position",), "position": (), "propensity": ("propensity_score",)},
                constants={"kind": "impression", "row": "1"}, user_of=tuple(f"user_feature_{n}" for n in range(4)),
                clicked="click", request_of_row=True,
            ),
        ),
        "items": (Files(files=("*item_context.csv.gz", "*item_context.csv"), format="csv", columns={"text_id": ("item_feature_1",)}),),
    },
}  # fmt: skip
SOURCES["simulator"] = SOURCES["jsonl"]


@dataclass(frozen=True)
class Raw:
    """Rows of a source as text. `names`: the files, relative to the data folder; `dated`: they come in a folder a day; `fields`: how the
    files call what a contract declares."""

    frame: DataFrame
    names: list[str]
    fields: tuple[str, ...]
    files: Files
    dated: bool


def open_source(ctx: Context, what: str, known: tuple[str, ...], days: bool = False) -> Raw:
    """Finds and reads the files of `what` (events or items). `days`: of folders a day, only those of the run (`readers.known_days`).

    Raises InputError for no file, one that leads out of the data folder, or one without the columns that a row needs.
    """
    root, ways = ctx.raw_path(), declared(ctx.cfg.data, what)
    paths: list[Path] = []
    for files in ways:
        patterns = files.files
        dated = bool(patterns) and all(p.startswith("day=") for p in patterns)
        if dated and days:
            patterns = tuple(f"day={day}/{p.partition('/')[2]}" for day in readers.known_days(ctx) for p in patterns)
        if paths := readers.files(root, patterns, folders=files.format == "delta"):
            break
    wanted = [p for way in ways for p in way.files if not p.startswith("!")]
    if wanted and not paths:  # with nothing wanted there is a log without a catalogue: its items are those that events name
        raise InputError(f"{root} has no {' or '.join(wanted)}")
    if what == "events" and files.format == "csv":
        _require(files, paths)
    fields = declared_names(files, known)
    frame = _named(_rows(ctx, files, paths), files, known, fields)
    day = F.regexp_extract("source_file", r"day=(\d{4}-\d{2}-\d{2})", 1).cast("date") if dated else F.lit(ctx.day)
    return Raw(frame.withColumn("ingest_date", day), [str(p.relative_to(root)) for p in paths], fields, files, dated)


def declared(data: Data, what: str) -> tuple[Files, ...]:
    """The profile's own declaration, or the source's."""
    own: Files = getattr(data, what)
    return (own,) if own.files or data.source == "files" else SOURCES[data.source][what]


def _require(files: Files, paths: list[Path]) -> None:
    """What every event needs must be a column of every CSV file."""
    needed = [() if files.user_of else named(files, "user_id"), named(files, "item_id"), named(files, files.order)]
    for path in paths:
        there = readers.header(path)
        if missing := [" or ".join(names) for names in needed if names and not set(there) & set(names)]:
            raise InputError(f"{path.name} lacks the columns {sorted(missing)}; its header is {','.join(there)}")


def named(files: Files, field: str) -> tuple[str, ...]:
    """Names under which the files may hold a field of the contract."""
    return files.columns.get(field, (field,))


def declared_names(files: Files, known: tuple[str, ...]) -> tuple[str, ...]:
    """Every name under which the files hold something that is read."""
    marks = [name for name in (files.clicked, files.purchased) if name]
    read = [name for field in known if field not in files.constants for name in named(files, field)]
    return tuple(dict.fromkeys([*marks, *files.user_of, *read]))


def _named(rows: DataFrame, files: Files, known: tuple[str, ...], fields: tuple[str, ...]) -> DataFrame:
    """Adds each known field as text, under the contract's name, and `unknown`: the names that nothing declares."""

    def value(field: str) -> Column:
        if field in files.constants:
            return F.lit(files.constants[field])
        if field == "user_id" and files.user_of:
            return F.substring(F.sha2(F.concat_ws("\n", *(F.col("fields")[name] for name in files.user_of)), 256), 1, 32)
        if field == "request_id" and files.request_of_row:
            return F.substring(F.sha2(F.concat_ws("\n", "source_file", "record"), 256), 1, 32)
        return F.coalesce(*(F.col("fields")[name] for name in named(files, field)), F.lit(None).cast("string"))

    plain = rows.select("*", F.array_except(F.map_keys("fields"), F.array(*(F.lit(n) for n in fields))).alias("unknown"))
    found = plain.select("*", *(value(field).alias(field) for field in known))
    happened = {"click": files.clicked, "purchase": files.purchased}
    marks = {kind: F.nullif(F.trim(F.col("fields")[name]), F.lit("")) for kind, name in happened.items() if name}
    if not marks:
        return found
    unread = reduce(Column.__or__, (mark.isNotNull() & truth_of(mark).isNull() for mark in marks.values()))
    kinds = F.array_compact(F.array(F.coalesce("kind", F.lit("")), *(F.when(truth_of(mark), F.lit(kind)) for kind, mark in marks.items())))
    return found.withColumn("kind", F.explode(F.when(unread, F.array(F.lit(UNREADABLE))).otherwise(kinds)))


def truth_of(mark: Column) -> Column:
    """A text as true or false, however it is spelled (1, 1.0, TRUE, yes); null where it is neither."""
    number = mark.try_cast("double")
    return F.coalesce(mark.try_cast("boolean"), F.when(number.isin(0.0, 1.0), number == 1.0))


# -- rows: record, source_file, parsed, fields (a map of texts) ---------------------------------------------------------


def _rows(ctx: Context, files: Files, paths: list[Path]) -> DataFrame:
    if not paths:
        nothing = "record string, source_file string, parsed boolean, fields map<string,string>"
        return ctx.spark.createDataFrame([], nothing)
    depth = len(paths[0].relative_to(ctx.raw_path()).parts)
    if files.format in ("parquet", "delta"):
        return _columnar(ctx, files.format, paths, depth)
    if files.format == "csv":
        groups: dict[tuple[str, ...], list[Path]] = {}
        for path in paths:
            groups.setdefault(tuple(readers.header(path)), []).append(path)
        parts = [_csv(readers.lines(ctx, same, depth), list(columns)) for columns, same in groups.items()]
    elif files.format == "sequences":
        parts = [_sequences(readers.lines(ctx, paths, depth))]
    else:
        literal = [p for p in paths if _opening(p).startswith("{'")]
        texts = [(literal, _literals), ([p for p in paths if p not in literal], None)]
        parts = [_json(readers.lines(ctx, same, depth), rewritten) for same, rewritten in texts if same]
    return reduce(DataFrame.unionByName, parts)


def _opening(path: Path) -> str:
    """The first two characters of a text file; none where it cannot be read: reading it whole names the failure."""
    try:
        with readers.open_text(path) as file:
            return file.read(2)
    except (OSError, EOFError, UnicodeDecodeError):
        return ""


def _json(lines: DataFrame, rewritten: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]] | None) -> DataFrame:
    """Parsing into a map of texts keeps names that nobody declared, so that they can be counted, and leaves judging types to the rules."""
    if rewritten:
        lines = lines.mapInArrow(rewritten, "record string, source_file string, json string")
    text = F.col("json") if rewritten else F.col("record")
    fields = F.when(text.rlike(r"\}\s*$"), F.from_json(text, "map<string,string>"))
    return lines.select("record", "source_file", fields.isNotNull().alias("parsed"), fields.alias("fields"))


def _literals(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Lines that are Python dict literals (the Amazon metadata of 2014), as JSON; null where one is none. The only reader in Python."""

    def as_json(text: str) -> str | None:
        try:
            value = ast.literal_eval(text) if len(text) <= LONGEST else None
            return json.dumps(value) if isinstance(value, dict) else None
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return None

    for batch in batches:
        yield batch.append_column("json", pa.array([as_json(text or "") for text in batch["record"].to_pylist()], pa.string()))


def _csv(lines: DataFrame, columns: list[str]) -> DataFrame:
    """Lines under a header; one with more or fewer fields is not parsed. Quoted fields may hold commas, not line breaks."""
    places = [f"c{n}" for n in range(len(columns))]
    schema = ", ".join(f"{place} string" for place in [*places, "broken"])
    options = {"columnNameOfCorruptRecord": "broken", "mode": "PERMISSIVE"}
    cells = lines.where(F.col("record") != ",".join(columns)).withColumn("cells", F.from_csv("record", F.lit(schema), options))
    pairs = F.create_map(*(part for c, place in zip(columns, places, strict=True) for part in (F.lit(c), F.col(f"cells.{place}"))))
    return cells.select("record", "source_file", F.col("cells.broken").isNull().alias("parsed"), pairs.alias("fields"))


def _columnar(ctx: Context, kind: str, paths: list[Path], depth: int) -> DataFrame:
    """Rows of Parquet files or Delta tables, values as JSON has them; times are UTC. Schemas of several files are merged."""
    if kind == "delta":
        frames = [
            ctx.spark.read.format("delta").load(str(p)).withColumn("source_file", F.lit(str(p.relative_to(ctx.raw_path())))) for p in paths
        ]
        frame = reduce(partial(DataFrame.unionByName, allowMissingColumns=True), frames)
    else:
        frame = ctx.spark.read.option("mergeSchema", "true").parquet(*map(str, paths))
        frame = frame.withColumn("source_file", F.substring_index("_metadata.file_path", "/", -depth))
    names = [name for name in frame.columns if name != "source_file"]

    def text(name: str) -> Column:
        kind, column = frame.schema[name].dataType, F.col(f"`{name}`")
        if isinstance(kind, (ArrayType, MapType, StructType)):
            return F.to_json(column)
        return F.date_format(column, "yyyy-MM-dd'T'HH:mm:ss.SSSSSS'Z'") if isinstance(kind, TimestampType) else column.cast("string")

    pairs = F.create_map(*(part for name in names for part in (F.lit(name), text(name))))
    whole = F.to_json(F.struct(*(F.col(f"`{name}`") for name in names)))
    return frame.select(whole.alias("record"), "source_file", F.lit(True).alias("parsed"), pairs.alias("fields"))


def _sequences(lines: DataFrame) -> DataFrame:
    """`user item item ...`, or `{"user_id": ..., "items": [...]}`, oldest first: one row an item; a line without items is not parsed."""
    told = F.from_json("record", "user_id string, items array<string>")
    words = F.split(F.trim("record"), r"\s+")
    written = F.col("record").startswith("{")
    read = lines.select(
        "record",
        "source_file",
        F.when(written, told["user_id"]).otherwise(words[0]).alias("user"),
        F.when(written, told["items"]).otherwise(F.slice(words, 2, MOST)).alias("items"),
    )
    each = read.select("record", "source_file", "user", F.posexplode_outer("items").alias("place", "item"))
    position = (F.col("place") + 1).cast("string")
    pairs = F.create_map(F.lit("user_id"), F.col("user"), F.lit("item_id"), F.col("item"), F.lit("position"), position)
    return each.select(
        F.when(F.col("item").isNull(), F.col("record")).otherwise(F.concat_ws(" ", "user", position, "item")).alias("record"),
        "source_file",
        F.col("item").isNotNull().alias("parsed"),
        pairs.alias("fields"),
    )
