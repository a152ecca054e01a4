"""Stage `sasrec` on a ring that users walk along: it learns what follows, each fit from its own splits, once."""

import datetime as dt
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from gr2 import pipeline
from gr2.context import Context
from gr2.errors import InputError
from scoring.sasrec import SASRec, load
from tests.tables import put
from training import loop, sasrec
from training.data import to_batch

pytestmark = pytest.mark.e2e
ITEMS = 24
TRAINING = "epochs: 40, lr: 0.01, tokens_per_batch: 256, weight_decay: 0"
SMALL = [f"sasrec={{hidden: 32, layers: 1, heads: 2, places: 12, dropout: 0.0, train: {{{TRAINING}}}}}"]


def world(ctx: Context, length: int = 8) -> list[int]:
    """Users go along the ring in threes; the last three items are for rerank, valid and test. Returns where each starts."""
    starts = np.random.default_rng(3).integers(ITEMS, size=80).tolist()
    rows = [
        {
            "user_id": f"u{user:02}",
            "ordinal": k + 1,
            "item_id": f"i{(start + 3 * k) % ITEMS:02}",
            "split": split_of(k, length),
            "event_id": f"e{user}:{k}",
            "kind": "click",
            "session": 1,
            "event_time": dt.datetime(2026, 1, k + 1, tzinfo=dt.UTC),
            "event_date": dt.date(2026, 1, k + 1),
            "day_known": True,
            "period": "2026",
        }
        for user, start in enumerate(starts)
        for k in range(length)
    ]
    put(ctx, "interactions", [rows[i] for i in np.random.default_rng(4).permutation(len(rows))])
    return starts


def split_of(place: int, length: int) -> str:
    return {length - 3: "rerank", length - 2: "valid", length - 1: "test"}.get(place, "pretrain")


def test_parts_of_the_loss_change_neither_it_nor_gradients(make_ctx: Callable[..., Context], monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = make_ctx(SMALL)
    world(ctx)
    items, sequences = sasrec.read_sequences(ctx, "train")
    batch = to_batch(sasrec.rows_of(sequences, 12), slice(None))
    told = []
    for most in (10_000, 7):
        monkeypatch.setattr(loop, "CHUNK", most)
        torch.manual_seed(1)
        model = SASRec(items, ctx.cfg.sasrec)
        loss, _ = sasrec.next_item_loss(model, batch)
        loss.backward()
        told.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(told[0], told[1])


def test_each_fit_learns_what_follows_in_its_splits(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx(SMALL)
    starts = world(ctx)
    result = sasrec.run(ctx.cfg, ctx)
    assert set(result.detail) == {"sasrec", "sasrec-refit"}
    for name, known in (("sasrec", 5), ("sasrec-refit", 6)):
        artifact = ctx.model(name)
        model = load(artifact.path)
        number = {item: place for place, item in enumerate(model.names, 1)}
        walks = [[(s + 3 * k) % ITEMS for k in range(known + 1)] for s in starts]
        told = model.after([[number[f"i{i:02}"] for i in walk[:-1]] for walk in walks]).argmax(dim=1)
        assert np.mean([model.names[n - 1] == f"i{walk[-1]:02}" for n, walk in zip(told.tolist(), walks, strict=True)]) > 0.95
        lines = [json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["loss"] == pytest.approx(np.log(ITEMS), rel=0.2), "a softmax over all items, not yet taught"
        assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
        assert {len(s) for s in sasrec.read_sequences(ctx, sasrec.FIT[name])[1]} == {known}, "every user shows the splits of the fit"
    again = sasrec.run(ctx.cfg, ctx)
    assert again.detail == result.detail, "trained models are kept"


def test_without_it_nothing_is_made_and_the_stage_counts_as_done(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx(["sasrec.share=0"])
    world(ctx)
    stage = pipeline.get("sasrec")
    print_ = pipeline.fingerprint(stage, ctx.cfg, ctx)
    assert not pipeline.up_to_date(stage, ctx, print_)
    assert pipeline.execute(stage, ctx.cfg, ctx, print_).detail == {}
    assert not (ctx.root / "models" / "sasrec").exists()
    assert pipeline.up_to_date(stage, ctx, print_)


def test_users_of_one_item_teach_no_order(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx(SMALL)
    world(ctx, length=4)  # one item each is left for fit train
    with pytest.raises(InputError, match="no user has two items in pretrain"):
        sasrec.run(ctx.cfg, ctx)
