"""Pairs and item statistics against plain Python, blind to what the fit may not see, equal to the last digit on every run."""

import datetime as dt
import random
from collections import defaultdict
from statistics import median

import pyarrow as pa
import pytest

import schemas
from gr2.config import Evidence
from spark_jobs import evidence
from spark_jobs.publish import publish
from spark_jobs.session import frame_of

pytestmark = pytest.mark.spark

START = dt.date(2026, 1, 1)
SETTINGS = Evidence(window=3, half_life_days=10, max_pairs_per_item=4)


def table_of(histories: dict[str, list[tuple[str, int, str]]]) -> pa.Table:
    """user -> [(item, day, split)], as interactions."""
    rows = []
    for user, steps in histories.items():
        for n, (item, day, split) in enumerate(steps, 1):
            row = dict.fromkeys(c.name for c in schemas.get("interactions").columns)
            row |= {
                "user_id": user,
                "ordinal": n,
                "item_id": item,
                "event_id": f"{user}-{n}",
                "kind": "click",
                "day_known": day is not None,
            }
            row |= {"event_date": dt.date(1970, 1, 1) if day is None else START + dt.timedelta(days=day), "session": n}
            rows.append(row | {"split": split, "period": "2026" if day is not None else "1970"})
    return pa.Table.from_pylist(rows, schema=schemas.get("interactions").arrow())


def random_histories(seed: int) -> dict[str, list[tuple[str, int, str]]]:
    rng, found = random.Random(seed), {}
    for user in range(40):
        days = sorted(rng.randint(0, 40) for _ in range(rng.randint(1, 12)))
        found[f"u{user}"] = [
            (f"i{rng.randint(0, 7)}", d, ("pretrain", "pretrain", "pretrain", "rerank", "valid", "test")[min(n, 5)])
            for n, d in enumerate(days)
        ]
    return found


def expected(histories, splits: tuple[str, ...], settings: Evidence) -> tuple[dict, dict]:
    fitted = {u: [(i, d) for i, d, s in steps if s in splits] for u, steps in histories.items()}
    end = max(d for steps in fitted.values() for _, d in steps)
    weight, gaps, direct = defaultdict(float), defaultdict(list), defaultdict(int)
    for steps in fitted.values():
        for a, (item, day) in enumerate(steps):
            for step in range(1, settings.window + 1):
                if a + step < len(steps) and steps[a + step][0] != item:
                    pair, then = (item, steps[a + step][0]), steps[a + step][1]
                    weight[pair] += 0.5 ** ((end - then) / settings.half_life_days) / step
                    gaps[pair].append(then - day)
                    direct[pair] += step == 1
    ahead, behind = defaultdict(float), defaultdict(float)
    for (a, b), w in weight.items():
        ahead[a] += w
        behind[b] += w
    total, pairs = sum(weight.values()), {}
    for a in {a for a, _ in weight}:
        best = sorted((p for p in weight if p[0] == a), key=lambda p: (-round(weight[p], 9), p[1]))[: settings.max_pairs_per_item]
        for rank, p in enumerate(best, 1):
            lift = weight[p] * total / (ahead[p[0]] * behind[p[1]])
            pairs[p] = (weight[p], len(gaps[p]), direct[p], lift, median(gaps[p]), rank)
    stats = defaultdict(lambda: [0, set(), 0.0])
    for user, steps in fitted.items():
        for item, day in steps:
            stats[item][0] += 1
            stats[item][1].add(user)
            stats[item][2] += 0.5 ** ((end - day) / settings.half_life_days)
    return pairs, {i: (n, len(users), recent) for i, (n, users, recent) in stats.items()}


def test_both_fits_equal_plain_python_and_a_rerun_is_equal_to_the_digit(make_ctx):
    ctx = make_ctx(["evidence.window=3", "evidence.half_life_days=10", "evidence.max_pairs_per_item=4"])
    histories = random_histories(3)
    publish(ctx, "interactions", frame_of(ctx, table_of(histories)))
    evidence.run(ctx.cfg, ctx)
    for fit, splits in evidence.FITS.items():
        pairs, stats = expected(histories, splits, SETTINGS)
        found = {(r["item_id"], r["next_item_id"]): r for r in ctx.lake.read("item_pairs", fit=fit).to_pylist()}
        assert found.keys() == pairs.keys()
        for pair, (weight, count, direct, lift, gap, rank) in pairs.items():
            r = found[pair]
            assert (r["count"], r["next_count"], r["median_gap_days"], r["rank"]) == (count, direct, gap, rank)
            assert (r["weight"], r["lift"]) == (pytest.approx(weight, abs=1e-9), pytest.approx(lift, rel=1e-6))
        rows = ctx.lake.read("item_stats", fit=fit, order_by=["popularity_rank"]).to_pylist()
        assert {r["item_id"]: (r["count"], r["users"], pytest.approx(r["recent"], abs=1e-9)) for r in rows} == stats
        assert [r["item_id"] for r in rows] == sorted(stats, key=lambda i: (-stats[i][0], i))
    versions = ctx.lake.version("item_pairs"), ctx.lake.version("item_stats")
    evidence.run(ctx.cfg, ctx)
    assert versions == (ctx.lake.version("item_pairs"), ctx.lake.version("item_stats"))


def test_what_a_fit_may_not_see_changes_nothing(ctx):
    clean = random_histories(4)
    poisoned = {
        u: [(i, d, s) if s == "pretrain" else ("poison", d + 500, s) for i, d, s in steps] for u, steps in clean.items()
    }  # fmt: skip
    outcomes = []
    for histories in (clean, poisoned):
        interactions = frame_of(ctx, table_of(histories))
        fitted = evidence.with_decay(evidence.by_fit(interactions), SETTINGS).where("fit = 'train'")
        counted = evidence.pair_counts(evidence.by_fit(evidence.pair_days(interactions, 3)), evidence.ends_of(fitted), SETTINGS)
        pairs = evidence.item_pairs(counted, SETTINGS).collect()
        outcomes.append((sorted(pairs), sorted(evidence.item_stats(fitted).collect())))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0]


def test_a_robot_counts_for_its_last_interactions_only_and_undated_users_still_weigh(ctx, monkeypatch):
    monkeypatch.setattr(evidence, "MAX_STEPS", 5)
    histories = {"robot": [(f"r{n}", 3, "pretrain") for n in range(50)], "undated": [("x", None, "pretrain"), ("y", None, "pretrain")]}
    interactions = frame_of(ctx, table_of(histories))
    fitted = evidence.with_decay(evidence.by_fit(interactions), SETTINGS).where("fit = 'train'")
    counted = evidence.pair_counts(evidence.by_fit(evidence.pair_days(interactions, 1)), evidence.ends_of(fitted), SETTINGS)
    pairs = {(r["item_id"], r["next_item_id"]): r for r in evidence.item_pairs(counted, SETTINGS).collect()}
    assert set(pairs) == {(f"r{n}", f"r{n + 1}") for n in range(4)} | {("x", "y")}
    assert pairs["x", "y"]["weight"] == pytest.approx(0.5)
    assert {r["item_id"]: r["last_date"] for r in evidence.item_stats(fitted).collect()}["x"] is None
