"""Stage `impressions`: which item stood in which slot of which request, and what came of it.

Reads   `events` that carry a request (kinds impression, click, purchase).
Writes  `impressions` (one item in one slot of one request; request_id, item_id). Empty where the source logs no requests.
Rerun   the whole table is replaced; equal content makes no new version. A late click thus changes the slate that it belongs to.
Run     gr2 stage impressions --profile demo
"""

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

import schemas
from gr2.config import Config
from gr2.context import Context, Result
from spark_jobs.publish import publish
from spark_jobs.session import read


def run(cfg: Config, ctx: Context) -> Result:
    """Builds the table. Raises MissingInputError without `events`."""
    events = read(ctx, "events").where(F.col("request_id").isNotNull() & F.col("kind").isin("impression", "click", "purchase"))
    rows_in = events.count()
    published = publish(ctx, "impressions", to_impressions(events))
    if not published:
        ctx.log("impressions: the source logs no requests; the table is empty")
    table = read(ctx, "impressions")
    clicks, purchases, requests = table.agg(F.count_if("click"), F.count_if("purchase"), F.count_if(F.col("position") == 1)).collect()[0]
    return Result(rows_in=rows_in, rows_out=published, detail={"requests": requests, "clicks": clicks, "purchases": purchases})


def to_impressions(events: DataFrame) -> DataFrame:
    """Events of requests in the contract of `impressions`. An item shown twice in one request counts at its first slot.

    A purchase means a click, whether or not the click's own line arrived; a click on an item whose impression did not arrive is left out.
    """
    shown = F.when(
        F.col("kind") == "impression", F.struct("slot_row", "slot_col", "event_time", "event_date", "user_id", "propensity", "period")
    )
    one = (
        events.groupBy("request_id", "item_id")
        .agg(
            F.min(shown).alias("slot"),
            F.bool_or(F.col("kind").isin("click", "purchase")).alias("click"),
            F.bool_or(F.col("kind") == "purchase").alias("purchase"),
        )
        .where(F.col("slot").isNotNull())
        .select("request_id", "item_id", "click", "purchase", "slot.*")
    )
    reading = Window.partitionBy("request_id").orderBy("slot_row", "slot_col", "item_id")
    return (
        one.withColumnRenamed("event_time", "request_time")
        .withColumns({"position": F.row_number().over(reading), "grade": F.col("click").cast("int") + F.col("purchase").cast("int")})
        .select(*schemas.get("impressions").names())
    )
