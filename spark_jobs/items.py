"""Stage `items`: the catalogue, with the text that models read.

Reads   the metadata of the profile's source (`sources.py`), of every day that is there; `events`, for items that have none.
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
from spark_jobs import readers, sources
from spark_jobs.publish import publish
from spark_jobs.session import read

FIELDS = ("item_id", "title", "brand", "categories", "price", "text_id", "since", "asin", "attribute_ids")
TITLE = 300  # characters kept
PRICE = r"^\s*\$?\s*([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?)\s*$"  # of a text that may be no price at all
GLUE = "\u0001"  # joins categories while their entities are resolved


def run(cfg: Config, ctx: Context) -> Result:
    """Builds the catalogue. Raises InputError for an unreadable file, AuditError if too many rows were refused or the sum is broken."""
    raw = sources.open_source(ctx, "items", FIELDS)
    judged = judge(raw.frame, raw.fields, raw.files.loose_price).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        with readers.reading():
            counts = {r["reason"]: r["count"] for r in judged.groupBy("reason").count().collect()}
        rows_in, good = sum(counts.values()), counts.pop(None, 0)
        reasons = dict(sorted(counts.items()))
        readers.keep_refused(ctx, judged.where(F.col("reason").isNotNull()), "items", reasons, rows_in)
        events = read(ctx, "events")
        described = to_items(judged.where(F.col("reason").isNull()), None if raw.dated else events).persist(StorageLevel.MEMORY_AND_DISK)
        distinct = described.count()
        bare = bare_items(events, described)
        published = publish(ctx, "items", described.unionByName(bare))
        without_text = len(ctx.lake.read("items", ["item_id"], has_text=False))
        unknown = readers.unknown_columns(judged)
        described.unpersist()
    finally:
        judged.unpersist()
    if published < distinct:
        raise AuditError(f"items: {distinct} items were read, but {published} published: rows were lost")
    without_metadata = published - distinct
    detail = {"reasons": reasons, "unknown_columns": unknown, "without_metadata": without_metadata, "without_text": without_text}
    ctx.log(f"items: {without_metadata} only in events, {without_text} without text")
    # a bare item came in too, by its events: rows in = out + quarantined + duplicates
    rows_in, refused = rows_in + without_metadata, rows_in - good
    return Result(rows_in=rows_in, rows_out=published, quarantined=refused, duplicates=good - distinct, detail=detail)


def judge(frame: DataFrame, names: tuple[str, ...], loose_price: bool) -> DataFrame:
    """Types the fields, and names in `reason` the first rule that refuses the row. `names`: the files' own."""
    text, listed = (F.nullif(F.trim(name), F.lit("")) for name in ("price", "categories"))  # blank: unknown
    if loose_price:
        found = F.regexp_replace(F.regexp_extract(text, PRICE, 1), ",", "")
        text = F.when(found != "", found)
    price = text.try_cast("double")
    nested = F.flatten(F.from_json(listed, "array<array<string>>"))
    categories = F.when(listed.rlike(r"^\s*\[\s*\["), F.array_distinct(nested)).otherwise(F.from_json(listed, "array<string>"))
    infinite = F.abs(price) == float("inf")
    rules = {
        "not_json": ~F.col("parsed"),
        "missing_item": F.col("item_id").isNull(),
        "bad_item": ~F.col("item_id").rlike(readers.IDENTIFIER),
        "bad_title": _container("title"),
        "bad_brand": _container("brand"),
        "bad_categories": listed.isNotNull() & categories.isNull(),
        "bad_price": text.isNotNull() & F.coalesce((price < 0) | F.isnan(price) | infinite, F.lit(True)),
    }
    return readers.with_reason(frame.withColumns({"price_value": price, "category_list": categories}), rules, names).drop("fields")


def _container(name: str) -> Column:
    """Whether a field that must be text holds an object or a list."""
    return F.from_json(name, "map<string,string>").isNotNull() | F.from_json(name, "array<string>").isNotNull()


def resolved(text: Column) -> Column:
    """HTML entities resolved by the library that Spark ships, white space made single, empty as null. Native: no Python worker."""
    given = F.coalesce(text, F.lit(""))
    method = F.try_reflect(F.lit("org.apache.commons.text.StringEscapeUtils"), F.lit("unescapeHtml4"), given)
    method = F.coalesce(method, given)  # it throws at numbers that are no character
    plain = F.trim(F.regexp_replace(F.regexp_replace(method, "&apos;", "'"), r"[\s\u00a0]+", " "))
    return F.when(F.length(plain) > 0, plain)


def _nothing() -> Column:
    """An empty list whose elements are known not to be null (a cast of `array()` would leave that open)."""
    return F.slice(F.array(F.lit("")), 1, 0)


def to_items(frame: DataFrame, events: DataFrame | None) -> DataFrame:
    """Accepted rows in the contract of `items`; of several rows of one item the latest file's stands.

    An item is first seen on the day of its file; where files have no day, `events` tell: the first day that is known.
    """
    latest = F.struct("source_file", "record", "title", "brand", "category_list", "price_value", "text_id", "asin")
    one = frame.groupBy("item_id").agg(F.max(latest).alias("row"), F.min("ingest_date").alias("day")).select("item_id", "row.*", "day")
    if events is not None:
        one = one.drop("day").join(first_days(events), on="item_id", how="left").withColumnRenamed("first", "day")
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
                "first_seen": F.col("day"),
            }
        )
        .select(*schemas.get("items").names())
    )


def first_days(events: DataFrame) -> DataFrame:
    """`item_id, first`: the first known day of an event."""
    return events.groupBy("item_id").agg(F.min(F.when(F.col("day_known"), F.col("event_date"))).alias("first"))


def bare_items(events: DataFrame, described: DataFrame) -> DataFrame:
    """A row for each item that events name and the metadata do not: its text is its id."""
    nothing = F.lit(None).cast("string")
    return (
        first_days(events)
        .join(described.select("item_id"), on="item_id", how="left_anti")
        .withColumns(
            {
                "title": nothing,
                "brand": nothing,
                "categories": _nothing(),
                "price": F.lit(None).cast("double"),
                "text": F.col("item_id"),
                "has_text": F.lit(False),
                "first_seen": F.col("first"),
                "asin": nothing,
            }
        )
        .select(*schemas.get("items").names())
    )
