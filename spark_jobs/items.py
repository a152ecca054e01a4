"""Stage `items`: the catalogue, with the text that models read.

Reads   `items.jsonl.gz` of every day that is there, or of the Amazon 2014 folder; `events`, for items that have no metadata.
Writes  `items` (one item; item_id), `quarantine` (one refused row; quarantine_id).
Rerun   the whole table is replaced; equal content makes no new version.
Run     gr2 stage items --profile demo
"""

from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

import schemas
from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import AuditError
from spark_jobs import readers
from spark_jobs.publish import publish
from spark_jobs.session import read

FIELDS = ("item_id", "title", "brand", "categories", "price", "text_id", "since", "asin", "attribute_ids")
TITLE = 300  # characters kept
GLUE = "\u0001"  # joins categories while their entities are resolved


def run(cfg: Config, ctx: Context) -> Result:
    """Builds the catalogue. Raises InputError for an unreadable file, AuditError if too many rows were refused or the sum is broken."""
    root, dated = ctx.raw_path(), cfg.data.dated
    paths = readers.files(root, ["day=*/items.jsonl.gz"] if dated else ["items.jsonl.gz"])
    lines = readers.json_fields(readers.lines(ctx, paths, depth=2 if dated else 1), FIELDS).drop("fields")
    day = readers.day_of_file() if dated else F.lit(ctx.day)
    judged = judge(lines.withColumn("ingest_date", day)).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        with readers.reading():
            counts = {r["reason"]: r["count"] for r in judged.groupBy("reason").count().collect()}
        rows_in, good = sum(counts.values()), counts.pop(None, 0)
        reasons = dict(sorted(counts.items()))
        readers.keep_refused(ctx, judged.where(F.col("reason").isNotNull()), "items", reasons, rows_in)
        described = to_items(judged.where(F.col("reason").isNull()), known_days=dated).persist(StorageLevel.MEMORY_AND_DISK)
        distinct = described.count()
        bare = bare_items(read(ctx, "events"), described, known_days=dated)
        published = publish(ctx, "items", described.unionByName(bare))
        without_text = len(ctx.lake.read("items", ["item_id"], has_text=False))
        described.unpersist()
    finally:
        judged.unpersist()
    if published < distinct:
        raise AuditError(f"items: {distinct} items were read, but {published} published: rows were lost")
    detail = {"reasons": reasons, "without_metadata": published - distinct, "without_text": without_text}
    ctx.log(f"items: {published - distinct} only in events, {without_text} without text")
    return Result(rows_in=rows_in, rows_out=published, quarantined=rows_in - good, duplicates=good - distinct, detail=detail)


def judge(frame: DataFrame) -> DataFrame:
    """Types the fields, and names in `reason` the first rule that refuses the row."""
    price, categories = F.col("price").try_cast("double"), F.from_json("categories", "array<string>")
    infinite = F.abs(price) == float("inf")
    rules = {
        "not_json": ~F.col("parsed"),
        "missing_item": F.col("item_id").isNull(),
        "bad_item": ~F.col("item_id").rlike(readers.IDENTIFIER),
        "bad_title": _container("title"),
        "bad_brand": _container("brand"),
        "bad_categories": F.col("categories").isNotNull() & categories.isNull(),
        "bad_price": F.col("price").isNotNull() & F.coalesce((price < 0) | F.isnan(price) | infinite, F.lit(True)),
    }
    return frame.withColumns({"price_value": price, "category_list": categories, "reason": readers.first_reason(rules)})


def _container(name: str) -> Column:
    """Whether a field that must be text holds an object or a list."""
    return F.from_json(name, "map<string,string>").isNotNull() | F.from_json(name, "array<string>").isNotNull()


def resolved(text: Column) -> Column:
    """HTML entities resolved by the library that Spark ships, white space made single, empty as null. Native: no Python worker."""
    method = F.reflect(F.lit("org.apache.commons.text.StringEscapeUtils"), F.lit("unescapeHtml4"), F.coalesce(text, F.lit("")))
    plain = F.trim(F.regexp_replace(F.regexp_replace(method, "&apos;", "'"), r"[\s\u00a0]+", " "))
    return F.when(F.length(plain) > 0, plain)


def _nothing() -> Column:
    """An empty list whose elements are known not to be null (a cast of `array()` would leave that open)."""
    return F.slice(F.array(F.lit("")), 1, 0)


def to_items(frame: DataFrame, known_days: bool) -> DataFrame:
    """Accepted rows in the contract of `items`; of several rows of one item the latest file's stands."""
    latest = F.struct("source_file", "record", "title", "brand", "category_list", "price_value", "text_id")
    one = frame.groupBy("item_id").agg(F.max(latest).alias("row"), F.min("ingest_date").alias("day")).select("item_id", "row.*", "day")
    plain = one.withColumns(
        {
            "title": F.substring(resolved(F.col("title")), 1, TITLE),
            "brand": resolved(F.col("brand")),
            "keywords": resolved(F.col("text_id")),
            "joined": resolved(F.array_join(F.filter("category_list", lambda c: F.length(c) > 0), f" {GLUE} ")),
        }
    )
    split = F.when(F.col("joined").isNotNull(), F.split("joined", f" {GLUE} ")).otherwise(_nothing())
    path = F.when(F.size("categories") > 0, F.array_join("categories", " > "))
    # keywords that somebody derived stand in where there is no title
    words = F.concat_ws(" | ", F.coalesce("title", "keywords"), "brand", path)
    return (
        plain.withColumn("categories", split)
        .withColumn("words", words)
        .withColumns(
            {
                "price": F.col("price_value"),
                "has_text": F.length("words") > 0,
                "text": F.when(F.length("words") > 0, F.col("words")).otherwise(F.col("item_id")),
                "first_seen": F.col("day") if known_days else F.lit(None).cast("date"),
            }
        )
        .select(*schemas.get("items").names())
    )


def bare_items(events: DataFrame, described: DataFrame, known_days: bool) -> DataFrame:
    """A row for each item that events name and the metadata do not: its text is its id."""
    seen = events.groupBy("item_id").agg(F.min("event_date").alias("first"))
    nothing = F.lit(None).cast("string")
    return (
        seen.join(described.select("item_id"), on="item_id", how="left_anti")
        .withColumns(
            {
                "title": nothing,
                "brand": nothing,
                "categories": _nothing(),
                "price": F.lit(None).cast("double"),
                "text": F.col("item_id"),
                "has_text": F.lit(False),
                "first_seen": F.col("first") if known_days else F.lit(None).cast("date"),
            }
        )
        .select(*schemas.get("items").names())
    )
