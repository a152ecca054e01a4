"""Maintenance removes what nobody needs, and nothing that a live release pins; contents and fingerprints stay."""

import datetime as dt
import json
import os

import pytest
from deltalake import DeltaTable
from event_world import event_table

from gr2 import pipeline
from gr2.context import Context
from schemas.lake import Lake
from spark_jobs import maintenance
from spark_jobs import publish as publishing
from spark_jobs.publish import publish, publish_rows
from spark_jobs.release import manage
from spark_jobs.session import frame_of

pytestmark = pytest.mark.spark
AT_ONCE = ["maintenance.keep_days=0", "maintenance.small_files=2"]


def stats(ctx, count: int) -> int:
    """A version of `item_stats` with so many items; returns its number."""
    row = {"fit": "train", "count": 1, "users": 1, "recent": 1.0, "last_date": None, "reference_date": dt.date(2026, 1, 1)}
    rows = [row | {"item_id": f"i{n}", "popularity_rank": n + 1} for n in range(count)]
    publish_rows(ctx, "item_stats", rows)
    return ctx.lake.version("item_stats")


def release(ctx, *others: str, judged: int | None = None, **pins: int) -> None:
    """Promotes a release with these table versions; `others`: releases beside it, superseded. `judged`: the version that judges it."""
    said = json.dumps({"tables": pins, "judged": {"item_stats": judged} if judged is not None else {}})
    row = {"release_id": "r1", "status": "promoted", "profile": "demo", "run_id": "x", "pins": said, "code": "c"}
    row |= {"config_hash": "h", "lock_hash": "l", "seed": 1, "promoted_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC)}
    rows = [row, *(row | {"release_id": other, "status": "superseded"} for other in others)]
    publish_rows(ctx, "releases", rows)


def readable(ctx, version: int) -> int | None:
    """Rows of `item_stats` at a version; None where its files are gone."""
    try:
        return Lake(ctx.root, {"item_stats": version}).read("item_stats").num_rows
    except (OSError, FileNotFoundError):
        return None


def test_a_pinned_version_outlives_maintenance_until_its_release_is_retired(make_ctx):
    ctx = make_ctx(AT_ONCE)
    first, pinned, last = (stats(ctx, n) for n in (1, 2, 3))
    release(ctx, item_stats=pinned)
    maintenance.run(ctx.cfg, ctx)
    assert [readable(ctx, v) for v in (first, pinned, last)] == [None, 2, 3]
    assert ctx.lake.read("item_stats").num_rows == 3
    manage(ctx, "retire", "r1")
    maintenance.run(ctx.cfg, ctx)
    assert [readable(ctx, v) for v in (pinned, last)] == [None, 3]
    assert maintenance.run(ctx.cfg, ctx).rows_out == 0, "a rerun finds nothing to do"


def test_what_judges_a_release_and_what_a_build_reads_outlive_maintenance(make_ctx):
    ctx = make_ctx(AT_ONCE)
    judged, drafted, gone, last = (stats(ctx, n) for n in (1, 2, 3, 4))
    release(ctx, item_stats=last, judged=judged)
    ctx.pin("tables", "item_stats", drafted)
    night = Context(ctx.cfg, dt.date(2026, 1, 2))
    maintenance.run(night.cfg, night)
    assert [readable(ctx, v) for v in (judged, drafted, gone, last)] == [1, 2, None, 4]


def test_retiring_a_release_erases_none_that_was_published_meanwhile(make_ctx, monkeypatch):
    ctx, came = make_ctx(), []
    release(ctx)

    def reached(point: str, name: str) -> None:
        if point == "audited" and not came:
            came.append("r2")
            release(ctx, "r2")

    monkeypatch.setattr(publishing, "reached", reached)
    manage(ctx, "retire", "r1")
    assert {r["release_id"]: r["status"] for r in ctx.lake.read("releases").to_pylist()} == {"r1": "retired", "r2": "superseded"}


def test_answers_kept_for_a_run_that_never_came_are_removed_in_time(make_ctx):
    ctx = make_ctx(AT_ONCE)
    names = ["a" * 24 + ".parquet", "." + "b" * 24 + ".parquet-0123abcd", "c" * 24 + ".parquet", "notes.parquet"]
    paths = [ctx.work("rerank_scores") / name for name in names]
    for path, days in zip(paths, (2, 2, 0.5, 2), strict=True):
        path.touch()
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - days * maintenance.DAY))
    assert maintenance.run(ctx.cfg, ctx).rows_out == 2
    assert [path.exists() for path in paths] == [False, False, True, True]


def test_young_versions_stay_without_any_pin(make_ctx):
    ctx = make_ctx()
    first, last = stats(ctx, 1), stats(ctx, 2)
    maintenance.run(ctx.cfg, ctx)
    assert [readable(ctx, v) for v in (first, last)] == [1, 2]


def test_small_files_are_joined_and_no_stage_takes_that_for_new_content(make_ctx):
    ctx = make_ctx(AT_ONCE)
    for n in range(4):
        publish(ctx, "events", frame_of(ctx, event_table([(f"u{n}", "i", "click", n)], event_id=f"e{n}")))
    rows = sorted(ctx.lake.read("events")["event_id"].to_pylist())
    stage = pipeline.get("interactions")
    before = (ctx.lake.version("events"), pipeline.fingerprint(stage, ctx.cfg, ctx))
    result = maintenance.run(ctx.cfg, ctx)
    assert result.detail["events"]["joined_files"] == 4
    assert len(DeltaTable(str(ctx.table_path("events"))).file_uris()) == 1
    assert sorted(ctx.lake.read("events")["event_id"].to_pylist()) == rows == ["e0", "e1", "e2", "e3"]
    assert ctx.lake.version("events") > before[0]
    assert pipeline.fingerprint(stage, ctx.cfg, ctx) == before[1]


def test_the_log_is_kept_as_long_as_a_pin_is_old(make_ctx, monkeypatch):
    monkeypatch.setattr(maintenance.time, "time", lambda: dt.datetime.now().timestamp() + 100.5 * maintenance.DAY)
    ctx = make_ctx()
    release(ctx, item_stats=stats(ctx, 1))
    maintenance.run(ctx.cfg, ctx)
    kept = DeltaTable(str(ctx.table_path("item_stats"))).metadata().configuration["delta.logRetentionDuration"]
    version = ctx.lake.version("item_stats")
    assert kept == "interval 131 days", "as old as the pin is, and a month"
    maintenance.run(ctx.cfg, ctx)
    assert ctx.lake.version("item_stats") == version
