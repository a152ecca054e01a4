"""Tables that the first contracts wrote (`tests/golden/v1`: six users, three days) are read, and brought up to date, by today's code."""

import dataclasses
import shutil
from pathlib import Path

import pytest

import schemas
from gr2.errors import AuditError, MissingInputError
from schemas.base import DOUBLE, Column
from schemas.lake import Lake
from spark_jobs import interactions
from spark_jobs import publish as publishing
from spark_jobs.publish import publish
from spark_jobs.session import frame_of, read

pytestmark = pytest.mark.spark
GOLDEN = Path(__file__).parents[1] / "golden" / "v1"


@pytest.fixture
def old(make_ctx):
    """A data root with the old tables."""
    ctx = make_ctx(["data.period=month"])
    shutil.copytree(GOLDEN, ctx.root / "tables")
    return ctx


@pytest.mark.parametrize("name", ["events", "item_stats"])
def test_a_table_whose_contract_stands_is_read_as_it_is(old, name):
    table = schemas.get(name)
    rows = old.lake.read(name, table.names(), order_by=table.key)
    assert rows.num_rows > 5
    assert rows.schema.names == table.names()
    assert read(old, name).select(*table.names()).count() == rows.num_rows


def test_a_column_that_an_old_table_lacks_is_null_where_it_may_be_and_named_where_not(old):
    with pytest.raises(MissingInputError, match=r"older contract, without period: run `gr2 stage interactions` again"):
        old.lake.read("interactions", ["item_id", "period"])
    table = schemas.get("events")
    wider = dataclasses.replace(table, columns=(*table.columns, Column("dwell", DOUBLE, "seconds looked at it", nullable=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemas, "get", lambda name: wider)
        rows = old.lake.read("events", ["dwell", "event_id"])
    assert rows.schema.names == ["dwell", "event_id"]
    assert set(rows["dwell"].to_pylist()) == {None}
    assert rows.num_rows == old.lake.read("events").num_rows


def test_a_whole_build_replaces_an_older_layout_with_the_same_history(old):
    before = {name: old.lake.read(name, order_by=schemas.get(name).key).to_pylist() for name in ("interactions", "histories")}
    versions = {name: old.lake.version(name) for name in before}
    assert "from_end" in before["interactions"][0]
    interactions.run(old.cfg, old)
    for name, rows in before.items():
        now = old.lake.read(name, order_by=schemas.get(name).key).to_pylist()
        shared = [c for c in schemas.get(name).names() if c in rows[0]]
        assert [{c: r[c] for c in shared} for r in now] == [{c: r[c] for c in shared} for r in rows]
        assert list(old.lake.open(name).metadata().partition_columns) == ["period"]
        assert Lake(old.root, versions).read(name, order_by=schemas.get(name).key).to_pylist() == rows, (
            "the old version is still there for who pins it"
        )
    interactions.run(old.cfg, old)
    assert "delta.constraints.laws" in old.lake.open("interactions").metadata().configuration


def test_a_part_of_an_older_layout_is_refused_with_what_to_do(old):
    rows = old.lake.read("interactions").drop_columns(["from_end"])
    rows = rows.append_column("period", [["2026-01"] * rows.num_rows])
    version = old.lake.version("interactions")
    with pytest.raises(AuditError, match=r"contract 1\.0, and columns from_end, period differ from 2\.0.*gr2 stage interactions"):
        publish(old, "interactions", frame_of(old, rows.select(schemas.get("interactions").names())), {"period": "2026-01"})
    assert old.lake.version("interactions") == version


def test_a_new_column_that_may_be_null_is_added_and_old_rows_stay(old, monkeypatch):
    table = schemas.get("events")
    wider = dataclasses.replace(
        table, version="1.1", columns=(*table.columns, Column("dwell", DOUBLE, "seconds looked at it", nullable=True))
    )
    monkeypatch.setattr(publishing.schemas, "get", lambda name: wider)
    before = old.lake.read("events").num_rows
    one = old.lake.read("events").slice(0, 1).to_pylist()[0] | {"event_id": "new", "dwell": 1.5}
    import pyarrow as pa

    assert publish(old, "events", frame_of(old, pa.Table.from_pylist([one], schema=wider.arrow()))) == 1
    rows = old.lake.read("events").to_pylist()
    assert {r["event_id"]: r["dwell"] for r in rows if r["dwell"] is not None} == {"new": 1.5}
    assert len(rows) == before + 1
