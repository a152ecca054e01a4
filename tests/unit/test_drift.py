"""The stability index against its definition and its noise; a drifted night is found, one like the days before is not."""

import datetime as dt
import math
import random

import numpy as np
import pytest
from test_gate import answer, release, request

import schemas
from tests.tables import put
from validation import drift

NIGHT = dt.date(2026, 2, 1)


def test_the_index_is_that_of_the_definition():
    index, chance = drift.stability({"a": 50, "b": 50}, {"a": 80, "b": 20})
    assert index == pytest.approx(0.3 * math.log(0.8 / 0.5) - 0.3 * math.log(0.2 / 0.5))
    assert chance == pytest.approx(1 / 100 + 1 / 100)
    assert drift.stability({"a": 3, "b": 7}, {"a": 3, "b": 7})[0] == 0
    assert drift.stability({"a": 10}, {"b": 10})[0] == pytest.approx(2 * (1 - drift.FLOOR) * math.log(1 / drift.FLOOR))
    with pytest.raises(ValueError, match="one side"):
        drift.stability({}, {"a": 1})


def test_without_drift_the_index_is_what_chance_gives():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(400):
        before, now = (dict(enumerate(rng.multinomial(n, [0.4, 0.3, 0.2, 0.1]))) for n in (2000, 300))
        index, chance = drift.stability(before, now)
        found.append(index - chance)
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    assert np.quantile(found, 0.99) < 0.05


@pytest.mark.parametrize(("share", "passes"), [(0.1, True), (0.6, False)])
def test_kinds_of_events_that_move_are_found(ctx, share, passes):
    rows = []
    for day in range(29):
        kinds = ["purchase"] * round(200 * (share if day == 28 else 0.1))
        kinds += ["click"] * (200 - len(kinds))
        date = NIGHT - dt.timedelta(days=28 - day)
        for n, kind in enumerate(kinds):
            event = dict.fromkeys(schemas.get("events").names())
            event |= {"event_id": f"{day}-{n}", "kind": kind, "user_id": "u", "item_id": "i", "event_date": date, "day_known": True}
            event |= {
                "event_time": dt.datetime.combine(date, dt.time(n % 24), dt.UTC),
                "source_file": "f",
                "ingest_date": date,
                "period": "2026",
            }
            rows.append(event)
    put(ctx, "events", rows)
    found = {f["subject"]: f for f in drift.audit(ctx, NIGHT, 28, 0.25, "", [])}
    assert found["kinds of events"]["passed"] is passes
    assert found["hours of events"]["passed"]
    assert set(found) == {"kinds of events", "hours of events"}, "what has no table is left out"


def test_lists_of_a_build_that_is_not_promoted_move_nothing(ctx):
    """The released model's answers of the test are held against the lists that it was asked about, whatever lists were made since."""
    rng = random.Random(1)
    lists = {split: {f"{split}:u{n}": rng.sample("abcdefgh", 5) for n in range(300)} for split in ("test", "live")}

    def listed(split: str, found: dict[str, list[str]]) -> list[dict]:
        own = {"split": split, "night": str(NIGHT) if split == "live" else "none"}
        return [request(0) | own | {"request_id": name, "candidate_ids": ids} for name, ids in found.items()]

    answers = []
    for row in [row for split, found in lists.items() for row in listed(split, found)]:
        first = rng.choices(row["candidate_ids"], [5, 2, 1, 1, 1])[0]
        order = [first, *(item for item in row["candidate_ids"] if item != first)]
        answers.append(answer(0, "old", 1) | {key: row[key] for key in ("request_id", "split", "night")} | {"new_order": order})

    def measured() -> list:
        found = drift.audit(ctx, NIGHT, 28, 0.25, "", ["rl@old/score"])
        assert [f["subject"] for f in found] == ["incoming place of the first choice", "answers that failed"]
        return found

    put(ctx, "rerank_scores", answers)
    put(ctx, "candidates", listed("test", lists["test"]))
    release(ctx, "old")
    put(ctx, "candidates", listed("test", lists["test"]) + listed("live", lists["live"]))
    before = measured()
    assert before[0]["value"] < 0.25
    other = {name: ids[1:] + ids[:1] for name, ids in lists["test"].items()}
    put(ctx, "candidates", listed("test", other) + listed("live", lists["live"]))
    put(ctx, "rerank_scores", [row for row in answers if row["split"] == "live"])
    assert measured() == before


def test_too_few_rows_conclude_nothing(ctx):
    finding = drift._judged("x", {"a": 1000}, {"b": drift.FEWEST - 1}, 0.1)
    assert (finding["value"], finding["passed"]) == (None, True)
    assert "too few" in finding["detail"]
