"""Stage `tokenizer`: fits the semantic-ID tokenizer on item vectors.

Reads    `item_embeddings` (text, and pairs of the pretrain split only: no vector holds anything later), and `item_pairs` of fit
         `train` if tokenizer.contrastive is on.
Writes   the model folder `tokenizer`: codebooks, encoder, decoder (safetensors), config.json, fitted_items.json, metrics.jsonl.
Rerun    seeded throughout: equal vectors and settings give an equal folder, whose hash names the version. With
         `embeddings.frozen`, and at night (--date), a tokenizer that was fitted under the same settings is kept: nights
         only add items to it.

    gr2 stage tokenizer --profile demo
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gr2 import artifacts
from gr2.config import Config, Embeddings
from gr2.context import Context, Result
from gr2.errors import MissingInputError
from training.codebooks import Codebooks, Floats

PAIRS = "pairs_svd"


def run(cfg: Config, ctx: Context) -> Result:
    """Fits and publishes the tokenizer."""
    settings = settings_of(cfg)
    if (cfg.embeddings.frozen or ctx.date) and (kept := _kept(ctx, settings)):
        ctx.log(f"tokenizer: keeping the frozen {kept.id}")
        return Result(detail={"tokenizer": kept.id, "kept": True})
    ids, vectors_NV = item_vectors(ctx, cfg.embeddings)
    tables = {"item_embeddings": ctx.lake.content_version("item_embeddings")}
    manifest = {"settings": settings, "items": len(ids), "tables": tables, "embedder": embedder_of(ctx)}
    with artifacts.publish_folder(ctx.root, "tokenizer", manifest) as folder:
        books = _fit(cfg, ctx, ids, vectors_NV, folder)
        residual_N = books.encode(vectors_NV)[1]
        manifest |= {"levels": books.levels, "codes": books.codes, "mean_residual": float(residual_N.mean())}
        books.save(folder, {"settings": settings, "mean_residual": round(float(residual_N.mean()), 6)})
        (folder / "fitted_items.json").write_text(json.dumps(ids))
    made = ctx.model("tokenizer")
    ctx.log(f"tokenizer: {made.id}, {books.levels} levels of {books.codes} codes, mean residual {residual_N.mean():.3f}")
    return Result(rows_in=len(ids), rows_out=len(ids), detail={"tokenizer": made.id, "mean_residual": float(residual_N.mean())})


def settings_of(cfg: Config) -> dict[str, Any]:
    """What decides a tokenizer and the codes that it gives, gates aside. It is part of the folder, so of the version's hash."""
    return {
        "tokenizer": cfg.tokenizer.model_dump(mode="json", exclude={"min_uniqueness"}),
        "embeddings": cfg.embeddings.model_dump(mode="json", exclude={"frozen"}),
        "seed": cfg.seed,
    }


def text_model(settings: Embeddings) -> str:
    """Name of the text vectors in `item_embeddings`: of an encoder, the last parts of its id or path, as a partition may be called."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "--", "/".join(Path(settings.encoder).parts[-2:])).strip("-") if settings.encoder else "tfidf_svd"


def item_vectors(ctx: Context, settings: Embeddings) -> tuple[list[str], Floats]:
    """Item ids in order, and (N, V) unit vectors: text beside collaborative_weight times collaborative.

    Raises MissingInputError if the two models' rows do not belong together.
    """
    ids, vectors_NV = vectors_of(ctx, text_model(settings))
    if settings.collaborative_dim and settings.collaborative_weight:
        others, pairs_ND = vectors_of(ctx, PAIRS)
        if others != ids:
            raise MissingInputError(
                "item_embeddings: text and collaborative vectors are of different items: run `gr2 stage item_embeddings` again"
            )
        vectors_NV = np.hstack([vectors_NV, settings.collaborative_weight * pairs_ND])
    norms_N1 = np.linalg.norm(vectors_NV, axis=1, keepdims=True)
    return ids, (vectors_NV / np.where(norms_N1 > 0, norms_N1, 1)).astype(np.float32)


def embedder_of(ctx: Context) -> str:
    """Id of the projection that made the item vectors, as their commit says; empty where it does not."""
    told = json.loads(ctx.lake.content_commit("item_embeddings").get("userMetadata") or "{}")
    return str(told.get("settings", {}).get("embedder", ""))


def vectors_of(ctx: Context, model: str) -> tuple[list[str], Floats]:
    """Item ids in order, and (N, V) vectors of one model. Raises MissingInputError where there are none."""
    table = ctx.lake.read("item_embeddings", ["item_id", "vector"], order_by=["item_id"], model=model)
    if not table.num_rows:
        raise MissingInputError(f"item_embeddings holds no vectors of model {model!r}: run `gr2 stage item_embeddings` first")
    flat = np.concatenate([chunk.flatten().to_numpy() for chunk in table["vector"].chunks])
    return table["item_id"].to_pylist(), flat.reshape(table.num_rows, -1).astype(np.float32)


def _fit(cfg: Config, ctx: Context, ids: list[str], vectors_NV: Floats, folder: Path) -> Codebooks:
    """Runs the builder, its training curve going to metrics.jsonl."""
    with (folder / "metrics.jsonl").open("w") as file:

        def curve(row: dict[str, float]) -> None:
            file.write(json.dumps(row) + "\n")

        if cfg.tokenizer.builder == "rqkmeans":
            from training import rqkmeans

            return rqkmeans.fit(vectors_NV, cfg.tokenizer, cfg.seed, curve)
        from training import rqvae

        pairs_P2 = pair_rows(ctx, ids) if cfg.tokenizer.contrastive else None
        return rqvae.fit(vectors_NV, cfg.tokenizer, cfg.seed, curve, pairs_P2)


def pair_rows(ctx: Context, ids: list[str]) -> NDArray[np.int64]:
    """(P, 2) rows of `ids` that were engaged together in the pretrain split, in both directions."""
    table = ctx.lake.read("item_pairs", ["item_id", "next_item_id"], order_by=["item_id", "next_item_id"], fit="train")
    row_of = {item: i for i, item in enumerate(ids)}
    both = [[row_of.get(i, -1) for i in table[c].to_pylist()] for c in ("item_id", "next_item_id")]
    pairs_P2 = np.array(both, dtype=np.int64).T
    pairs_P2 = pairs_P2[(pairs_P2 >= 0).all(axis=1)]
    return np.concatenate([pairs_P2, pairs_P2[:, ::-1]])


def _kept(ctx: Context, settings: dict[str, Any]) -> artifacts.Artifact | None:
    try:
        current = ctx.model("tokenizer")
    except MissingInputError:
        return None
    return current if current.manifest["settings"] == settings else None
