"""New models are promoted only if they beat those that are out, on the requests of both."""

import datetime as dt
import json

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

import schemas
from validation import gate

LIST = ["a", "b", "c", "d", "e"]


def put(ctx, name: str, rows: list[dict]) -> None:
    """A new version of a table."""
    write_deltalake(ctx.table_path(name), pa.Table.from_pylist(rows, schema=schemas.get(name).arrow()), mode="overwrite")


def request(n: int, listed: bool = True) -> dict:
    """A validation request whose target is the third of the list, or in none."""
    row = dict.fromkeys(schemas.get("candidates").names(), None) | {"request_id": f"valid:u{n}:9", "split": "valid", "user_id": f"u{n}"}
    row |= {"source": "beam", "model_id": "m", "fit": "train", "as_of": dt.date(2026, 1, 1), "history_ids": ["x"], "history_days": [1]}
    row |= {
        "candidate_ids": LIST if listed else ["a", "b", "x", "d", "e"],
        "prior_scores": [0.0] * 5,
        "grades": [0] * 5,
        "slice": "later_day",
        "night": "none",
    }
    return row | {"target_id": "c", "target_rank": 3 if listed else None}


def answer(n: int, digest: str, place: int) -> dict:
    """The model puts the target at a place, from 1."""
    order = [i for i in LIST if i != "c"]
    order.insert(place - 1, "c")
    row = dict.fromkeys(schemas.get("rerank_scores").names(), None) | {"request_id": f"valid:u{n}:9", "model_id": f"rl@{digest}"}
    row |= {"model": "rl", "mode": "score", "replica": 0, "split": "valid", "status": "ok", "new_order": order, "labels": LIST}
    row |= {"shown": [0] * 5, "reasoning": "", "text": "", "prompt_hash": "", "prompt_tokens": 1, "completion_tokens": 1}
    return row | {"seconds": 0.0, "night": "none"}


def release(ctx, digest: str) -> None:
    """Promotes a model with the tables as they are."""
    pins = {"tables": {t: ctx.lake.version(t) for t in ("candidates", "rerank_scores")}, "models": {"rl": digest}}
    row = {"release_id": "r", "status": "promoted", "profile": "demo", "run_id": "x", "pins": json.dumps(pins), "code": "c"}
    row |= {"config_hash": "h", "lock_hash": "l", "seed": 1, "promoted_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)}
    put(ctx, "releases", [row])


def compared(make_ctx, places: tuple[int, int], count: int = 80, *settings: str):
    """The finding, if the old model puts targets at one place and the new one about another."""
    ctx = make_ctx(list(settings))
    rng = np.random.default_rng(1)
    put(ctx, "candidates", [request(n) for n in range(count)])
    put(ctx, "rerank_scores", [answer(n, "old", places[0]) for n in range(count)])
    release(ctx, "old")
    put(ctx, "candidates", [request(n, n % 10 != 0) for n in range(10, count + 10)])  # other lists, other users at the edges
    put(ctx, "rerank_scores", [answer(n, "new", min(5, places[1] + int(rng.integers(2)))) for n in range(10, count + 10) if n % 10])
    ctx.pin("models", "rl", "new")
    return gate.compare(ctx.cfg, ctx)


@pytest.mark.parametrize(("places", "passes"), [((3, 1), True), ((1, 3), False)])
def test_only_the_better_passes(make_ctx, places, passes):
    found = compared(make_ctx, places)
    assert found["passed"] is passes
    assert (found["value"] > 0) is passes
    assert "70 validation requests" in found["subject"]


def test_a_target_that_the_new_lists_miss_counts_as_nothing(make_ctx):
    found = compared(make_ctx, (3, 3))
    assert -0.5 < found["value"] < 0
    assert not found["passed"]


def test_too_few_common_requests_promote_nothing_and_say_what_to_do(make_ctx):
    found = compared(make_ctx, (3, 1), 40)
    assert (found["value"], found["passed"]) == (None, False)
    assert "release.gate=false" in found["detail"]


def test_nothing_is_compared_without_an_older_release_or_with_the_gate_off(make_ctx):
    ctx = make_ctx()
    ctx.pin("models", "rl", "new")
    assert gate.compare(ctx.cfg, ctx) is None
    assert compared(make_ctx, (3, 1), 80, "release.gate=false") is None
