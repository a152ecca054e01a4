"""Stage `semantic_ids`: gives every item its codes under the frozen tokenizer.

Reads    `item_embeddings`, the model `tokenizer`, the codes that it gave before, and `item_pairs` of fit `train` (health only).
Writes   `semantic_ids`: one item and tokenizer version; key tokenizer, item_id. One partition a version, named by the model's id.
         `work/audits/semantic_ids.json`: the health figures as rows for `audits`; of a night in a folder of its own.
Rerun    items that have codes under this version keep them, row for row; only new items get codes, among the free ones
         (DESIGN contract 8). At night an item without any text waits. Without new items the content stays equal.

    gr2 stage semantic_ids --profile demo
"""

import datetime as dt
import json
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gr2.artifacts import Artifact
from gr2.config import Config, Embeddings, Tokenizer
from gr2.context import Context, Result
from gr2.errors import MissingInputError
from gr2.sids import to_text
from schemas import get
from spark_jobs.increments import building, until_settled
from spark_jobs.publish import publish
from spark_jobs.session import frame_of
from training.codebooks import Codebooks, Floats
from training.collisions import separate
from training.tokenizer import embedder_of, item_vectors, pair_rows
from validation import sid_health

TABLE = get("semantic_ids")


def run(cfg: Config, ctx: Context) -> Result:
    """Encodes, separates, audits and publishes."""
    return until_settled(ctx, lambda: _build(cfg, ctx))


def _build(cfg: Config, ctx: Context) -> Result:
    """Adds codes to those that are there: items that another run adds meanwhile are never overwritten."""
    now = building(cfg, ctx, "semantic_ids", "semantic_ids", "item_embeddings")
    model = ctx.model("tokenizer")
    books, config = Codebooks.load(model.path)
    settings = Tokenizer.model_validate(config["settings"]["tokenizer"])  # as it was fitted, whatever the profile says today
    _same_space(ctx, model)
    ids, vectors_NV = item_vectors(ctx, Embeddings.model_validate(config["settings"]["embeddings"]))
    old = _published(ctx, model.id)
    if ctx.date and (waiting := _nameless(ctx) - set(old["item_id"].to_pylist())):
        ctx.log(f"semantic_ids: {len(waiting)} new items have no text yet: they get codes once their metadata come, or in the next build")
        rows = [row for row, item in enumerate(ids) if item not in waiting]
        ids, vectors_NV = [ids[row] for row in rows], vectors_NV[rows]
    new = added_rows(books, settings, int(config["settings"]["seed"]), ids, vectors_NV, old, model.id, ctx.day)
    table = pa.concat_tables([old, new])
    found = health(table, books.codes, pair_rows(ctx, table["item_id"].to_pylist()))
    if new.num_rows and old.num_rows:
        found["drift: residual of new items over fitted"] = float(np.mean(new["residual"].to_numpy())) / max(config["mean_residual"], 1e-9)
    unlike = len(np.unique(vectors_NV.round(6), axis=0)) / max(1, len(ids))  # no tokenizer tells equal vectors apart
    audits = sid_health.audits(found, cfg.tokenizer.min_uniqueness * unlike)
    folder = ctx.work("audits", ctx.runs.name) if ctx.date else ctx.work("audits")  # what a build's `evaluation` takes up is its own
    (folder / "semantic_ids.json").write_text(json.dumps(audits, indent=1))
    sid_health.gate(audits, books.builder)
    publish(ctx, "semantic_ids", frame_of(ctx, table), partition={"tokenizer": model.id}, built=now)
    detail = {"tokenizer": model.id, "added": new.num_rows, **found}
    return Result(rows_in=len(ids), rows_out=table.num_rows, detail=detail)


def _same_space(ctx: Context, model: Artifact) -> None:
    """Raises MissingInputError where the vectors are of another projection than the tokenizer was fitted on: a code stays for good."""
    fitted, found = model.manifest.get("embedder"), embedder_of(ctx)
    if fitted and found and fitted != found:
        raise MissingInputError(
            f"item_embeddings holds vectors of {found}, and {model.id} was fitted on those of {fitted}: "
            + (f"run `gr2 stage item_embeddings --date {ctx.date}` again" if ctx.date else "run `gr2 run --from item_embeddings`")
        )


def added_rows(
    books: Codebooks, settings: Tokenizer, seed: int, ids: list[str], vectors_NV: Floats, old: pa.Table, version: str, day: dt.date
) -> pa.Table:
    """Rows for the items that have no codes yet. Raises ModelError where the codes are used up."""
    known = set(old["item_id"].to_pylist())
    fresh = [i for i, item in enumerate(ids) if item not in known]
    learned_NL, residual_N = books.encode(vectors_NV[fresh])
    taken_ML = np.array(old["codes"].to_pylist(), dtype=np.int64).reshape(old.num_rows, books.levels)
    codes_NL = separate(learned_NL, books.latent(vectors_NV[fresh]), books.books_LKD, settings, seed, taken_ML)
    columns: dict[str, Any] = {
        "tokenizer": [version] * len(fresh),
        "item_id": [ids[i] for i in fresh],
        "codes": codes_NL.tolist(),
        "token_text": [to_text(codes) for codes in codes_NL],
        "learned_codes": learned_NL.tolist(),
        "separated": (codes_NL != learned_NL).any(axis=1).tolist(),
        "residual": residual_N.astype(float).round(5).tolist(),  # its last digits depend on which items share the call
        "added_on": [day] * len(fresh),
    }
    return pa.table(columns, schema=TABLE.arrow())


def health(table: pa.Table, codes: int, pairs_P2: NDArray[np.int64]) -> dict[str, float]:
    """Health figures of one version's rows."""
    learned_NL, codes_NL = (np.array(table[c].to_pylist(), dtype=np.int64) for c in ("learned_codes", "codes"))
    return sid_health.figures(learned_NL, codes_NL, table["residual"].to_numpy(), codes) | sid_health.agreement(learned_NL, pairs_P2)


def _nameless(ctx: Context) -> set[str]:
    """Items that events name and no metadata describe: a code stays for good, so at night none is drawn from nothing."""
    return set(ctx.lake.read("items", ["item_id"], has_text=False)["item_id"].to_pylist())


def _published(ctx: Context, version: str) -> pa.Table:
    """Rows that this version has already, in order of item id."""
    if not ctx.lake.exists("semantic_ids"):
        return TABLE.arrow().empty_table()
    return ctx.lake.read("semantic_ids", TABLE.names(), order_by=["item_id"], tokenizer=version).cast(TABLE.arrow())
