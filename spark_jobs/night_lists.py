"""The lists of a night: what the users who did something that day would be shown next (stage `candidates` with --date).

Reads    `histories` as of the day, `semantic_ids`, `interactions` and `pair_days` up to the day, `items`, `item_embeddings`, and the
         pre-ranker of the promoted release (before the first release the latest `midtrain-refit`).
Writes   the night's partition of `candidates` and `candidate_features`: split `live`, no target, no label.
Rerun    equal, in whichever order nights are made; after late events a list that they change gets another request_id.

Evidence is that of all days up to the night, as fit `live`. Only users whose history changed that day are asked: the lists of the others
are those of their last active night.
"""

import datetime as dt

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

import schemas
from gr2.config import Config
from gr2.context import Context, Result
from spark_jobs import evidence
from spark_jobs.candidates import ranked
from spark_jobs.features import with_features
from spark_jobs.publish import publish
from spark_jobs.session import frame_of, read

PRERANKER = "midtrain-refit"


def build(cfg: Config, ctx: Context, night: dt.date) -> Result:
    """Publishes the night's lists and their evidence. Raises MissingInputError where a table or the pre-ranker is not there."""
    import pyarrow as pa

    model = ctx.model(PRERANKER, "midtrain")
    asked = requests(read(ctx, "histories"), night, model.hash).orderBy("request_id").toArrow().to_pylist()
    partition = {"split": "live", "night": str(night)}
    rows = pa.Table.from_pylist(list(ranked(cfg, ctx, asked, "live", model)) if asked else [], schema=schemas.get("candidates").arrow())
    lists = publish(ctx, "candidates", frame_of(ctx, rows), partition)
    made = read(ctx, "candidates").where((F.col("split") == "live") & (F.col("night") == partition["night"]))
    features = publish(ctx, "candidate_features", with_features(ctx, made, *evidence.as_of(ctx, cfg.evidence, night)), partition)
    if not lists:
        ctx.log(f"candidates: nobody did anything on {night}: no lists")
    return Result(rows_in=len(asked), rows_out=lists + features, detail={"night": str(night), "lists": lists, "preranker": model.id})


def requests(histories: DataFrame, night: dt.date, preranker: str) -> DataFrame:
    """Users with something new that day, with all that is known of them at its end. The target is yet to come."""
    day = F.lit(night + dt.timedelta(days=1))
    said = F.concat_ws(",", F.lit(preranker), F.array_join("item_ids", ","), F.col("days").cast("string"))
    made_from = F.substring(F.sha2(said, 256), 1, 8)
    return histories.where(F.col("as_of") == F.lit(night)).select(
        F.concat_ws(":", F.lit("live"), F.lit(str(night)), "user_id", made_from).alias("request_id"),
        F.lit("live").alias("split"),
        "user_id",
        day.alias("as_of"),
        F.col("item_ids").alias("history_ids"),
        F.transform("days", lambda d: F.unix_date(day) - d).alias("history_days"),
        F.lit(None).cast("string").alias("target_id"),
        F.lit("unknown_day").alias("slice"),
        F.col("item_ids").alias("seen_ids"),
        F.lit(str(night)).alias("night"),
    )
