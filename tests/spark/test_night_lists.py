"""A night's lists: users of the day, what was known at its end, evidence without a future; equal in whichever order nights come."""

import datetime as dt
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_world import day_events
from rerank_world import vector_rows
from sequence_world import ITEMS, START, catalogue, model_named, sasrec_named

import schemas
from gr2 import artifacts
from gr2.artifacts import Artifact
from gr2.config import load
from gr2.context import Context
from gr2.errors import InputError
from spark_jobs import candidates, drift, evidence, interactions, night_lists, rerank_scores
from spark_jobs.publish import publish, publish_rows
from spark_jobs.session import frame_of
from tests.tables import put
from validation import leakage

pytestmark = pytest.mark.spark
SETTINGS = ["candidates.n=5", "candidates.beam=20", "data.max_history=6", "midtrain.history_items=6", "embeddings.collaborative_dim=0"]


def night_of(root: Any, day: int) -> Context:
    """The context of one night."""
    return Context(load("demo", [f"paths.root={root}", *SETTINGS]), START + dt.timedelta(days=day))


def world(ctx: Context) -> None:
    """All that a night finds: items, codes, vectors, a pre-ranker."""
    catalogue(ctx)
    put(ctx, "item_embeddings", vector_rows(np.random.default_rng(4), ITEMS))
    model_named(ctx, "midtrain-refit")
    sasrec_named(ctx, "sasrec-refit")


def run_night(root: Any, day: int, came: list[tuple[str, int, int]]) -> Context:
    """One night: `came` are (user, item, day of the event)."""
    ctx = night_of(root, day)
    publish(ctx, "events", frame_of(ctx, day_events(came)))
    for stage in (interactions, evidence, candidates):
        stage.run(ctx.cfg, ctx)
    return ctx


def lists(ctx: Context) -> dict[str, list[dict[str, Any]]]:
    """Both tables, row for row."""
    keys = {"candidates": ["request_id"], "candidate_features": ["request_id", "item_id"]}
    return {name: ctx.lake.read(name, order_by=key).to_pylist() for name, key in keys.items()}


LOG = {
    30: [("a", 1, 30), ("a", 2, 30), ("b", 5, 30), ("c", 1, 30)],
    31: [("a", 3, 31), ("d", 7, 31)],
    32: [("a", 4, 32), ("b", 6, 32), ("d", 8, 32), ("c", 2, 31)],  # the last came a day late
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A root on which the nights came in their order."""
    root = tmp_path_factory.mktemp("straight")
    world(night_of(root, 30))
    for day, came in LOG.items():
        run_night(root, day, came)
    return root


def test_users_of_the_day_get_lists_of_what_was_known_then(straight):
    ctx = night_of(straight, 32)
    found = ctx.lake.read("candidates", order_by=["night", "user_id"]).to_pylist()
    assert [(r["night"], r["user_id"], r["history_ids"]) for r in found] == [
        ("2026-01-31", "a", ["i1", "i2"]), ("2026-01-31", "b", ["i5"]), ("2026-01-31", "c", ["i1"]),
        ("2026-02-01", "a", ["i1", "i2", "i3"]), ("2026-02-01", "c", ["i1", "i2"]), ("2026-02-01", "d", ["i7"]),
        ("2026-02-02", "a", ["i1", "i2", "i3", "i4"]), ("2026-02-02", "b", ["i5", "i6"]), ("2026-02-02", "d", ["i7", "i8"]),
    ]  # fmt: skip
    for row in found:
        assert row["as_of"] == dt.date.fromisoformat(row["night"]) + dt.timedelta(days=1)
        assert (row["split"], row["fit"], row["target_id"], set(row["grades"])) == ("live", "live", None, {0})
        assert len(set(row["candidate_ids"])) == 5
        assert not set(row["candidate_ids"]) & set(row["history_ids"])
        unborn = {f"i{k}" for k in range(ITEMS) if START + dt.timedelta(days=k) >= row["as_of"]}
        assert not set(row["candidate_ids"]) & unborn
    checks = {f["subject"]: f for f in leakage.audit(ctx)}
    assert checks["history_before_night"]["passed"]
    assert checks["request_fit"]["passed"]


def test_nights_in_any_order_end_alike(straight, tmp_path):
    world(night_of(tmp_path, 30))
    for day in (32, 30, 31):
        run_night(tmp_path, day, LOG[day])
    for root, last in ((straight, 32), (tmp_path, 31)):
        run_night(root, last, [])  # again, with nothing new
    found, wanted = lists(night_of(tmp_path, 30)), lists(night_of(straight, 30))
    for name, rows in wanted.items():
        assert len(found[name]) == len(rows)
        for row, want in zip(found[name], rows, strict=True):
            assert row == want


def test_a_list_holds_what_was_known_that_night_and_was_never_chosen(tmp_path):
    """Fewer items than a list has room for: all of them are in it. One history is longer than data.max_history."""
    ctx = Context(
        load("demo", [f"paths.root={tmp_path}", *SETTINGS, "candidates.n=20", "data.max_history=2"]), START + dt.timedelta(days=10)
    )
    world(ctx)
    publish(ctx, "events", frame_of(ctx, day_events([("a", 1, 8), ("a", 2, 8), ("a", 3, 9), ("a", 4, 10)])))
    for stage in (interactions, evidence, candidates):
        stage.run(ctx.cfg, ctx)
    (row,) = ctx.lake.read("candidates").to_pylist()
    assert row["history_ids"] == ["i3", "i4"]
    assert set(row["candidate_ids"]) == {f"i{k}" for k in range(11)} - {"i1", "i2", "i3", "i4"}
    assert len(row["prior_scores"]) == len(row["candidate_ids"]) == 7


def promote_others(ctx: Context) -> None:
    """Other models than those of the world: a tokenizer that gives each item another's codes, a pre-ranker, a model of whole items."""
    with artifacts.publish_folder(ctx.root, "tokenizer", {}) as folder:
        (folder / "config.json").write_text("{}")
    codes = ctx.lake.read("semantic_ids", order_by=["item_id"]).to_pylist()
    other = [row | {"item_id": of["item_id"], "tokenizer": ctx.model("tokenizer").id} for row, of in zip(codes, codes[::-1], strict=True)]
    put(ctx, "semantic_ids", codes + other)
    model_named(ctx, "midtrain-refit", seed=9)
    sasrec_named(ctx, "sasrec-refit", seed=9)


def test_a_past_night_stands_while_its_data_do_whichever_pre_ranker_is_out(tmp_path):
    ctx = night_of(tmp_path, 30)
    world(ctx)
    run_night(tmp_path, 30, LOG[30])
    before = lists(ctx)
    promote_others(ctx)
    run_night(tmp_path, 31, LOG[31])
    after = {name: [r for r in rows if r["request_id"] in {b["request_id"] for b in before[name]}] for name, rows in lists(ctx).items()}
    assert after == before
    assert {r["model_id"] for r in lists(ctx)["candidates"]} == {before["candidates"][0]["model_id"], ctx.model("midtrain-refit").id}
    version = ctx.lake.version("candidates")
    run_night(tmp_path, 30, [])
    assert ctx.lake.version("candidates") == version, "a night that is asked for again stands, too"
    nights = [START + dt.timedelta(days=d) for d in (30, 31)]
    tokenizers = dict.fromkeys(nights, ctx.model("tokenizer").hash)
    known = night_lists.made_from(ctx, tokenizers)
    for table in ("histories", "pair_days"):  # published apart from the interactions, they may come later than these
        rows = ctx.lake.read(table, order_by=["as_of" if table == "histories" else "event_date"]).to_pylist()
        publish_rows(ctx, table, rows[:-1])
        found = night_lists.made_from(ctx, tokenizers)
        assert [found[n] == known[n] for n in nights] == [True, False]
        publish_rows(ctx, table, rows)


def test_a_late_event_changes_lists_of_a_past_night_by_the_models_of_that_night(tmp_path):
    world(night_of(tmp_path, 30))
    ctx = run_night(tmp_path, 30, LOG[30])
    served = lists(ctx)["candidates"]
    old, *_ = {row["model_id"] for row in served}
    promote_others(ctx)
    scored = dict.fromkeys(schemas.get("rerank_scores").names(), "") | {"model": "rl", "model_id": "rl@old", "split": "live"}
    scored |= dict.fromkeys(("new_order", "label_logprobs")) | {"labels": [], "shown": []}
    scored |= dict.fromkeys(("replica", "prompt_tokens", "completion_tokens", "seconds"), 0)
    put(ctx, "rerank_scores", [scored | {"request_id": r["request_id"], "night": r["night"]} for r in served])

    later = run_night(tmp_path, 31, [*LOG[31], ("e", 9, 30)])
    found = ctx.lake.read("candidates", order_by=["request_id"], night="2026-01-31").to_pylist()
    kept = [row for row in found if row["user_id"] != "e"]
    assert kept == [row | {"prior_scores": pytest.approx(row["prior_scores"], abs=1e-5)} for row in served], "but for what shares a batch"
    (late,) = (row for row in found if row["user_id"] == "e")
    assert late["model_id"] == old
    new = Artifact("rl", "new", tmp_path, {})
    assert rerank_scores.nights_of(later, [new]) == {"2026-01-31": [late["request_id"]], "2026-02-01": None}

    shorter = Context(load("demo", [f"paths.root={tmp_path}", *SETTINGS, "candidates.n=4"]), ctx.date)
    candidates.run(shorter.cfg, shorter)
    asked = ctx.lake.read("candidates", order_by=["request_id"], night="2026-01-31").to_pylist()
    assert [row["candidate_ids"] for row in asked] == [row["candidate_ids"][:4] for row in found], "other settings, the same models"
    shutil.rmtree(tmp_path / "models" / old.replace("@", "/"))
    run_night(tmp_path, 32, [("f", 9, 30)])
    assert ctx.lake.read("candidates", order_by=["request_id"], night="2026-01-31").to_pylist() == asked, "nothing can make it again"
    assert "1 other nights have other data now, but the models" in (tmp_path / "logs" / "gr2.log").read_text()


def test_evidence_as_of_a_night_holds_no_later_day(straight):
    ctx = night_of(straight, 32)
    pairs, stats = evidence.as_of(ctx, ctx.cfg.evidence, START + dt.timedelta(days=31))
    assert {(r["item_id"], r["next_item_id"]) for r in pairs.collect()} == {("i1", "i2"), ("i2", "i3"), ("i1", "i3")}
    assert {r["item_id"]: r["count"] for r in stats.collect()} == {"i1": 2, "i2": 2, "i3": 1, "i5": 1, "i7": 1}
    assert {r["reference_date"] for r in stats.collect()} == {START + dt.timedelta(days=31)}


def test_drift_is_of_a_night(make_ctx):
    ctx = make_ctx()
    with pytest.raises(InputError, match="--date"):
        drift.run(ctx.cfg, ctx)
