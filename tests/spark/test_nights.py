"""Nights: in whatever order days arrive, the tables are those of one whole build; and only what depends on the new is rewritten."""

import datetime as dt
import random
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pytest
from event_world import event_table
from test_interactions import random_log

import schemas
from gr2.config import load
from gr2.context import Context
from spark_jobs import evidence, increments, interactions
from spark_jobs import publish as publishing
from spark_jobs.publish import Overtaken, publish
from spark_jobs.session import alter, frame_of, read
from validation import leakage

pytestmark = pytest.mark.spark
BUILT = ("interactions", "histories", "pair_days")
SETTINGS = ["data.max_history=4", "evidence.window=3"]


def root(tmp_path: Path, name: str, date: dt.date | None = None, settings: list[str] = SETTINGS) -> Context:
    """A context on a folder of its own, for a night or a whole build."""
    return Context(load("demo", [f"paths.root={tmp_path / name}", *settings]), date)


def log_of(seed: int) -> pa.Table:
    """Events of three weeks, each in the partition of its own day."""
    table = event_table([(*row[:3], row[3] % (21 * 1440)) for row in random_log(seed, users=12)])
    period = pa.array([str(day) for day in table["event_date"].to_pylist()])
    return table.set_column(table.schema.get_field_index("period"), schemas.get("events").arrow().field("period"), period)


def night(ctx: Context, events: pa.Table) -> None:
    """One night's work on what arrived."""
    publish(ctx, "events", frame_of(ctx, events))
    interactions.run(ctx.cfg, ctx)
    evidence.run(ctx.cfg, ctx)


def contents(ctx: Context, tables: Iterable[str] = BUILT) -> dict[str, list]:
    """Every built table, row for row."""
    return {name: ctx.lake.read(name, order_by=schemas.get(name).key).to_pylist() for name in tables}


@pytest.mark.parametrize("seed", [1])
def test_days_in_any_order_give_the_tables_of_one_whole_build(tmp_path, seed):
    events = log_of(seed)
    whole = root(tmp_path, "whole")
    night(whole, events)
    rng, parts = random.Random(seed), [[] for _ in range(3)]
    days = sorted(set(events["event_date"].to_pylist()))
    turn = {day: rng.randrange(3) for day in days}  # the night in which a day arrives; now and then an event of it comes in another, too
    for place, day in enumerate(events["event_date"].to_pylist()):
        parts[turn[day]].append(place)
        if rng.random() < 0.1:
            parts[rng.randrange(3)].append(place)
    nights = root(tmp_path, "nights", dt.date(2026, 3, 1))
    for part in parts:
        night(nights, events.take(sorted(set(part))))
    assert contents(nights) == contents(whole)
    assert len({r["split"] for r in contents(whole)["interactions"]}) > 2


def test_a_night_rewrites_only_the_periods_that_it_touches(tmp_path):
    days = range(40)
    rows = [(f"u{user}", f"i{(user + day) % 7}", "click", day * 1440 + user) for user in range(6) for day in days]
    table = event_table(rows)
    period = pa.array([str(day) for day in table["event_date"].to_pylist()])
    events = table.set_column(table.schema.get_field_index("period"), schemas.get("events").arrow().field("period"), period)
    ctx = root(tmp_path, "some", dt.date(2026, 3, 1), ["data.windows=[0.5,0.5,0.5]", *SETTINGS])
    last = [n for n, (*_, minute) in enumerate(rows) if minute // 1440 == 39]
    night(ctx, events.take([n for n in range(len(rows)) if n not in last]))
    before = {name: set(ctx.lake.open(name).file_uris()) for name in BUILT}
    night(ctx, events.take(last))
    for name in BUILT:
        gone = before[name] - set(ctx.lake.open(name).file_uris())
        moved = {uri.split("period=")[1].split("/")[0] for uri in gone}
        # the new day is new; the windows' edge moved by half a day, over at most one
        assert moved <= {"2026-01-20"}, (name, moved)
    versions = {name: ctx.lake.version(name) for name in BUILT}
    night(ctx, events.take(last))
    assert versions == {name: ctx.lake.version(name) for name in BUILT}, "nothing new, nothing done"


@pytest.mark.parametrize("reason", ["settings", "undated"])
def test_where_a_night_cannot_be_told_apart_everything_is_built(tmp_path, reason):
    events = log_of(4)
    half = events.num_rows // 2
    first, rest = events.slice(0, half), events.slice(half)
    ctx = root(tmp_path, "nights", dt.date(2026, 3, 1))
    night(ctx, first)
    settings = SETTINGS
    if reason == "settings":
        settings = [*SETTINGS, "data.session_gap_minutes=5"]
    else:
        known = rest.schema.get_field_index("day_known")
        rest = rest.set_column(known, rest.schema.field("day_known"), [[False] * rest.num_rows])
    night(root(tmp_path, "nights", dt.date(2026, 3, 1), settings), rest)
    whole = root(tmp_path, "whole", None, settings)
    publish(whole, "events", frame_of(whole, first))
    night(whole, rest)
    assert contents(ctx) == contents(whole)


def test_a_night_within_a_build_is_no_part_of_it(tmp_path):
    """Nights come between the stages of a build, and after them: its tables belong together, and no check takes that for a leak."""
    events, tables = log_of(3), ("interactions", "item_stats", "item_pairs")
    parts = [events.take(list(range(start, events.num_rows, 3))) for start in range(3)]  # each brings late events, too
    build, later = root(tmp_path, "x"), root(tmp_path, "x", dt.date(2026, 3, 1))
    publish(build, "events", frame_of(build, parts[0]))
    interactions.run(build.cfg, build)
    night(later, parts[1])
    evidence.run(build.cfg, build)
    with build.drafted(tables):
        before = read(build, "interactions").count()
        assert before == build.lake.read("interactions").num_rows
    night(later, parts[2])
    with build.drafted(tables):
        assert read(build, "interactions").count() == before
    assert read(build, "interactions").count() > before
    assert {f["subject"] for f in leakage.audit(build) if not f["passed"]} == set()


def test_who_is_overtaken_builds_again(tmp_path, monkeypatch):
    """Two nights at once, held at the point where the first has audited what it wrote and the second publishes."""
    events = log_of(5)
    third = events.num_rows // 3
    ctx, other = (root(tmp_path, "nights", dt.date(2026, 3, n)) for n in (1, 2))
    night(ctx, events.slice(0, third))
    came: list[str] = []

    def reached(point: str, name: str) -> None:
        if point == "audited" and name == "interactions" and not came:
            came.append("the second night")
            night(other, events.slice(2 * third))

    monkeypatch.setattr(publishing, "reached", reached)
    night(ctx, events.slice(third, third))
    monkeypatch.undo()
    assert came
    whole = root(tmp_path, "whole")
    night(whole, events)
    assert contents(ctx) == contents(whole)


def test_upkeep_of_a_table_overtakes_nobody(tmp_path, monkeypatch):
    events = log_of(6)
    half = events.num_rows // 2
    ctx = root(tmp_path, "nights", dt.date(2026, 3, 1))
    night(ctx, events.slice(0, half))
    before = ctx.lake.version("interactions")

    def reached(point: str, name: str) -> None:
        if point == "audited" and name == "interactions":
            alter(ctx, "interactions", "SET TBLPROPERTIES ('delta.logRetentionDuration' = 'interval 31 days')")

    monkeypatch.setattr(publishing, "reached", reached)
    night(ctx, events.slice(half))
    assert ctx.lake.version("interactions") == before + 2, "the property and the rows, which were built once"


def test_a_race_that_never_ends_is_named(tmp_path):
    ctx = root(tmp_path, "x")

    def build():
        raise Overtaken("histories: version 3 was published since version 2 was read")

    with pytest.raises(Overtaken, match="histories"):
        increments.until_settled(ctx, build)
