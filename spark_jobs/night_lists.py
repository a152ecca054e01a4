"""The lists of a night: what the users who did something that day would be shown next (stage `candidates` with --date).

Reads    `histories` as of the day, `semantic_ids`, `interactions` and `pair_days` up to the day, `items`, `item_embeddings`, and the
         tokenizer and pre-ranker (`midtrain-refit`, `sasrec-refit`) that made the night's lists before; for a night without lists those of
         the promoted release (before the first release the latest).
Writes   the night's partition of `candidates` and `candidate_features`: split `live`, no target, no label.
Rerun    equal, in whichever order nights are made: what arrives late makes the lists of the nights since then again, where it changes them.
         A list that another history gave has another request_id, and is scored anew; one whose evidence alone moved keeps its score.
         A later pre-ranker makes no past night's lists again, for it was trained on what came after them: a night is made again by the
         models that made it first, and not at all while its data and the settings are what they were.

Evidence is that of all days up to the night, as fit `live`. Only users whose history changed that day are asked: the lists of the others
are those of their last active night.
"""

import datetime as dt
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from gr2.config import Config
from gr2.context import Context, Result
from gr2.pipeline import get, read_record, write_record
from spark_jobs import evidence
from spark_jobs.candidates import PAIR, SASREC, ranked
from spark_jobs.features import with_features
from spark_jobs.publish import publish, publish_rows, rows_hash
from spark_jobs.session import read

PRERANKER = "midtrain-refit"
RECORD = "lists"  # of a night, beside those of its stages: what its lists were made from, and by which models
Models = Mapping[str, str]  # name -> hash


class AsMade(Context):
    """The context of a run in which models are those that made some night's lists, whatever was promoted since."""

    def __init__(self, ctx: Context, models: Models) -> None:
        super().__init__(ctx.cfg, ctx.date)
        self.models = models

    @property
    def promoted(self) -> dict[str, dict[str, Any]]:
        """Pins as that night found them; of models only."""
        return {"models": dict(self.models)}


def build(cfg: Config, ctx: Context, night: dt.date) -> Result:
    """Publishes the night's lists and their evidence. Raises MissingInputError where a table or a model is not there."""
    there = set(ctx.lake.read("candidates", ["night"], split="live")["night"].to_pylist()) if ctx.lake.exists("candidates") else set()
    records = {n: read_record(Context(cfg, n), RECORD) for n in sorted({night, *map(dt.date.fromisoformat, there)})}
    models, settings = _models(cfg, ctx, records), cfg.digest("seed", *get("candidates").sections)
    known = made_from(ctx, {n: own["tokenizer"] for n, own in models.items()})
    moved = {n for n, print_ in known.items() if records[n].get("made_from") != print_}
    if str(night) not in there or records[night].get("settings", settings) != settings:
        moved.add(night)
    due = sorted(moved - _orphaned(ctx, {n: models[n] for n in moved - {night}}))
    counts, catalogues = {}, made_with(ctx, {n: models[n] for n in due})
    for each in due:
        counts[str(each)] = _lists(cfg, AsMade(ctx, models[each]), each, catalogues[each])
        write_record(Context(cfg, each), RECORD, {"made_from": known[each], "models": models[each], "settings": settings})
    if others := len(set(due) - {night}):
        ctx.log(f"candidates: {others} other nights have other data now than their lists were made from: these were made again")
    for name in ("candidates", "candidate_features"):  # also where nothing was due
        ctx.pin("tables", name, ctx.lake.version(name))
    total, model = sum(counts.values()), f"{PRERANKER}@{models[night][PRERANKER]}"
    return Result(rows_in=total, rows_out=total * (cfg.candidates.n + 1), detail={"lists": counts, "preranker": model})


def _models(cfg: Config, ctx: Context, records: Mapping[dt.date, dict[str, Any]]) -> dict[dt.date, Models]:
    """Night -> the models that make its lists: those that made them before, else those that are out."""
    out = {name: ctx.model(name).hash for name in ("tokenizer", PRERANKER, *([SASREC["live"]] if cfg.sasrec.share else []))}
    return {n: {name: record.get("models", {}).get(name, digest) for name, digest in out.items()} for n, record in records.items()}


def _orphaned(ctx: Context, models: Mapping[dt.date, Models]) -> set[dt.date]:
    """Nights that can no longer be made as they were: their lists stay, so that a model that somebody removed stops no later night."""
    gone = {n for n, own in models.items() if not all((ctx.root / "models" / name / digest).is_dir() for name, digest in own.items())}
    if gone:
        ctx.log(f"candidates: {len(gone)} other nights have other data now, but the models that made their lists are gone: these stay")
    return gone


def _lists(cfg: Config, ctx: Context, night: dt.date, catalogue: str) -> int:
    """Makes one night's lists, all of them: what shares a batch shows in a score's last digits."""
    model = ctx.model(PRERANKER)
    partition = {"split": "live", "night": str(night)}
    found = requests(read(ctx, "histories"), read(ctx, "interactions"), night, catalogue)
    asked = found.orderBy("request_id").toArrow().to_pylist()
    pairs, stats = evidence.as_of(ctx, cfg.evidence, night)
    pairs = pairs.persist(StorageLevel.MEMORY_AND_DISK)  # for the beams and for the features
    try:
        rows = list(ranked(cfg, ctx, asked, "live", model, pairs.select(*PAIR).toArrow(), cfg.candidates.n)) if asked else []
        lists = publish_rows(ctx, "candidates", rows, partition)
        made = read(ctx, "candidates").where((F.col("split") == "live") & (F.col("night") == partition["night"]))
        publish(ctx, "candidate_features", with_features(ctx, made, pairs, stats), partition)
    finally:
        pairs.unpersist()
    if not lists:
        ctx.log(f"candidates: nobody did anything on {night}: no lists")
    return lists


def made_from(ctx: Context, tokenizers: Mapping[dt.date, str]) -> dict[dt.date, str]:
    """Night -> a hash of what the data say of it: which items had codes, and all that users had done by then, as each table has it.

    `tokenizers`: night -> hash of that which its lists are made with.
    """
    acts = read(ctx, "interactions").groupBy("event_date").agg(rows_hash("user_id", "ordinal", "item_id", "event_date").alias("sum"))
    # Published apart from `interactions`, they may lag behind it. What each holds follows from there, so their arrays need not be read.
    lists = read(ctx, "histories").groupBy("as_of").agg(rows_hash("user_id", "as_of", "length").alias("sum"))
    followed = ("event_date", "item_id", "next_item_id", "count")
    pairs = read(ctx, "pair_days").groupBy("event_date").agg(rows_hash(*followed).alias("sum"))
    sums = [_by_day(frame) for frame in (acts, lists, pairs)]
    coded = _coded(ctx, tokenizers.values(), "item_id")
    return {night: _digest([_until(night, part) for part in (coded[own], *sums)]) for night, own in tokenizers.items()}


def made_with(ctx: Context, models: Mapping[dt.date, Models]) -> dict[dt.date, str]:
    """Night -> a hash of the models and of the codes as of the night: what decides a list beside the user's past."""
    codes = _coded(ctx, [own["tokenizer"] for own in models.values()], "item_id", "token_text")
    said = {n: "+".join(f"{name}@{digest}" for name, digest in own.items() if name != "tokenizer") for n, own in models.items()}
    return {n: _digest([said[n], _until(n, codes[own["tokenizer"]])]) for n, own in models.items()}


def _coded(ctx: Context, tokenizers: Iterable[str], *columns: str) -> dict[str, list[tuple[dt.date, int]]]:
    """Tokenizer -> `columns` of the items that have its codes, hashed by the day since which they are known."""
    day = F.coalesce("first_seen", F.lit("1970-01-01").cast("date"))
    found = {}
    for own in set(tokenizers):
        codes = read(ctx, "semantic_ids").where(F.col("tokenizer") == f"tokenizer@{own}").select("item_id", "token_text")
        joined = read(ctx, "items").join(codes, on="item_id")
        found[own] = _by_day(joined.groupBy(day.alias("day")).agg(rows_hash(*columns).alias("sum")))
    return found


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
