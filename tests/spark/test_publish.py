"""Write, audit, publish: what is refused, what is idempotent, what readers see."""

import datetime as dt

import pyarrow as pa
import pytest

import schemas
from gr2.errors import AuditError, InputError, MissingInputError
from schemas.base import STRING, Column, Table, list_of
from spark_jobs import publish as publishing
from spark_jobs.publish import publish
from spark_jobs.session import frame_of, read

pytestmark = pytest.mark.spark


def stats(fit: str, *items: str, count: int = 3) -> pa.Table:
    day = dt.date(2026, 1, 1)
    rows = [
        {"fit": fit, "item_id": i, "count": count, "users": 1, "recent": 1.0, "popularity_rank": n, "last_date": day, "reference_date": day}
        for n, i in enumerate(items, 1)
    ]
    return pa.Table.from_pylist(rows, schema=schemas.get("item_stats").arrow())


def quarantined(*ids: str, reason: str = "not_json") -> pa.Table:
    day = dt.date(2026, 1, 1)
    rows = [
        {"quarantine_id": i, "target": "events", "reason": reason, "source_file": "f", "locator": "1", "record": "{", "ingest_date": day}
        for i in ids
    ]
    return pa.Table.from_pylist(rows, schema=schemas.get("quarantine").arrow())


def test_replace_swaps_one_partition_and_leaves_the_other(ctx):
    publish(ctx, "item_stats", frame_of(ctx, stats("train", "a", "b")), {"fit": "train"})
    publish(ctx, "item_stats", frame_of(ctx, stats("refit", "a")), {"fit": "refit"})
    publish(ctx, "item_stats", frame_of(ctx, stats("train", "c")), {"fit": "train"})
    assert sorted((r["fit"], r["item_id"]) for r in ctx.lake.read("item_stats").to_pylist()) == [("refit", "a"), ("train", "c")]
    assert ctx.pins["tables"]["item_stats"] == ctx.lake.version("item_stats")


def test_equal_content_makes_no_new_version_and_changed_content_does(ctx):
    publish(ctx, "item_stats", frame_of(ctx, stats("train", "a", "b")), {"fit": "train"})
    version = ctx.lake.version("item_stats")
    publish(ctx, "item_stats", frame_of(ctx, stats("train", "a", "b")).repartition(2), {"fit": "train"})
    assert ctx.lake.version("item_stats") == version
    publish(ctx, "item_stats", frame_of(ctx, stats("train", "a", "b", count=4)), {"fit": "train"})
    assert ctx.lake.version("item_stats") == version + 1


def test_a_value_that_changes_its_column_or_its_array_is_other_content(ctx):
    kinds = {"a": STRING, "b": STRING, "c": list_of(STRING), "d": list_of(STRING)}
    columns = tuple(Column(name, kind, name, nullable=True) for name, kind in kinds.items())
    table = Table("t", "1.0", "one row", ("a",), columns)
    rows = [
        ("x", None, ["1", "2"], ["3"]),
        (None, "x", ["1", "2"], ["3"]),
        ("x", None, ["1"], ["2", "3"]),
        ("x", None, ["1", "2", "3"], None),
    ]
    frames = [frame_of(ctx, pa.Table.from_pylist([dict(zip(kinds, row, strict=True))], schema=table.arrow())) for row in rows]
    assert len({publishing.content_hash(table, frame) for frame in frames}) == len(rows)


def test_insert_adds_new_keys_only_and_keeps_old_rows(ctx):
    assert publish(ctx, "quarantine", frame_of(ctx, quarantined("1", "2"))) == 2
    assert publish(ctx, "quarantine", frame_of(ctx, quarantined("2", "3", reason="bad_time"))) == 1
    assert publish(ctx, "quarantine", frame_of(ctx, quarantined("2", "3"))) == 0
    reasons = {r["quarantine_id"]: r["reason"] for r in ctx.lake.read("quarantine").to_pylist()}
    assert reasons == {"1": "not_json", "2": "not_json", "3": "bad_time"}


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda t: pa.concat_tables([t, t]), "duplicates"),
        (lambda t: t.set_column(0, "fit", pa.array(["other"] * len(t))), "known_value"),
        (lambda t: t.set_column(4, "recent", pa.array([float("nan")] * len(t))), "finite"),
        (lambda t: t.set_column(1, "item_id", pa.array([None] * len(t), pa.string())), "not_null"),
    ],
)
def test_a_broken_rule_publishes_nothing_and_is_named(ctx, spoil, rule):
    publish(ctx, "item_stats", frame_of(ctx, stats("train", "a")))
    with pytest.raises(AuditError, match=rule):
        publish(ctx, "item_stats", frame_of(ctx, spoil(stats("train", "a", "b"))))
    assert ctx.lake.read("item_stats")["item_id"].to_pylist() == ["a"]
    assert list((ctx.root / "staging").iterdir()), "the refused rows are kept"


def test_keys_whose_hashes_collide_are_not_taken_for_equal(ctx, monkeypatch):
    hashed = publishing.F.xxhash64
    monkeypatch.setattr(publishing.F, "xxhash64", lambda *columns: hashed(*columns) % 2)
    assert publish(ctx, "item_stats", frame_of(ctx, stats("train", "a", "b", "c", "d"))) == 4
    with pytest.raises(AuditError, match=r"duplicates\(fit, item_id\): 1 rows"):
        publish(ctx, "item_stats", frame_of(ctx, stats("train", "a", "b", "c", "c")))


def test_undeclared_and_missing_columns_are_refused(ctx):
    frame = frame_of(ctx, stats("train", "a"))
    with pytest.raises(AuditError, match=r"undeclared \['extra'\]"):
        publish(ctx, "item_stats", frame.withColumnRenamed("users", "extra"))
    assert not ctx.lake.exists("item_stats")


def test_rows_outside_the_replaced_partition_are_refused(ctx):
    with pytest.raises(AuditError, match="in_partition"):
        publish(ctx, "item_stats", frame_of(ctx, stats("refit", "a")), {"fit": "train"})
    with pytest.raises(InputError, match="characters"):
        publish(ctx, "item_stats", frame_of(ctx, stats("refit", "a")), {"fit": "x' OR '1'='1"})


def test_a_missing_table_names_the_stage_that_builds_it(ctx):
    with pytest.raises(MissingInputError, match="gr2 stage evidence"):
        read(ctx, "item_pairs")


def test_delta_enforces_the_laws_and_keeps_the_comments(ctx):
    publish(ctx, "item_stats", frame_of(ctx, stats("train", "a")))
    schema = ctx.lake.open("item_stats").schema()
    assert schema.fields[0].metadata["comment"].startswith("as in item_pairs")
    assert not schema.fields[1].nullable
