"""The lists of a night: what the users who did something that day would be shown next (stage `candidates` with --date).

Reads    `histories` as of the day, `semantic_ids`, `interactions` and `pair_days` up to the day, `items`, `item_embeddings`, and the
         pre-ranker of the promoted release (before the first release the latest `midtrain-refit` and `sasrec-refit`).
Writes   the night's partition of `candidates` and `candidate_features`: split `live`, no target, no label.
Rerun    equal, in whichever order nights are made: what arrives late makes the lists of the nights since then again, where it changes them.
         A list that another history gave has another request_id, and is scored anew; one whose evidence alone moved keeps its score.
         A later pre-ranker makes no past night's lists again, for it was trained on what came after them.

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
    known = made_from(ctx, sorted({night, *map(dt.date.fromisoformat, there)}))
    due = [n for n, print_ in known.items() if n == night or read_record(Context(cfg, n), RECORD).get("made_from") != print_]
    counts, catalogues = {}, made_with(ctx, due, "+".join(models))
    for each in due:
        counts[str(each)] = _lists(cfg, ctx, each, model, catalogues[each])
        write_record(Context(cfg, each), RECORD, {"made_from": known[each]})
    if len(due) > 1:
        ctx.log(f"candidates: {len(due) - 1} other nights have other data now than their lists were made from: these were made again")
    total = sum(counts.values())
    return Result(rows_in=total, rows_out=total * (cfg.candidates.n + 1), detail={"lists": counts, "preranker": model.id})


def _lists(cfg: Config, ctx: Context, night: dt.date, model: Artifact, catalogue: str) -> int:
    """Makes one night's lists, all of them: what shares a batch shows in a score's last digits."""
    partition = {"split": "live", "night": str(night)}
    found = requests(read(ctx, "histories"), read(ctx, "interactions"), night, catalogue)
    asked = found.orderBy("request_id").toArrow().to_pylist()
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


def made_from(ctx: Context, nights: list[dt.date]) -> dict[dt.date, str]:
    """Night -> a hash of what the data say of it: which items had codes, and all that users had done by then, as each table has it."""
    acts = read(ctx, "interactions").groupBy("event_date").agg(rows_hash("user_id", "ordinal", "item_id", "event_date").alias("sum"))
    # Published apart from `interactions`, they may lag behind it. What each holds follows from there, so their arrays need not be read.
    lists = read(ctx, "histories").groupBy("as_of").agg(rows_hash("user_id", "as_of", "length").alias("sum"))
    followed = ("event_date", "item_id", "next_item_id", "count")
    pairs = read(ctx, "pair_days").groupBy("event_date").agg(rows_hash(*followed).alias("sum"))
    sums = [_by_day(frame) for frame in (_coded(ctx, "item_id"), acts, lists, pairs)]
    return {night: _digest([_until(night, part) for part in sums]) for night in nights}


def made_with(ctx: Context, nights: list[dt.date], models: str) -> dict[dt.date, str]:
    """Night -> a hash of the models and of the codes as of the night: what decides a list beside the user's past."""
    codes = _by_day(_coded(ctx, "item_id", "token_text"))
    return {night: _digest([models, _until(night, codes)]) for night in nights}


def _coded(ctx: Context, *columns: str) -> DataFrame:
    """`columns` of the items that have codes, hashed by the day since which they are known."""
    tokenizer = ctx.model("tokenizer", "tokenizer").id
    codes = read(ctx, "semantic_ids").where(F.col("tokenizer") == tokenizer).select("item_id", "token_text")
    day = F.coalesce("first_seen", F.lit("1970-01-01").cast("date"))
    return read(ctx, "items").join(codes, on="item_id").groupBy(day.alias("day")).agg(rows_hash(*columns).alias("sum"))


def _by_day(sums: DataFrame) -> list[tuple[dt.date, int]]:
    return [(row[0], int(row[1])) for row in sums.collect()]


def _until(night: dt.date, sums: list[tuple[dt.date, int]]) -> int:
    return sum(value for day, value in sums if day <= night)


def _digest(parts: list[int | str]) -> str:
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()[:12]


def requests(histories: DataFrame, interactions: DataFrame, night: dt.date, catalogue: str) -> DataFrame:
    """Users with something new that day, with all that is known of them at its end. The target is yet to come.

    `catalogue`: what decides a list beside what the user chose; all of it is hashed into the request's id. A history is cut to
    data.max_history items, `seen_ids` is not.
    """
    day = F.lit(night + dt.timedelta(days=1))
    active = histories.where(F.col("as_of") == F.lit(night))
    past = interactions.where(F.col("event_date") <= F.lit(night)).join(active.select("user_id"), on="user_id", how="left_semi")
    chosen = past.groupBy("user_id").agg(F.collect_set("item_id").alias("chosen"))
    seen = F.array_sort(F.array_union("item_ids", F.coalesce("chosen", F.array().cast("array<string>"))))
    asked = active.join(chosen, on="user_id", how="left").withColumn("seen_ids", seen)
    said = F.concat_ws(",", F.lit(catalogue), F.array_join("item_ids", ","), F.col("days").cast("string"), F.array_join("seen_ids", ","))
    made_from = F.substring(F.sha2(said, 256), 1, 8)
    return asked.select(
        F.concat_ws(":", F.lit("live"), F.lit(str(night)), "user_id", made_from).alias("request_id"),
        F.lit("live").alias("split"),
        "user_id",
        day.alias("as_of"),
        F.col("item_ids").alias("history_ids"),
        F.transform("days", lambda d: F.unix_date(day) - d).alias("history_days"),
        F.lit(None).cast("string").alias("target_id"),
        F.lit("unknown_day").alias("slice"),
        "seen_ids",
        F.lit(str(night)).alias("night"),
    )
