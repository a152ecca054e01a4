"""The evidence of each candidate (`candidate_features`): a transform that the stage `candidates` calls and publishes.

Reads: `item_pairs` and `item_stats` of the request's own fit, `items`, `item_embeddings` (text vectors only). Nothing of a later split can
reach a feature: the fit decides which interactions its tables saw, and texts have no time.
A rerun is harmless: sums are taken over decimals, so that no order of rows shows in the last bit.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import DoubleType, StructField, StructType

import schemas
from gr2.context import Context
from spark_jobs.session import read

LOOKBACK = 20  # history items, latest first, that evidence is looked up for
REQUEST = (
    "request_id", "split", "night", "fit", "as_of", "days_since_last", "item_id", "incoming_rank", "prior_score", "prior_gap", "grade",
    "grade_weight",
)  # fmt: skip


def with_features(ctx: Context, candidates: DataFrame, pairs: DataFrame | None = None, stats: DataFrame | None = None) -> DataFrame:
    """Candidates (one row a request) -> `candidate_features` (one row a candidate of a request).

    `pairs`, `stats`: evidence in the form of `item_pairs` and `item_stats`, where it is not that of the fits that these tables hold.
    """
    pairs = read(ctx, "item_pairs") if pairs is None else pairs
    stats = read(ctx, "item_stats") if stats is None else stats
    crossed = _with_pairs(pairs, _with_similarity(ctx, _with_catalogue(ctx, cross(candidates))))
    gathered = crossed.groupBy(*REQUEST).agg(*_aggregates())
    stats = stats.select("fit", "item_id", "count", "recent", "last_date")
    price = read(ctx, "items").select("item_id", "price")
    known = gathered.join(F.broadcast(stats), on=["fit", "item_id"], how="left").join(F.broadcast(price), on="item_id", how="left")
    ratio = F.try_divide("price", F.try_divide("history_price", "history_prices"))
    days = F.datediff("as_of", "last_date")
    age = F.when(days < 0, 0).otherwise(days)  # leave-one-out fits may hold later days of other users
    return (
        known.withColumn("popularity", F.log1p(F.coalesce("count", F.lit(0))))
        .withColumn("recent", F.log1p(F.coalesce("recent", F.lit(0.0))))
        .withColumn("pair_item", F.col("best.history_item"))
        .withColumn("pair_gap_days", F.col("best.median_gap_days"))
        .withColumn("pair_max", F.coalesce("best.weight", F.lit(0.0)))
        .withColumn("price_ratio", F.coalesce(ratio, F.lit(1.0)))
        .withColumn("days_since_seen", F.coalesce(age, F.lit(-1)).cast("double"))
        .select(schemas.get("candidate_features").names())
    )


def cross(candidates: DataFrame) -> DataFrame:
    """One row a candidate and history item (the last LOOKBACK, `step` 1 being the latest); a request without history keeps one row."""
    listed = candidates.select(
        "request_id",
        "split",
        "night",
        "fit",
        "as_of",
        F.try_element_at("history_days", F.lit(-1)).alias("days_since_last"),
        F.slice(F.reverse("history_ids"), 1, LOOKBACK).alias("history"),
        F.get("prior_scores", F.lit(0)).cast("double").alias("first_score"),
        F.posexplode(F.arrays_zip("candidate_ids", "prior_scores", "grades", F.coalesce("weights", F.array()).alias("weights"))).alias(
            "place", "candidate"
        ),
    )
    return listed.select(
        "request_id",
        "split",
        "night",
        "fit",
        "as_of",
        "days_since_last",
        F.col("candidate.candidate_ids").alias("item_id"),
        (F.col("place") + 1).alias("incoming_rank"),
        F.col("candidate.prior_scores").cast("double").alias("prior_score"),
        (F.col("first_score") - F.col("candidate.prior_scores")).alias("prior_gap"),
        F.col("candidate.grades").alias("grade"),
        F.col("candidate.weights").cast("double").alias("grade_weight"),
        F.posexplode_outer("history").alias("step", "history_item"),
    ).withColumn("step", F.col("step") + 1)


def _with_catalogue(ctx: Context, crossed: DataFrame) -> DataFrame:
    """Adds whether the brands agree, the Jaccard overlap of the categories, and the history item's price."""
    items = read(ctx, "items").select("item_id", "brand", "categories", "price")
    own = F.broadcast(items.select("item_id", F.col("brand").alias("own_brand"), F.col("categories").alias("own_categories")))
    other = F.broadcast(items.withColumnRenamed("item_id", "history_item"))
    shared = F.size(F.array_intersect("own_categories", "categories"))
    union = F.size(F.array_union("own_categories", "categories"))
    return (
        crossed.join(own, on="item_id", how="left")
        .join(other, on="history_item", how="left")
        .withColumn("brand_agrees", F.coalesce((F.col("own_brand") == F.col("brand")).cast("int"), F.lit(0)))
        .withColumn("overlap", F.coalesce(F.try_divide(shared, union), F.lit(0.0)))
        .select(*REQUEST, "step", "history_item", "brand_agrees", "overlap", F.col("price").alias("history_price"))
    )


def _with_similarity(ctx: Context, crossed: DataFrame) -> DataFrame:
    """Adds the cosine of the two text vectors. The matrix is broadcast (about 400 bytes an item) and rows are gathered by batch.

    Raises MissingInputError where there are no vectors of the configured text model: zeros would look like evidence.
    """
    from training.tokenizer import text_model, vectors_of

    ids, vectors_ND = vectors_of(ctx, text_model(ctx.cfg.embeddings))
    padded_ND = np.vstack([vectors_ND, np.zeros_like(vectors_ND[:1])])  # the last row stands for items without a vector
    shared = ctx.spark.sparkContext.broadcast((ids, padded_ND))
    schema = StructType([*crossed.schema.fields, StructField("similarity", DoubleType())])
    return crossed.mapInArrow(_similarities(shared), schema)


def _similarities(shared: object) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def add(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        ids, vectors_ND = shared.value  # type: ignore[attr-defined]
        known = pa.array(ids, pa.string())
        for batch in batches:
            own, other = (
                pc.fill_null(pc.index_in(batch[c].cast(pa.string()), value_set=known), len(ids)) for c in ("item_id", "history_item")
            )
            cosine_B = np.einsum("bd,bd->b", vectors_ND[own.to_numpy()], vectors_ND[other.to_numpy()])
            yield batch.append_column("similarity", pa.array(np.round(cosine_B.astype(np.float64), 6)))

    return add


def _with_pairs(pairs: DataFrame, crossed: DataFrame) -> DataFrame:
    """Adds what the fitted pair (history item -> candidate) says; null where there is no such pair."""
    known = pairs.select(
        "fit",
        F.col("item_id").alias("history_item"),
        F.col("next_item_id").alias("item_id"),
        "weight",
        "next_count",
        "lift",
        "median_gap_days",
    )
    return crossed.join(known, on=["fit", "history_item", "item_id"], how="left")


def _aggregates() -> list[Column]:
    """What a candidate's rows, one a history item, become. Ties between pairs go to the later history item."""

    def exact(value: Column) -> Column:
        return F.coalesce(F.sum(value.cast("decimal(28,12)")).cast("double"), F.lit(0.0))

    def at_last(column: str) -> Column:
        return F.coalesce(F.max(F.when(F.col("step") == 1, F.col(column))).cast("double"), F.lit(0.0))

    pair = F.struct("weight", (-F.col("step")).alias("lateness"), "history_item", "median_gap_days")
    return [
        at_last("weight").alias("pair_last"),
        at_last("next_count").alias("pair_next"),
        F.max(F.when(F.col("weight").isNotNull(), pair)).alias("best"),
        exact(F.col("weight") * F.pow(F.lit(0.5), F.col("step") - 1)).alias("pair_sum"),
        F.coalesce(F.max("lift"), F.lit(0.0)).alias("lift_max"),
        F.sum("brand_agrees").alias("same_brand"),
        F.max("overlap").alias("category_overlap"),
        at_last("similarity").alias("text_similarity"),
        F.coalesce(F.max("similarity"), F.lit(0.0)).alias("text_similarity_max"),
        exact(F.col("history_price")).alias("history_price"),
        F.count("history_price").alias("history_prices"),
    ]
