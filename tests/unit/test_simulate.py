"""The simulated marketplace: days on their own, truth that behaviour follows, logs as broken as asked for."""

import datetime as dt
import gzip
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2 import simulate
from gr2.catalogue import VOCABULARY, Catalogue, item_name
from gr2.config import Simulator
from gr2.errors import ConfigError, InputError

pytestmark = pytest.mark.unit

SMALL = Simulator(users=80, items=90, days=6, slate=6, late_share=0.1, duplicate_share=0.05, malformed_share=0.05)
START = dt.date(2026, 1, 1)


def day(number: int) -> dt.date:
    return START + dt.timedelta(days=number)


def read(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def parsed(lines: list[str]) -> list[dict]:
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def test_a_day_made_on_its_own_equals_the_day_of_a_run_over_all(tmp_path):
    simulate.write_days(SMALL, 5, tmp_path / "all", [day(i) for i in range(6)], tmp_path / "truth")
    assert simulate.write_days(SMALL, 5, tmp_path / "one", [day(4)]) == [day(4)]
    for name in ("events", "items"):
        file = f"day={day(4)}/{name}.jsonl.gz"
        assert (tmp_path / "all" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    assert [p.name for p in (tmp_path / "one").glob("day=*")] == [f"day={day(4)}"]


def test_days_that_are_there_are_left_alone_and_missing_ones_are_made(tmp_path):
    simulate.write_days(SMALL, 5, tmp_path, [day(0), day(1)])
    before = (tmp_path / f"day={day(1)}" / "events.jsonl.gz").stat().st_mtime_ns
    assert simulate.write_days(SMALL, 5, tmp_path, [day(1), day(2)]) == [day(2)]
    assert (tmp_path / f"day={day(1)}" / "events.jsonl.gz").stat().st_mtime_ns == before
    assert simulate.write_days(SMALL, 5, tmp_path, [day(1), day(2)]) == []


def test_other_settings_or_another_seed_never_mix_but_more_days_may_follow(tmp_path):
    simulate.write_days(SMALL, 5, tmp_path, [day(0)])
    with pytest.raises(ConfigError, match="another seed"):
        simulate.write_days(SMALL, 6, tmp_path, [day(1)])
    with pytest.raises(ConfigError, match=r"paths\.root"):
        simulate.write_days(SMALL.model_copy(update={"users": 81}), 5, tmp_path, [day(1)])
    assert simulate.write_days(SMALL.model_copy(update={"days": 9}), 5, tmp_path, [day(7)]) == [day(7)]


@pytest.mark.parametrize("number", [-1, 6])
def test_a_day_outside_the_simulation_is_refused(tmp_path, number):
    with pytest.raises(InputError, match="not a simulated day"):
        simulate.write_days(SMALL, 5, tmp_path, [day(number)])


def test_another_seed_gives_another_market():
    one, two = (simulate.Market(SMALL, seed).step().item_RS for seed in (1, 2))
    assert one.shape != two.shape or (one != two).any()


def test_clicks_follow_relevance_times_examination():
    s = Simulator(users=3000, items=120, requests_per_user_day=2.0, new_items_per_day=0)
    slates = simulate.Market(s, 3).step()
    look = simulate.examination(s)
    assert look[0] == 1
    assert np.allclose(look[1:] / look[:-1], s.position_decay)
    expected, seen = (slates.relevance_RS * look).mean(axis=0), slates.click_RS.mean(axis=0)
    error = np.sqrt(expected * (1 - expected) / len(slates.user_R))
    assert (np.abs(seen - expected) < 5 * error).all(), (seen, expected)
    by_relevance = [slates.click_RS[:, 0][b].mean() for b in (slates.relevance_RS[:, 0] < 0.05, slates.relevance_RS[:, 0] > 0.5)]
    assert by_relevance[1] > 5 * by_relevance[0]
    assert not (slates.purchase_RS & ~slates.click_RS).any()
    assert 0.1 < slates.purchase_RS.sum() / slates.click_RS.sum() < 0.6


def test_in_a_grid_the_middle_of_a_row_is_looked_at_most_and_upper_rows_more_than_lower():
    look = simulate.examination(Simulator(slate=10, columns=5, position_decay=0.25))
    assert look.reshape(2, 5).tolist() == [[0.25, 0.5, 1.0, 0.5, 0.25], [0.0625, 0.125, 0.25, 0.125, 0.0625]]
    s = Simulator(users=3000, items=120, requests_per_user_day=2.0, new_items_per_day=0, columns=5)
    slates = simulate.Market(s, 3).step()
    chance_RS = slates.relevance_RS * simulate.examination(s)
    error = np.sqrt((chance_RS * (1 - chance_RS)).sum(axis=0))
    assert (np.abs(slates.click_RS.sum(axis=0) - chance_RS.sum(axis=0)) < 4 * error).all()


def test_the_truth_of_a_day_is_what_the_day_was_lived_by():
    market = simulate.market_at(SMALL, 5, 3)
    users = np.arange(SMALL.users)
    truth = market.relevance(users)
    again = simulate.market_at(SMALL, 5, 3).relevance(users)
    slates = market.step()
    assert np.array_equal(truth, again)
    assert np.allclose(slates.relevance_RS, truth[slates.user_R[:, None], slates.item_RS])
    assert ((truth > 0) & (truth < 1)).all()


def test_a_choice_makes_its_complements_more_relevant_from_the_next_day_until_it_fades():
    market = simulate.Market(SMALL.model_copy(update={"requests_per_user_day": 1e-9, "new_items_per_day": 0}), 5)
    user, item = np.array([7]), np.array([[11]])
    yes = np.array([[True]])
    before = market.need(user)
    market._remember(user, item, yes, yes)
    same_day = market.need(user)
    market.day += 1
    next_day, complements = market.need(user)[0], market.catalogue.complements_NC[11]
    market.day += simulate.NEED_DAYS
    assert before.max() == same_day.max() == 0
    assert market.need(user).max() == 0
    assert set(np.flatnonzero(next_day)) == set(complements.tolist())
    assert next_day.max() == 1.0


def test_tastes_drift_but_slowly():
    market = simulate.Market(SMALL, 5)
    start = market.taste_UD.copy()
    for _ in range(6):
        market.step()
    cosine = (start * market.taste_UD).sum(axis=1)
    assert np.allclose(np.linalg.norm(market.taste_UD, axis=1), 1, atol=1e-5)
    assert 0.5 < cosine.mean() < 0.995
    assert cosine.min() > 0


def test_nothing_is_shown_before_its_day_or_after_it_was_chosen():
    market, chosen = simulate.Market(SMALL, 5), set()
    for number in range(6):
        slates = market.step()
        assert (market.catalogue.born_N[slates.item_RS] <= number).all()
        assert all(len(set(row)) == SMALL.slate for row in slates.item_RS.tolist())
        order = np.argsort(slates.number_R, kind="stable")
        for r in order:
            user = int(slates.user_R[r])
            assert not chosen & {(user, i) for i in slates.item_RS[r].tolist()}
            chosen |= {(user, int(i)) for i in slates.item_RS[r][slates.click_RS[r]]}
    assert len(chosen) > 50


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=5), st.integers(0, 2**31))
def test_propensities_are_those_of_plackett_luce(logits, seed):
    slots = 3
    items, p = simulate.plackett_luce(np.tile(logits, (50, 1)), slots, np.random.default_rng(seed))
    weight = np.exp(logits)
    for row, probability in zip(items.tolist(), p, strict=True):
        assert len(set(row)) == slots
        left = weight.sum()
        for item, found in zip(row, probability, strict=True):
            assert math.isclose(found, weight[item] / left, rel_tol=1e-6)
            left -= weight[item]


def test_the_first_slot_is_drawn_as_often_as_its_propensity_says():
    logits = np.array([2.0, 1.0, 0.0, -1.0])
    items, p = simulate.plackett_luce(np.tile(logits, (20000, 1)), 2, np.random.default_rng(0))
    share = np.bincount(items[:, 0], minlength=4) / len(items)
    assert np.allclose(share, np.exp(logits) / np.exp(logits).sum(), atol=0.015)
    assert math.isclose(1 / np.mean(1 / p[:, 0]), 1 / 4, rel_tol=0.1)  # inverse propensities add up to the number of items


def test_logs_come_late_twice_and_broken_about_as_often_as_asked(tmp_path):
    simulate.write_days(SMALL, 5, tmp_path, [day(i) for i in range(6)])
    lines = {i: read(tmp_path / f"day={day(i)}" / "events.jsonl.gz") for i in range(6)}
    market = simulate.Market(SMALL, 5)
    truth = [line for i in range(6) for line in simulate.event_lines(market.step(), SMALL, i)]
    everything = [line for found in lines.values() for line in found]
    good = Counter(line.replace(',"app_version":"2.7"', "") for line in everything)
    arrived = [line for line in truth if good[line]]
    n, genuine = len(truth), set(truth)
    assert n > 1000
    assert n - len(arrived) < 0.12 * n
    late = sum(json.loads(line)["time"][:10] < str(day(i)) for i, found in lines.items() for line in found if line in genuine)
    assert 0.04 * n < late < 0.16 * n
    assert 0.03 * n < sum(good[line] - 1 for line in arrived) < 0.08 * n
    broken = len(everything) - sum(good[line] for line in arrived)
    assert 0.03 * n < broken < 0.07 * n
    assert sum("app_version" in line for line in everything) > 0


def test_broken_lines_are_broken_in_eight_ways():
    line = '{"kind":"click","user_id":"u1","item_id":"i1","request_id":"r","row":1,"col":1,"time":"2026-01-01T00:00:00Z"}'
    spoilt = [simulate._spoil(line, how) for how in range(8)]
    assert len(set(spoilt) | {line}) == 9
    with pytest.raises(ValueError, match=r"delimiter|Unterminated|Expecting"):
        json.loads(spoilt[0])


def test_slots_are_a_grid_in_reading_order(tmp_path):
    grid = SMALL.model_copy(update={"columns": 3})
    shown = [json.loads(line) for line in simulate.event_lines(simulate.Market(grid, 5).step(), grid, 0)]
    first = [e for e in shown if e["kind"] == "impression" and e["request_id"] == shown[0]["request_id"]]
    assert [(e["row"], e["col"]) for e in first] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert all(0 < e["propensity"] <= 1 for e in first)


def test_items_have_text_and_new_ones_come_every_day(tmp_path):
    simulate.write_days(SMALL, 5, tmp_path, [day(0), day(1)])
    first, second = ([r for r in parsed(read(tmp_path / f"day={day(i)}" / "items.jsonl.gz")) if "item_id" in r] for i in (0, 1))
    assert {r["item_id"] for r in first} >= {item_name(i) for i in range(85)}
    assert len({r["item_id"] for r in second}) == 2
    full = [r for r in first if r["title"]]
    assert all(len(r["categories"]) == 3 and r["brand"] in r["title"] and isinstance(r["price"], int | float | str) for r in full)
    assert {r["categories"][0].replace("&amp;", "&") for r in full} == set(VOCABULARY)
    assert any("&amp;" in r["title"] for r in full), "exports carry HTML entities"


def test_complements_are_other_items_mostly_of_the_same_department():
    catalogue = Catalogue(5)
    catalogue.extend(0, 300)
    kinds = catalogue._attributes[:, 0] // 8
    assert (catalogue.complements_NC != np.arange(300)[:, None]).all()
    assert (kinds[catalogue.complements_NC] == kinds[:, None]).mean() > 0.95
    tiny = Catalogue(5)
    tiny.extend(0, 2)  # too few for every type: still defined
    assert tiny.complements_NC.shape == (2, 3)


def test_the_truth_file_holds_relevance_and_examination_and_nothing_else_reads_it(tmp_path):
    simulate.write_days(SMALL, 5, tmp_path / "raw", [day(2)], tmp_path / "truth")
    rows = parsed(read(tmp_path / "truth" / f"day={day(2)}.jsonl.gz"))
    market = simulate.market_at(SMALL, 5, 2)
    row = rows[0]
    user = int(row["request_id"].split("-")[1])
    items = [int(i[1:]) for i in row["item_ids"]]
    assert np.allclose(row["relevance"], market.relevance(np.array([user]))[0, items], atol=1e-5)
    assert row["examination"] == simulate.examination(SMALL).round(6).tolist()


def test_a_quiet_day_is_an_empty_file(tmp_path):
    quiet = SMALL.model_copy(update={"requests_per_user_day": 1e-9, "new_items_per_day": 0})
    simulate.write_days(quiet, 5, tmp_path, [day(1)])
    assert read(tmp_path / f"day={day(1)}" / "events.jsonl.gz") == read(tmp_path / f"day={day(1)}" / "items.jsonl.gz") == []
