"""Slates as the log has them: slots, clicks that came late, purchases without their click, items shown twice."""

import datetime as dt

import pyarrow as pa
import pytest
from event_world import event_table

import schemas
from spark_jobs import impressions
from spark_jobs.publish import publish
from spark_jobs.session import frame_of

pytestmark = pytest.mark.spark


def slate_events(rows: list[tuple]) -> pa.Table:
    """(kind, request, item, row, column) as events."""
    table = event_table([("u", item, kind, n) for n, (kind, _, item, _, _) in enumerate(rows)]).to_pylist()
    for event, (_, request, _, row, col) in zip(table, rows, strict=True):
        event |= {"request_id": request, "slot_row": row, "slot_col": col, "propensity": 0.5 if event["kind"] == "impression" else None}
    return pa.Table.from_pylist(table, schema=schemas.get("events").arrow())


def test_a_grid_is_read_row_by_row_and_outcomes_are_joined(make_ctx):
    ctx = make_ctx()
    rows = [
        ("purchase", "r1", "d", 2, 1), ("click", "r1", "a", 1, 1),  # came before their impressions
        ("impression", "r1", "a", 1, 1), ("impression", "r1", "b", 1, 2), ("impression", "r1", "c", 1, 3), ("impression", "r1", "d", 2, 1),
        ("impression", "r1", "a", 2, 2),  # shown twice: the first slot counts
        ("click", "r1", "c", 1, 3), ("purchase", "r1", "c", 1, 3),
        ("impression", "r2", "a", 1, 1), ("click", "r2", "z", 1, 2),  # its impression never came
        ("click", None, "a", None, None),
    ]  # fmt: skip
    publish(ctx, "events", frame_of(ctx, slate_events(rows)))
    result = impressions.run(ctx.cfg, ctx)
    assert (result.rows_in, result.rows_out) == (11, 5)
    assert result.detail == {"requests": 2, "clicks": 3, "purchases": 2}
    found = ctx.lake.read("impressions", order_by=["request_id", "position"]).to_pylist()
    assert [(r["request_id"], r["item_id"], r["position"], r["click"], r["purchase"], r["grade"]) for r in found] == [
        ("r1", "a", 1, True, False, 1), ("r1", "b", 2, False, False, 0), ("r1", "c", 3, True, True, 2), ("r1", "d", 4, True, True, 2),
        ("r2", "a", 1, False, False, 0),
    ]  # fmt: skip
    assert found[0]["request_time"] == dt.datetime(2026, 1, 1, 0, 2, tzinfo=dt.UTC)
    assert {r["propensity"] for r in found} == {0.5}


def test_a_source_without_requests_gives_an_empty_table_and_says_so(make_ctx, capsys):
    ctx = make_ctx()
    publish(ctx, "events", frame_of(ctx, event_table([("u", "a", "review", 0)])))
    assert impressions.run(ctx.cfg, ctx).rows_out == 0
    assert "logs no requests" in capsys.readouterr().err
    assert ctx.lake.read("impressions").num_rows == 0
