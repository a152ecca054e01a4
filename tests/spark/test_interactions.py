"""Interactions and histories against plain Python on random logs: sessions, the strongest event, order, splits, histories."""

import datetime as dt
import random
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from event_world import event_table

import schemas
from gr2.config import Data
from spark_jobs import interactions
from spark_jobs.publish import publish
from spark_jobs.session import frame_of

pytestmark = pytest.mark.spark

RANK = {"purchase": 3, "click": 2, "review": 1}


def random_log(seed: int, users: int = 30) -> list[tuple]:
    rng, rows = random.Random(seed), []
    for user in range(users):
        minute = 0
        for _ in range(rng.randint(1, 25)):
            minute += rng.choice([0, 1, 5, 29, 30, 31, 200, 1440, 5000])
            rows.append(
                (f"u{user}", f"i{rng.randint(0, 6)}", rng.choice(["click", "click", "purchase", "review", "view", "impression"]), minute)
            )
    rng.shuffle(rows)
    return rows


def expected(rows: list[tuple]) -> dict[str, list[tuple]]:
    """user -> [(item, event number, session)] in order, written from the definition."""
    by_user = defaultdict(list)
    for n, (user, item, kind, minute) in enumerate(rows):
        if kind in RANK:
            by_user[user].append((minute, n, item, kind))
    found = {}
    for user, acts in by_user.items():
        acts.sort()
        session, last, best = 0, None, {}
        for minute, n, item, kind in acts:
            if last is None or minute - last > 30 or minute // 1440 != last // 1440:
                session += 1
            last = minute
            key = (session, item)
            if key not in best or RANK[kind] > RANK[best[key][2]]:
                best[key] = (minute, n, kind)
        found[user] = [(item, n, session) for (session, item), (minute, n, _) in sorted(best.items(), key=lambda kv: kv[1][:2])]
    return found


def table_of(frame) -> dict[str, list[dict]]:
    by_user = defaultdict(list)
    for row in sorted((r.asDict() for r in frame.collect()), key=lambda r: (r["user_id"], r["ordinal"])):
        by_user[row["user_id"]].append(row)
    return by_user


def choices(ctx, rows: list[tuple]):
    return frame_of(ctx, event_table(rows)).where("kind IN ('click', 'purchase', 'review')")


def test_random_logs_give_what_the_definition_says_under_leave_one_out(ctx):
    rows = random_log(1)
    found = table_of(interactions.to_interactions(choices(ctx, rows), Data(protocol="leave_one_out"), seed=1, windows=[]))
    wanted = expected(rows)
    assert {u: [(r["item_id"], int(r["event_id"][1:]), r["session"]) for r in rs] for u, rs in found.items()} == wanted
    assert any(r["kind"] == "purchase" for rs in found.values() for r in rs)
    for rs in found.values():
        n = len(rs)
        assert [r["ordinal"] for r in rs] == list(range(1, n + 1))
        names = ["pretrain"] * max(n - 3, 0) + ["rerank", "valid", "test"][-min(n, 3) :]
        assert [r["split"] for r in rs] == ["pretrain", *names[1:]], "a first interaction is never a target"
        assert rs[0]["gap_days"] is None
        assert all(r["gap_days"] == (r["event_date"] - b["event_date"]).days for b, r in pairwise(rs))
    assert {len(rs) for rs in found.values()} & {1, 2, 3}, "short histories were among them"


def test_the_time_protocol_cuts_the_days_by_its_windows(ctx):
    rows = [("u", f"i{d}", "click", d * 1440 + 5) for d in range(20)] + [("v", "i", "click", 19 * 1440)]
    data = Data(protocol="time", windows=(0.5, 0.75, 0.9))
    acts = choices(ctx, rows)
    found = table_of(interactions.to_interactions(acts, data, 1, interactions.cuts(interactions.days_of(acts), data)))
    assert Counter(r["split"] for r in found["u"]) == {"pretrain": 10, "rerank": 5, "valid": 3, "test": 2}
    assert [r["split"] for r in found["u"]] == ["pretrain"] * 10 + ["rerank"] * 5 + ["valid"] * 3 + ["test"] * 2
    assert [r["split"] for r in found["v"]] == ["test"]


def test_the_sources_own_order_wins_and_shuffling_moves_only_days_of_the_train_prefix(ctx):
    rows = [("u", f"i{n:02d}", "review", 0 if n < 8 else 1440 * 5 if n < 11 else None if n < 13 else 1440 * 9) for n in range(16)]
    table = event_table(rows)
    table = table.set_column(
        table.schema.get_field_index("source_order"), schemas.get("events").arrow().field("source_order"), [list(range(16))]
    )
    filled = [dt.date(2026, 1, 6) if t is None else t.date() for t in table["event_time"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("event_date"), schemas.get("events").arrow().field("event_date"), [filled])
    acts = frame_of(ctx, table)
    published = table_of(interactions.to_interactions(acts, Data(protocol="leave_one_out"), seed=1, windows=[]))["u"]
    assert [r["item_id"] for r in published] == [f"i{n:02d}" for n in range(16)]
    shuffled, again, other = (
        [
            r["item_id"]
            for r in table_of(interactions.to_interactions(acts, Data(protocol="leave_one_out", same_day_order="shuffled"), seed, []))["u"]
        ]
        for seed in (1, 1, 2)
    )
    assert shuffled == again != other
    assert shuffled[11:] == [f"i{n:02d}" for n in range(11, 16)], "what has no day and the targets stay"
    assert sorted(shuffled[:8]) == [f"i{n:02d}" for n in range(8)] != shuffled[:8]
    assert sorted(shuffled[8:11]) == ["i08", "i09", "i10"]


def test_histories_hold_the_last_items_of_each_active_day(make_ctx):
    ctx = make_ctx(["data.max_history=5", "data.protocol=leave_one_out"])
    rows = random_log(2, users=12)
    publish(ctx, "events", frame_of(ctx, event_table(rows)))
    result = interactions.run(ctx.cfg, ctx)
    assert result.rows_in == sum(kind in RANK for *_, kind, _ in rows) == result.rows_out + result.duplicates
    by_user = defaultdict(list)
    for r in ctx.lake.read("interactions", order_by=["user_id", "ordinal"]).to_pylist():
        by_user[r["user_id"]].append(r)
    wanted = {}
    for user, rs in by_user.items():
        for day in {r["event_date"] for r in rs}:
            upto = [r for r in rs if r["event_date"] <= day]
            days = [(r["event_date"] - dt.date(1970, 1, 1)).days for r in upto[-5:]]
            wanted[user, day] = ([r["item_id"] for r in upto[-5:]], days, len(upto))
    found = {(r["user_id"], r["as_of"]): (r["item_ids"], r["days"], r["length"]) for r in ctx.lake.read("histories").to_pylist()}
    assert found == wanted
    versions = ctx.lake.version("interactions"), ctx.lake.version("histories")
    interactions.run(ctx.cfg, ctx)
    assert versions == (ctx.lake.version("interactions"), ctx.lake.version("histories"))
