"""New models are promoted only if they beat those that are out, on the requests of both."""

import datetime as dt
import json
import math
import re

import numpy as np
import pytest

import schemas
from gr2.context import Context
from spark_jobs import prompting, rerank_scores
from spark_jobs.release import _release
from tests.tables import put
from validation import gate

LIST = ["a", "b", "c", "d", "e"]


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


def release(ctx, digest: str, models: tuple[str, ...] = ("rl",)) -> None:
    """Promotes models with the tables as they are."""
    pins = {"tables": {t: ctx.lake.version(t) for t in ("candidates", "rerank_scores")}, "models": dict.fromkeys(models, digest)}
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


def test_only_the_sample_that_was_asked_is_compared_and_its_misses_are_no_answers(make_ctx):
    """Of 400 requests 40 are asked for, half of them with the target in the list; the rest, hits and misses, is of another population."""
    settings = ["release.requests=40", "release.metric=mrr"]
    ctx = make_ctx([*settings, "release.min_requests=10"])
    lists = [request(n, n % 2 == 0) for n in range(400)]
    hits = {row["request_id"] for row in lists if row["target_rank"]}
    asked = gate.sample([row["request_id"] for row in lists], ctx.cfg)
    wanted = [n for n in range(400) if f"valid:u{n}:9" in hits.intersection(asked)]
    put(ctx, "candidates", lists)
    put(ctx, "rerank_scores", [answer(n, digest, place) for n in wanted for digest, place in (("old", 2), ("new", 1))])
    release(ctx, "old")
    ctx.pin("models", "rl", "new")
    found = gate.compare(ctx.cfg, ctx)
    assert "on 40 validation requests" in found["subject"]
    assert found["value"] == pytest.approx(0.5 * len(wanted) / 40)
    strict = make_ctx([*settings, "release.min_requests=40"])  # misses and hits together are as many, answers are not
    found = gate.compare(strict.cfg, strict)
    assert (found["value"], found["passed"]) == (None, False)
    assert f"both answered {len(wanted)} of the same requests, of 40" in found["detail"]


def test_what_is_compared_is_what_the_models_are_asked(make_ctx, monkeypatch):
    ctx = make_ctx(["release.requests=40"])
    lists = [request(n, n % 2 == 0) for n in range(400)]
    put(ctx, "candidates", lists)
    drawn = gate.sample([row["request_id"] for row in lists], ctx.cfg)
    assert sorted(drawn) == prompting.sample([row["request_id"] for row in lists], 40, ctx.cfg.seed, "gate"), "as earlier releases drew"
    asked = []
    monkeypatch.setattr(rerank_scores, "views", lambda *given: asked.extend(given[3]) or iter(()))
    rerank_scores._gate_views(ctx.cfg, ctx)
    assert set(asked) == {row["request_id"] for row in lists if row["target_rank"]} & set(drawn)


def test_a_release_whose_sample_was_smaller_is_compared_on_that(make_ctx):
    ctx = make_ctx(["release.requests=400", "release.min_requests=10"])
    lists = [request(n, n % 2 == 0) for n in range(400)]
    put(ctx, "candidates", lists)
    smaller = ctx.cfg.model_copy(update={"release": ctx.cfg.release.model_copy(update={"requests": 40})})
    first = gate.sample([row["request_id"] for row in lists], smaller)
    old = [n for n in range(0, 400, 2) if f"valid:u{n}:9" in first]
    put(ctx, "rerank_scores", [answer(n, "old", 2) for n in old] + [answer(n, "new", 1) for n in range(0, 400, 2)])
    release(ctx, "old")
    ctx.pin("models", "rl", "new")
    found = gate.compare(ctx.cfg, ctx)
    assert 40 <= int(re.search(r"on (\d+) validation requests", found["subject"])[1]) < 60, "up to the next request that has its target"


def promote(ctx, lists: list[dict], answers: list[dict], digest: str) -> None:
    """A build's lists and answers, and its release by the stage's own code."""
    put(ctx, "candidates", lists)
    put(ctx, "rerank_scores", answers)
    ctx.pin("models", "rl", digest)
    succeed(ctx)


def succeed(ctx) -> None:
    """Promotes a context's draft with the tables as they are."""
    for table in gate.JUDGED:
        ctx.pin("tables", table, ctx.lake.version(table))
    put(ctx, "releases", [_release(ctx.cfg, ctx, ctx.promoted)])


@pytest.mark.parametrize("listed", [10, 2])
def test_a_night_while_new_models_are_made_changes_nothing_of_the_comparison(make_ctx, listed):
    """The new lists lose a tenth, or half, of the targets; the night's release pins the tables as the retraining has left them by then."""
    ctx = make_ctx()
    lost = [n for n in range(200) if n % listed == 0]
    old, new = ([answer(n, digest, place) for n in range(200)] for digest, place in (("old", 2), ("new", 1)))
    promote(ctx, [request(n) for n in range(200)], old, "old")
    put(ctx, "candidates", [request(n, n not in lost) for n in range(200)])
    put(ctx, "rerank_scores", old + [row for n, row in enumerate(new) if n not in lost])
    ctx.pin("models", "rl", "new")
    alone = gate.compare(ctx.cfg, ctx)
    for day in (1, 2):
        succeed(Context(ctx.cfg, dt.date(2026, 1, day)))
    assert gate.compare(ctx.cfg, ctx) == alone
    assert alone["passed"] is (listed == 10)


def test_an_answer_to_another_list_is_none(make_ctx):
    ctx = make_ctx()
    put(ctx, "candidates", [request(n) for n in range(80)])
    put(ctx, "rerank_scores", [answer(n, "old", 3) | ({} if n % 2 else {"new_order": ["a", "b", "x", "d", "e"]}) for n in range(80)])
    places = gate.target_places(ctx.cfg, ctx.lake, "rl@old", "score")
    assert {(place.rank, place.answered) for place in places.values()} == {(3.0, True), (math.inf, False)}


@pytest.mark.parametrize("silent", ["old", "new"])
def test_a_model_that_answered_nothing_is_not_promoted_and_named(make_ctx, silent):
    ctx = make_ctx()
    put(ctx, "candidates", [request(n, n % 2 == 0) for n in range(200)])
    other = {"old": "new", "new": "old"}[silent]
    put(ctx, "rerank_scores", [answer(n, other, 1) for n in range(0, 200, 2)])
    release(ctx, "old")
    ctx.pin("models", "rl", "new")
    found = gate.compare(ctx.cfg, ctx)
    assert (found["value"], found["passed"]) == (None, False)
    assert f"rl@{silent} answered none" in found["detail"]


def test_the_interval_draws_users_who_are_fewer_than_requests(make_ctx):
    """The same gains of 80 requests: of 80 users, or of 8 users with ten equal ones each."""
    widths = {}
    for users in (80, 8):
        ctx = make_ctx()
        put(ctx, "candidates", [request(n) | {"user_id": f"u{n % users}"} for n in range(80)])
        places = {"old": [3] * 80, "new": [1 + 2 * (n % 8 % 2) for n in range(80)]}
        put(ctx, "rerank_scores", [answer(n, digest, place) for digest, found in places.items() for n, place in enumerate(found)])
        release(ctx, "old")
        ctx.pin("models", "rl", "new")
        low, high = re.search(r"interval \[(\S+), (\S+)\]", gate.compare(ctx.cfg, ctx)["detail"]).groups()
        widths[users] = float(high) - float(low)
    assert widths[8] > 2 * widths[80]


def test_nothing_is_compared_without_an_older_release_or_with_the_gate_off(make_ctx):
    ctx = make_ctx()
    ctx.pin("models", "rl", "new")
    assert gate.compare(ctx.cfg, ctx) is None
    assert compared(make_ctx, (3, 1), 80, "release.gate=false") is None


@pytest.mark.parametrize(
    ("live", "lacks"),
    [("nosuch", "the promoted release has no model 'nosuch'"), ("opd", "the promoted release has no"), ("sft", "the new release has no")],
)
def test_a_live_model_that_either_release_lacks_does_not_pass_and_is_named(make_ctx, live, lacks):
    ctx = make_ctx([f"scoring.live={{{live}: [score]}}"])
    put(ctx, "candidates", [])
    put(ctx, "rerank_scores", [])
    release(ctx, "old", ("rl", "sft"))
    for name in ("rl", "opd"):
        ctx.pin("models", name, "new")
    found = gate.compare(ctx.cfg, ctx)
    assert (found["value"], found["passed"]) == (None, False)
    assert lacks in found["detail"]
    assert "scoring.live" in found["detail"]
