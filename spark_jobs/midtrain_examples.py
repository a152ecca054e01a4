"""Stage `midtrain_examples`: the texts of the mid-training mix (METHOD 3).

Reads    `interactions` (split pretrain for fit `train`, pretrain and rerank for fit `refit`), `items`, and `semantic_ids` of the current
         tokenizer.
Writes   `midtrain_examples`: one training text; key fit, example_id. Each fit is one partition, replaced whole.
         The order is that of `interactions`, which holds what data.same_day_order made of the days of the train prefix.
Rerun    every draw is a hash of the seed and the example's id, so equal inputs give equal texts. Nothing of a split beyond the fit's own
         is read, so a poisoned future changes no text.

Tasks: `history` (a user's items as IDs: under a causal loss every prefix is one sliding window; a long history is cut into windows that
overlap, the overlap being read and not learned, so that each item is learned once), `titles` (titles -> next title), `captions`
(ID -> title, brand, categories), `lookup` (title -> ID), `persona` (what a user likes, in words, with IDs in between). The share of a text
task is its examples over the number of users (titles, persona) or of items (captions, lookup); several times for a share above 1.

    gr2 stage midtrain_examples --profile demo
"""

from functools import reduce

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from gr2.config import Config
from gr2.context import Context, Result
from schemas import get
from schemas.interactions import FITS
from spark_jobs.publish import publish
from spark_jobs.session import read

BUCKETS = 1_000_000


def run(cfg: Config, ctx: Context) -> Result:
    """Builds and publishes both fits."""
    codes = current_codes(ctx)
    rows, detail = 0, {}
    for fit, splits in FITS.items():
        events = read(ctx, "interactions").where(F.col("split").isin(*splits))
        frame = examples(cfg, fit, events, read(ctx, "items"), codes)
        detail[fit] = publish(ctx, "midtrain_examples", frame, partition={"fit": fit})
        rows += detail[fit]
    return Result(rows_in=rows, rows_out=rows, detail=detail)


def current_codes(ctx: Context) -> DataFrame:
    """`item_id, sid` under the current tokenizer."""
    version = ctx.model("tokenizer").id
    return read(ctx, "semantic_ids").where(F.col("tokenizer") == version).select("item_id", F.col("token_text").alias("sid"))


def examples(cfg: Config, fit: str, events: DataFrame, items: DataFrame, codes: DataFrame) -> DataFrame:
    """All tasks of one fit, in the contract's columns. `events` are the interactions of that fit, and no others."""
    mix, seed = cfg.midtrain, cfg.seed
    known = described(items, codes, mix.title_words)
    sequences = events.select("user_id", "item_id", "ordinal").join(F.broadcast(known), on="item_id", how="inner")
    users = sequences.groupBy("user_id").agg(
        F.sort_array(F.collect_list(F.struct("ordinal", "sid", "title", "brand", "kind"))).alias("seen"), F.count(F.lit(1)).alias("length")
    )
    tasks = [
        history(users, mix.history_items),
        titles(drawn(users, "user_id", "titles", mix.titles, seed), seed),
        persona(drawn(users, "user_id", "persona", mix.persona, seed)),
        captions(drawn(known, "item_id", "captions", mix.captions, seed)),
        lookup(drawn(known, "item_id", "lookup", mix.lookup, seed)),
    ]
    return (
        reduce(DataFrame.unionByName, tasks)
        .withColumn("fit", F.lit(fit))
        .withColumn("ordinal", F.xxhash64(F.lit(seed), "example_id"))
        .select(get("midtrain_examples").names())
    )


def described(items: DataFrame, codes: DataFrame, title_words: int) -> DataFrame:
    """Items with codes: `item_id, sid, title, brand, kind`; the title's first words, the most special category; empty where unknown."""
    words = F.split(F.trim(F.regexp_replace(F.coalesce("title", F.lit("")), r"\s+", " ")), " ")
    return items.join(codes, on="item_id", how="inner").select(
        "item_id",
        "sid",
        F.concat_ws(" ", F.slice(words, 1, title_words)).alias("title"),
        F.coalesce("brand", F.lit("")).alias("brand"),
        F.coalesce(F.try_element_at("categories", F.lit(-1)), F.lit("")).alias("kind"),
    )


def drawn(frame: DataFrame, key: str, task: str, share: float, seed: int) -> DataFrame:
    """A seeded sample of rows with `example_id`; a share above 1 gives some rows, or all of them, several times."""
    whole = int(share)
    bucket = F.pmod(F.xxhash64(F.lit(seed), F.lit(task), key), F.lit(BUCKETS))
    copies = F.lit(whole) + (bucket < int((share - whole) * BUCKETS)).cast("int")
    numbered = frame.withColumn("copy", F.explode(F.when(copies > 0, F.sequence(F.lit(1), copies)).otherwise(F.array().cast("array<int>"))))
    return numbered.withColumn("example_id", F.concat_ws(":", F.lit(task), key, F.col("copy").cast("string")))


def history(users: DataFrame, window: int) -> DataFrame:
    """Windows of `window` items, each half over the one before; the overlap is the prompt. A user with one item has nothing to predict
    from, but still teaches where histories start."""
    step = max(1, window // 2)
    windows = F.when(F.col("length") > window, F.ceil((F.col("length") - window) / step)).otherwise(0).cast("int")
    cut = users.select("user_id", F.col("seen.sid").alias("sids"), F.explode(F.sequence(F.lit(0), windows)).alias("part"))
    overlap = F.when(F.col("part") == 0, 0).otherwise(window - step)
    start = F.col("part") * step + 1
    return cut.select(
        F.concat_ws(":", F.lit("history"), "user_id", F.col("part").cast("string")).alias("example_id"),
        F.lit("history").alias("task"),
        F.concat_ws("", F.slice("sids", start, overlap)).alias("prompt"),
        F.concat_ws("", F.slice("sids", start + overlap, F.lit(window) - overlap)).alias("completion"),
    )


def titles(users: DataFrame, seed: int) -> DataFrame:
    """Up to three titles in a row, at a drawn place, and the title that followed."""
    named = users.select("example_id", F.filter("seen.title", lambda t: t != "").alias("names")).where(F.size("names") > 1)
    last = F.pmod(F.xxhash64(F.lit(seed), "example_id"), F.size("names") - 1).cast("int") + 1  # place (from 0) of the title to predict
    placed = named.select("example_id", "names", last.alias("last"))
    first = F.greatest(F.col("last") - 3, F.lit(0))
    return placed.select(
        "example_id",
        F.lit("titles").alias("task"),
        F.concat(F.lit("chosen: "), F.concat_ws("; ", F.slice("names", first + 1, F.col("last") - first)), F.lit("; next:")).alias(
            "prompt"
        ),
        F.concat(F.lit(" "), F.get("names", F.col("last"))).alias("completion"),
    )


def persona(users: DataFrame) -> DataFrame:
    """A user's frequent kinds and brands in words, then the last items, IDs and kinds interleaved."""
    favourites = [F.slice(F.array_distinct(F.filter(F.reverse(f"seen.{c}"), lambda v: v != "")), 1, 2) for c in ("kind", "brand")]
    tail = F.slice("seen", F.greatest(F.size("seen") - 3, F.lit(1)), 4)
    story = F.concat_ws("", F.transform(tail, lambda s: F.concat(F.lit(" then "), s["sid"], F.lit(" "), s["kind"])))
    return users.select(
        "example_id",
        F.lit("persona").alias("task"),
        F.concat(F.lit("user of "), F.concat_ws(", ", *favourites), F.lit(":")).alias("prompt"),
        story.alias("completion"),
    )


def captions(items: DataFrame) -> DataFrame:
    """ID -> title, brand and kind."""
    said = F.concat(F.lit(" "), F.col("title"), F.lit("; brand "), F.col("brand"), F.lit("; kind "), F.col("kind"))
    return items.select(
        "example_id", F.lit("captions").alias("task"), F.concat("sid", F.lit(" is")).alias("prompt"), said.alias("completion")
    )


def lookup(items: DataFrame) -> DataFrame:
    """Title, brand and kind -> ID."""
    told = F.concat(F.lit("item "), F.concat_ws("; ", "title", "brand", "kind"), F.lit(" is "))
    return items.select("example_id", F.lit("lookup").alias("task"), told.alias("prompt"), F.col("sid").alias("completion"))
