"""Stage `impressions`: which item stood in which slot of which request, and what came of it.

Reads   `events` that carry a request (kinds impression, click, purchase).
Writes  `impressions` (one item in one slot of one request; request_id, item_id). Empty where the source logs no requests.
Rerun   equal content makes no new version. With --date only requests with new events are built again, and only their periods replaced:
        a late click changes the slate that it belongs to, whenever that was shown.
Run     gr2 stage impressions --profile demo [--date 2026-01-05]
"""

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

import schemas
from gr2.config import Config
from gr2.context import Context, Result
from spark_jobs.increments import added, building, last_built, until_settled
from spark_jobs.publish import publish
from spark_jobs.session import read, values

KINDS = ("impression", "click", "purchase")


def run(cfg: Config, ctx: Context) -> Result:
    """Builds the table. Raises MissingInputError without `events`."""
    return until_settled(ctx, lambda: _build(cfg, ctx))


def _build(cfg: Config, ctx: Context) -> Result:
    now = building(cfg, ctx, "impressions", "impressions", "events")
    events = of_requests(read(ctx, "events", now.version))
    before = last_built(ctx, "impressions", now) if ctx.date else None
    fresh = added(ctx, now, before) if before else None
    if fresh is not None:
        requests = of_requests(fresh).select("request_id").distinct()
        again = to_impressions(events.join(requests, on="request_id", how="left_semi"))
        periods = values(again, "period")
        rest = read(ctx, "impressions", now.base).where(F.col("period").isin(*periods))
        both = rest.join(requests, on="request_id", how="left_anti").unionByName(again)
        rows = publish(ctx, "impressions", both, {"period": periods}, now) if periods else 0
        return Result(rows_in=rows, rows_out=rows, detail={"periods": len(periods)})
    published = publish(ctx, "impressions", to_impressions(events), built=now)
    if not published:
        ctx.log("impressions: the source logs no requests; the table is empty")
    table = read(ctx, "impressions")
    clicks, purchases, requests = table.agg(F.count_if("click"), F.count_if("purchase"), F.count_if(F.col("position") == 1)).collect()[0]
    return Result(rows_in=events.count(), rows_out=published, detail={"requests": requests, "clicks": clicks, "purchases": purchases})


def of_requests(events: DataFrame) -> DataFrame:
    """Events that belong to a request."""
    return events.where(F.col("request_id").isNotNull() & F.col("kind").isin(*KINDS))


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
