"""The lists of a night: what the users who did something that day would be shown next (stage `candidates` with --date).

Reads    `histories` as of the day, `semantic_ids`, `interactions` and `pair_days` up to the day, `items`, `item_embeddings`, and the
         pre-ranker of the promoted release (before the first release the latest `midtrain-refit` and `sasrec-refit`).
Writes   the night's partition of `candidates` and `candidate_features`: split `live`, no target, no label.
Rerun    equal, in whichever order nights are made: what arrives late makes the lists of the nights since then again, where it changes them.
         A list that another history gave has another request_id, and is scored anew; one whose evidence alone moved keeps its score.

Evidence is that of all days up to the night, as fit `live`. Only users whose history changed that day are asked: the lists of the others
are those of their last active night.
"""

import datetime as dt
import hashlib

import pyarrow as pa
from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

import schemas
from gr2.artifacts import Artifact
from gr2.config import Config
from gr2.context import Context, Result
from gr2.pipeline import read_record, write_record
from spark_jobs import evidence
from spark_jobs.candidates import PAIR, SASREC, ranked
from spark_jobs.features import with_features
from spark_jobs.publish import publish, rows_hash
from spark_jobs.session import frame_of, read

PRERANKER = "midtrain-refit"
RECORD = "lists"  # of a night, beside those of its stages: what its lists were made from


def build(cfg: Config, ctx: Context, night: dt.date) -> Result:
    """Publishes the night's lists and their evidence. Raises MissingInputError where a table or the pre-ranker is not there."""
    model = ctx.model(PRERANKER, "midtrain")
    there = set(ctx.lake.read("candidates", ["night"], split="live")["night"].to_pylist()) if ctx.lake.exists("candidates") else set()
    models = [model.id, *([ctx.model(SASREC["live"], "sasrec").id] if cfg.sasrec.share else [])]
    known = made_from(ctx, sorted({night, *map(dt.date.fromisoformat, there)}), "+".join(models))
    due = [n for n, print_ in known.items() if n == night or read_record(Context(cfg, n), RECORD).get("made_from") != print_]
    counts = {}
    for each in due:
        counts[str(each)] = _lists(cfg, ctx, each, model, known[each])
        write_record(Context(cfg, each), RECORD, {"made_from": known[each]})
    if len(due) > 1:
        ctx.log(f"candidates: what arrived late changed the past of {len(due) - 1} other nights: their lists were made again")
    total = sum(counts.values())
    return Result(rows_in=total, rows_out=total * (cfg.candidates.n + 1), detail={"lists": counts, "preranker": model.id})


def _lists(cfg: Config, ctx: Context, night: dt.date, model: Artifact, print_: str) -> int:
    """Makes one night's lists, all of them: what shares a batch shows in a score's last digits."""
    partition = {"split": "live", "night": str(night)}
    asked = requests(read(ctx, "histories"), night, print_.split("-")[0]).orderBy("request_id").toArrow().to_pylist()
    pairs, stats = evidence.as_of(ctx, cfg.evidence, night)
    pairs = pairs.persist(StorageLevel.MEMORY_AND_DISK)  # for the beams and for the features
    try:
        rows = list(ranked(cfg, ctx, asked, "live", model, pairs.select(*PAIR).toArrow(), cfg.candidates.n)) if asked else []
        schema = schemas.get("candidates").arrow()
        lists = publish(ctx, "candidates", frame_of(ctx, pa.Table.from_pylist(rows, schema=schema)), partition)
        made = read(ctx, "candidates").where((F.col("split") == "live") & (F.col("night") == partition["night"]))
        publish(ctx, "candidate_features", with_features(ctx, made, pairs, stats), partition)
    finally:
        pairs.unpersist()
    if not lists:
        ctx.log(f"candidates: nobody did anything on {night}: no lists")
    return lists


def made_from(ctx: Context, nights: list[dt.date], preranker: str) -> dict[dt.date, str]:
    """Night -> a hash of the pre-ranker and the catalogue as of the night, `-`, a hash of all that users had done by then."""
    acts = read(ctx, "interactions").groupBy("event_date").agg(rows_hash("user_id", "ordinal", "item_id", "event_date").alias("sum"))
    tokenizer = ctx.model("tokenizer", "tokenizer").id
    codes = read(ctx, "semantic_ids").where(F.col("tokenizer") == tokenizer).select("item_id", "token_text")
    day = F.coalesce("first_seen", F.lit("1970-01-01").cast("date"))
    items = (
        read(ctx, "items").join(codes, on="item_id").groupBy(day.alias("event_date")).agg(rows_hash("item_id", "token_text").alias("sum"))
    )
    sums = [[(row["event_date"], int(row["sum"])) for row in frame.collect()] for frame in (items, acts)]

    def of(night: dt.date, part: int, salt: str) -> str:
        total = sum(value for day, value in sums[part] if day <= night)
        return hashlib.sha256(f"{salt}:{total}".encode()).hexdigest()[:12]

    return {night: f"{of(night, 0, preranker)}-{of(night, 1, '')}" for night in nights}


def requests(histories: DataFrame, night: dt.date, catalogue: str) -> DataFrame:
    """Users with something new that day, with all that is known of them at its end. The target is yet to come.

    `catalogue`: what decides a list beside the history; both are hashed into the request's id.
    """
    day = F.lit(night + dt.timedelta(days=1))
    said = F.concat_ws(",", F.lit(catalogue), F.array_join("item_ids", ","), F.col("days").cast("string"))
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
