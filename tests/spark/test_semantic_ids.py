"""Codes of items, end to end: vectors -> tokenizer -> table; a bijection that new items do not disturb."""

import datetime as dt
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from item_world import put_items, put_pairs

from gr2 import sids
from gr2.context import Context
from gr2.errors import AuditError, MissingInputError
from schemas import get
from spark_jobs import item_embeddings, semantic_ids
from spark_jobs import publish as publishing
from tests.tables import put
from training import tokenizer

pytestmark = pytest.mark.spark

SMALL = [
    "embeddings.text_dim=12",
    "embeddings.collaborative_dim=6",
    "tokenizer.levels=3",
    "tokenizer.codes=8",
    "tokenizer.dim=6",
    "tokenizer.hidden=16",
    "tokenizer.steps=80",
    "tokenizer.min_uniqueness=0.3",
]


def codes(ctx: Context) -> dict[str, dict[str, Any]]:
    version = ctx.model("tokenizer").id
    return {r["item_id"]: r for r in ctx.lake.read("semantic_ids", order_by=["item_id"], tokenizer=version).to_pylist()}


def audits(ctx: Context) -> dict[str, dict[str, Any]]:
    return {r["subject"]: r for r in json.loads((ctx.work("audits") / "semantic_ids.json").read_text())}


def test_bijection_rerun_and_inserts(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx([*SMALL, "embeddings.frozen=true", "embeddings.collaborative_dim=0"])
    ids = put_items(ctx, 60)
    put_pairs(ctx, ids, "train", shift=0)
    item_embeddings.run(ctx.cfg, ctx)
    tokenizer.run(ctx.cfg, ctx)
    made = ctx.model("tokenizer")
    assert (made.path / "metrics.jsonl").read_text().count("\n") >= 3
    assert json.loads((made.path / "fitted_items.json").read_text()) == ids
    result = semantic_ids.run(ctx.cfg, ctx)
    assert result.detail["added"] == result.rows_out == 60

    first = codes(ctx)
    trie = sids.Trie.build(np.array([r["codes"] for r in first.values()]))
    assert len(trie.items) == 60
    for row in first.values():
        assert row["token_text"] == sids.to_text(row["codes"])
        assert row["separated"] == (row["codes"] != row["learned_codes"])
        assert max(row["codes"]) < 8
    checks = audits(ctx)
    distinct = len({tuple(r["learned_codes"]) for r in first.values()}) / 60
    assert checks["learned distinct/items"]["value"] == pytest.approx(distinct)
    assert checks["learned distinct/items"]["low"] == 0.3
    assert checks["published share alone"]["value"] == 1.0
    assert checks["pairs sharing 1 code lift"]["value"] > 1.5  # pairs are of one topic, and so are codes

    version = ctx.lake.version("semantic_ids")
    tokenizer.run(ctx.cfg, ctx)
    semantic_ids.run(ctx.cfg, ctx)
    assert ctx.model("tokenizer").id == made.id
    assert ctx.lake.version("semantic_ids") == version

    put_items(ctx, 75)
    item_embeddings.run(ctx.cfg, ctx)
    assert tokenizer.run(ctx.cfg, ctx).detail["kept"]
    assert semantic_ids.run(ctx.cfg, ctx).detail["added"] == 15
    second = codes(ctx)
    assert {k: v for k, v in second.items() if k in first} == first
    assert len({r["token_text"] for r in second.values()}) == 75
    assert audits(ctx)["drift: residual of new items over fitted"]["value"] > 0

    thawed = make_ctx(
        [*SMALL, "tokenizer.contrastive=0.1", "embeddings.collaborative_dim=0"]
    )  # other settings, not frozen: a new version, twice the same
    hashes = [tokenizer.run(thawed.cfg, thawed).detail["tokenizer"] for _ in range(2)]
    assert hashes[0] == hashes[1] != made.id


def test_items_that_nothing_tells_apart_are_no_fault_of_the_codes(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx([*SMALL, "tokenizer.builder=rqkmeans", "tokenizer.min_uniqueness=0.7", "embeddings.collaborative_dim=0"])
    put_pairs(ctx, put_items(ctx, 20), "train", shift=0)
    rows = ctx.lake.read("items").to_pylist()
    put(ctx, "items", [row | ({"text": "gift card"} if place % 2 else {}) for place, row in enumerate(rows)])
    for stage in (item_embeddings, tokenizer, semantic_ids):
        stage.run(ctx.cfg, ctx)
    check = audits(ctx)["learned distinct/items"]
    assert check["low"] == pytest.approx(0.7 * 11 / 20)
    assert len({r["token_text"] for r in codes(ctx).values()}) == 20


def test_codes_come_from_vectors_of_the_projection_that_the_tokenizer_knows(make_ctx: Callable[..., Context]) -> None:
    """Another build's vectors are refused by name, as wide as they are; the build itself reads its own, and a night makes them anew."""
    settings = [*SMALL, "tokenizer.builder=rqkmeans", "tokenizer.min_uniqueness=0"]
    ctx, other = make_ctx(settings), make_ctx([*settings, "seed=9"])
    ids = put_items(ctx, 20)
    put_pairs(ctx, ids, "train", shift=0)
    for stage in (item_embeddings, tokenizer, semantic_ids):
        stage.run(ctx.cfg, ctx)
    first, pins = codes(ctx), dict(ctx.pins["tables"])
    released = {name: ctx.model(name).hash for name in ("embedder", "tokenizer")}
    assert ctx.model("tokenizer").manifest["embedder"] == ctx.model("embedder").id
    put_items(ctx, 24)
    item_embeddings.run(other.cfg, other)
    assert other.model("embedder").hash != released["embedder"]
    with pytest.raises(MissingInputError, match=r"item_embeddings holds vectors of embedder@\w+, and tokenizer@\w+ was fitted on those of"):
        semantic_ids.run(ctx.cfg, ctx)
    ctx.pin("tables", "item_embeddings", pins["item_embeddings"])
    with ctx.drafted(["item_embeddings"]):
        assert semantic_ids.run(ctx.cfg, ctx).detail["added"] == 0
    assert codes(ctx) == first
    row = dict.fromkeys(get("releases").names(), "") | {"status": "promoted", "pins": json.dumps({"models": released}), "seed": 1}
    put(ctx, "releases", [row | {"promoted_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)}])
    night, before = Context(ctx.cfg, dt.date(2026, 1, 2)), audits(ctx)
    with pytest.raises(MissingInputError, match="item_embeddings --date 2026-01-02"):
        semantic_ids.run(night.cfg, night)
    item_embeddings.run(night.cfg, night)
    assert semantic_ids.run(night.cfg, night).detail["added"] == 4
    assert audits(ctx) == before, "a build's audits are its own"


def test_of_two_nights_at_once_neither_loses_the_others_items(make_ctx: Callable[..., Context], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage is held where it has audited what it wrote, while another run brings more items through the whole chain."""
    ctx = make_ctx([*SMALL, "tokenizer.builder=rqkmeans", "embeddings.frozen=true", "tokenizer.min_uniqueness=0"])
    ids = put_items(ctx, 20)
    put_pairs(ctx, ids, "train", shift=0)
    for stage in (item_embeddings, tokenizer, semantic_ids):
        stage.run(ctx.cfg, ctx)
    first, count = codes(ctx), 20
    for stage, table in ((item_embeddings, "item_embeddings"), (semantic_ids, "semantic_ids")):
        put_items(ctx, count + 1)
        if table == "semantic_ids":
            item_embeddings.run(ctx.cfg, ctx)
        came: list[str] = []

        def reached(point: str, name: str, table: str = table, came: list[str] = came, more: int = count + 3) -> None:
            if (point, name) == ("audited", table) and not came:
                came.append(name)
                put_items(ctx, more)
                item_embeddings.run(ctx.cfg, ctx)
                semantic_ids.run(ctx.cfg, ctx)

        with monkeypatch.context() as held:
            held.setattr(publishing, "reached", reached)
            stage.run(ctx.cfg, ctx)
        count += 3
        models = ctx.lake.read("item_embeddings", ["model"])["model"].to_pylist()
        assert came
        assert {model: models.count(model) for model in models} == {"pairs_svd": count, "tfidf_svd": count}
        assert len(codes(ctx)) == count
    assert {k: v for k, v in codes(ctx).items() if k in first} == first


def test_low_uniqueness_publishes_nothing_and_keeps_the_evidence(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx([*SMALL, "tokenizer.builder=rqkmeans", "tokenizer.levels=2", "tokenizer.codes=4", "tokenizer.min_uniqueness=0.99"])
    with pytest.raises(MissingInputError, match="gr2 stage item_embeddings"):
        tokenizer.run(ctx.cfg, ctx)
    ids = put_items(ctx, 16)
    put_pairs(ctx, ids, "train", shift=0)
    item_embeddings.run(ctx.cfg, ctx)
    tokenizer.run(ctx.cfg, ctx)
    with pytest.raises(AuditError, match=r"learned distinct/items is 0\.\d+, at least 0\.9900 is asked"):
        semantic_ids.run(ctx.cfg, ctx)
    assert not ctx.lake.exists("semantic_ids")
    assert not audits(ctx)["learned distinct/items"]["passed"]
