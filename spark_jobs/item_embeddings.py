"""Stage `item_embeddings`: vectors of every item, by text and by what it is bought with.

Reads    `items` (text), `item_pairs` of fit `train` (so nothing of a later split is in any vector).
Writes   `item_embeddings`: one item and model; key item_id, model. Models: `tfidf_svd` (or the encoder's name) and `pairs_svd`, each
         one partition, replaced whole. Model folder `embedder`: the fitted projection.
Rerun    seeded, rows in order of item id, signs of singular vectors fixed: equal input gives equal vectors. With
         `embeddings.frozen`, and at night (--date), a projection that was fitted under the same settings is used again, so
         that new items land in the space that the tokenizer knows.

    gr2 stage item_embeddings --profile demo
"""

from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame

from gr2 import artifacts
from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import MissingInputError
from schemas import get
from spark_jobs.embedder import Embedder, Floats, encode_texts, fit
from spark_jobs.increments import building, until_settled
from spark_jobs.publish import publish
from spark_jobs.session import frame_of

PAIRS = "pairs_svd"


def run(cfg: Config, ctx: Context) -> Result:
    """Builds and publishes the vectors."""
    return until_settled(ctx, lambda: _build(cfg, ctx))


def _build(cfg: Config, ctx: Context) -> Result:
    """One commit for all models. Vectors that another run made meanwhile, of items that came since, are never overwritten."""
    from training.tokenizer import text_model

    now = building(cfg, ctx, "item_embeddings", "item_embeddings", "items")
    items = ctx.lake.read("items", ["item_id", "text"], order_by=["item_id"])
    pairs = ctx.lake.read("item_pairs", ["item_id", "next_item_id", "weight"], order_by=["item_id", "next_item_id"], fit="train")
    ids, texts = items["item_id"].to_pylist(), items["text"].to_pylist()
    linked = (pairs["item_id"].to_pylist(), pairs["next_item_id"].to_pylist(), pairs["weight"].to_numpy())
    embedder, now.settings["embedder"] = _embedder(cfg, ctx, ids, texts, linked)  # a tokenizer reads vectors of one projection only
    settings = cfg.embeddings
    vectors = {text_model(settings): encode_texts(settings.encoder, texts) if settings.encoder else embedder.text(texts)}
    if settings.collaborative_dim:
        vectors[PAIRS] = embedder.pairs(ids, *linked)
    frames = (frame_of(ctx, rows(ids, model, vectors_ND)) for model, vectors_ND in vectors.items())
    publish(ctx, "item_embeddings", reduce(DataFrame.unionByName, frames), {"model": set(vectors)}, now)
    cold = float((~vectors[PAIRS].any(axis=1)).mean()) if settings.collaborative_dim else 1.0
    detail = {"models": sorted(vectors), "share_without_pairs": cold}
    return Result(rows_in=len(ids) + pairs.num_rows, rows_out=len(ids) * len(vectors), detail=detail)


def rows(ids: list[str], model: str, vectors_ND: Floats) -> pa.Table:
    """The table's rows of one model."""
    width = vectors_ND.shape[1]
    offsets = pa.array(np.arange(0, (len(ids) + 1) * width, width, dtype=np.int32))
    vector = pa.ListArray.from_arrays(offsets, pa.array(vectors_ND.ravel()))
    return pa.table({"item_id": ids, "model": [model] * len(ids), "vector": vector}).select(get("item_embeddings").names())


def _embedder(
    cfg: Config, ctx: Context, ids: list[str], texts: list[str], linked: tuple[list[str], list[str], Any]
) -> tuple[Embedder, str]:
    """The projection and its id: the one that is there, if it is frozen and was fitted under the same settings; else a new one."""
    wanted = {**cfg.embeddings.model_dump(mode="json", exclude={"frozen", "collaborative_weight"}), "seed": cfg.seed}
    if cfg.embeddings.frozen or ctx.date:
        try:
            current = ctx.model("embedder")
            if current.manifest["settings"] == wanted:
                ctx.log(f"item vectors: keeping the frozen projection {current.id}")
                return Embedder.load(current.path), current.id
        except MissingInputError:
            ctx.log("item vectors: no frozen projection yet, fitting one")
    embedder = fit(cfg.embeddings, cfg.seed, ids, texts, *linked)
    with artifacts.publish_folder(ctx.root, "embedder", {"settings": wanted, "items": len(ids)}) as folder:
        embedder.save(folder, wanted)
    return embedder, artifacts.resolve(ctx.root, "embedder").id
