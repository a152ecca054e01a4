"""Ingestion: every row is published, known, or refused with its reason; unreadable files and too many refusals stop it."""

import datetime as dt
import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest
from event_world import write

import schemas
from gr2.context import Context
from gr2.errors import AuditError, ConfigError, InputError
from spark_jobs import events, interactions, items, sources
from spark_jobs.session import read

pytestmark = pytest.mark.spark

DAY = "2026-01-01"
ONE_DAY = ["simulator.days=1", "data.max_quarantine_share=1.0"]
BEAUTY = Path(os.environ.get("GR2_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data" / "amazon2014_beauty")


def line(**change: object) -> dict:
    record = {"kind": "click", "user_id": "u1", "item_id": "i1", "request_id": "r1", "row": 1, "col": 1, "time": f"{DAY}T10:00:00Z"}
    return {k: v for k, v in {**record, **change}.items() if v != "absent"}


def day_of(ctx: Context, lines: list[dict | str], day: str = DAY) -> Path:
    """A raw day with these events and no items; the simulator leaves days alone that are there."""
    write(ctx.root / "raw" / f"day={day}" / "items.jsonl.gz", [])
    return write(ctx.root / "raw" / f"day={day}" / "events.jsonl.gz", lines)


def content(ctx: Context, table: str) -> list[dict]:
    """Stable columns: an event that stands in the files of two days keeps the one that was ingested first."""
    return sorted(ctx.lake.read(table, schemas.get(table).stable()).to_pylist(), key=lambda r: r.get("event_id") or r["quarantine_id"])


REFUSED = {
    "not_json": ['{"kind": "click", "user_id"', "", "[1]", '{"kind": "click"} and more'],
    "bad_mark": [line(kind=sources.UNREADABLE)],
    "missing_kind": [line(kind=None), {}],
    "unknown_kind": [line(kind="hover"), line(kind=3), line(kind="CLICK")],
    "missing_user": [line(user_id="absent"), line(user_id=None)],
    "bad_user": [line(user_id={"id": 1}), line(user_id=""), line(user_id="u 1")],
    "missing_item": [line(item_id="absent")],
    "bad_item": [line(item_id=["i1"]), line(item_id="x" * 129)],
    "missing_time": [line(time=None)],
    "bad_time": [
        line(time="yesterday"), line(time=1767225600), line(time=f"{DAY}T10:00:00"), line(time="2026-13-01T00:00:00Z"),
        line(time="1970-01-01T00:00:00Z"), line(time={"at": 1}),
    ],
    "future_date": [line(time="2026-01-02T00:00:00Z"), line(time="2066-01-01T00:00:00Z")],
    "bad_request": [line(request_id=["r"])],
    "missing_request": [line(kind="impression", request_id=None)],
    "bad_slot": [line(row="second"), line(col=0), line(row=1.5)],
    "missing_slot": [line(kind="impression", row=None)],
    "bad_propensity": [line(propensity="high"), line(propensity=0), line(propensity=1.5), line(propensity="NaN")],
    "bad_rating": [line(rating="five"), line(rating=11)],
    "bad_position": [line(position="first")],
}  # fmt: skip


def test_every_rule_refuses_what_it_is_for_and_nothing_else(ctx):
    rows = [(reason, x if isinstance(x, str) else json.dumps(x)) for reason, found in REFUSED.items() for x in found]
    good = [
        line(),
        line(user_id=7),
        line(kind="impression", propensity=1e-9),
        line(rating=4.5),
        line(time="2026-01-01T23:59:59.123456+00:00"),
    ]
    rows += [(None, json.dumps(x)) for x in good]
    day_of(ctx, [text for _, text in rows])
    raw = sources.open_source(Context(ctx.cfg, dt.date.fromisoformat(DAY)), "events", events.FIELDS, days=True)
    judged = events.judge(events.with_time(raw.frame, raw.files), raw.fields).collect()
    assert [r["reason"] for r in judged] == [reason for reason, _ in rows]
    assert [r["record_hash"] for r in judged] == [reason and hashlib.sha256(text.encode()).hexdigest() for reason, text in rows]


def test_ingestion_adds_up_and_a_rerun_adds_nothing(make_ctx):
    ctx = make_ctx(ONE_DAY)
    bad = [line(user_id="absent", email="a.b@example.org", reviewerName='Jo "J" Doe', note="x" * 900, request_id="r" * 900), "{", "{"]
    day_of(ctx, [line(), line(), line(item_id="i2", colour="red", size=3), line(kind="purchase", colour="blue"), *bad])
    first = events.run(ctx.cfg, ctx)
    assert (first.rows_in, first.rows_out, first.duplicates, first.quarantined) == (7, 3, 1, 3)
    assert first.detail["unknown_columns"] == {"colour": 2, "email": 1, "note": 1, "reviewerName": 1, "size": 1}
    assert first.detail["reasons"] == {"missing_user": 1, "not_json": 2}
    kept = {r["reason"]: r for r in ctx.lake.read("quarantine").to_pylist()}
    assert len(kept["missing_user"]["record"]) == 500
    assert "example.org" not in kept["missing_user"]["record"]
    assert "Doe" not in kept["missing_user"]["record"]
    assert "note" not in kept["missing_user"]["record"], "what no contract declares is not kept"
    assert kept["not_json"]["source_file"] == f"day={DAY}/events.jsonl.gz"
    before = {t: (ctx.lake.version(t), content(ctx, t)) for t in ("events", "quarantine")}
    again = events.run(ctx.cfg, ctx)
    assert (again.rows_in, again.rows_out, again.duplicates, again.quarantined) == (7, 0, 4, 3)
    assert {t: (ctx.lake.version(t), content(ctx, t)) for t in ("events", "quarantine")} == before


def test_periods_of_another_length_are_refused_before_each_event_comes_twice(make_ctx):
    ctx = make_ctx(ONE_DAY)
    day_of(ctx, [line()])
    assert events.run(ctx.cfg, ctx).rows_out == 1
    monthly = make_ctx([*ONE_DAY, "data.period=month"])
    with pytest.raises(ConfigError, match=r"periods such as 2026-01-01: with data\.period=month .* another paths\.root"):
        events.run(monthly.cfg, monthly)
    assert ctx.lake.read("events").num_rows == 1


def test_days_one_by_one_in_any_order_equal_all_at_once(make_ctx, tmp_path):
    small = ["simulator.users=40", "simulator.items=40", "simulator.days=2", "simulator.malformed_share=0.02", "simulator.late_share=0.1"]
    small += ["data.max_quarantine_share=0.5"]
    whole = make_ctx(small)
    result = events.run(whole.cfg, whole)
    assert result.rows_in == result.rows_out + result.duplicates + result.quarantined
    assert result.rows_out > 300
    assert (whole.root / "truth" / f"day={DAY}.jsonl.gz").exists()
    apart = make_ctx([*small, f"paths.root={tmp_path / 'apart'}"])
    for number in (2, 1, 2):
        one = Context(apart.cfg, dt.date(2026, 1, number))
        events.run(one.cfg, one)
    for table in ("events", "quarantine"):
        assert content(whole, table) == content(apart, table)
    late = [r for r in whole.lake.read("events").to_pylist() if r["event_date"] < r["ingest_date"]]
    assert late
    assert all(r["period"] == str(r["event_date"]) for r in late)


def test_logs_of_ones_own_come_as_a_folder_a_day(make_ctx, tmp_path):
    raw = tmp_path / "raw"
    ctx = make_ctx(["data.source=jsonl", f"data.path={raw}"])
    for wrong, said in (
        ("day=2999-01-01", "has no day="),
        ("day=2026-1-1", "not a folder of a day"),
        ("day=2026-02-30", "not a folder of a day"),
    ):
        (raw / wrong).mkdir(parents=True)
        with pytest.raises(InputError, match=said):
            events.run(ctx.cfg, ctx)
        (raw / wrong).rmdir()
    for number in (1, 2, 3):
        folder = raw / f"day=2026-01-0{number}"
        folder.mkdir()
        record = json.dumps(line(time=f"2026-01-0{number}T10:00:00Z"))
        (folder / "events.jsonl.gz").write_bytes(gzip.compress(record.encode() + b"\n"))
    second = Context(ctx.cfg, dt.date(2026, 1, 2))
    assert (events.run(second.cfg, second).rows_out, events.run(ctx.cfg, ctx).rows_out) == (1, 2), "one day, then the others"
    (raw / "day=2026-1-4").mkdir()
    with pytest.raises(InputError, match="day=YYYY-MM-DD"):
        events.run(ctx.cfg, ctx)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"plain text\n", lambda b: b""])
def test_a_file_that_cannot_be_read_whole_is_named_and_nothing_is_published(make_ctx, spoil):
    ctx = make_ctx(ONE_DAY)
    path = day_of(ctx, [line(user_id=f"u{i}", item_id=os.urandom(8).hex()) for i in range(2000)])
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=r"events\.jsonl\.gz"):
        events.run(ctx.cfg, ctx)
    assert not ctx.lake.exists("events")
    assert not ctx.lake.exists("quarantine")


def test_an_empty_day_publishes_nothing_and_says_so(make_ctx, capsys):
    ctx = make_ctx(ONE_DAY)
    day_of(ctx, [])
    result = events.run(ctx.cfg, ctx)
    assert (result.rows_in, result.rows_out) == (0, 0)
    assert result.detail["empty_files"] == [f"day={DAY}/events.jsonl.gz"]
    assert "nothing to publish" in capsys.readouterr().err
    assert not ctx.lake.exists("events")


def test_too_many_refused_rows_fail_the_gate_and_the_evidence_stays(make_ctx):
    ctx = make_ctx(["simulator.days=1", "data.max_quarantine_share=0.3"])
    day_of(ctx, [line(), line(item_id="i2"), line(kind="hover"), "{"])
    with pytest.raises(AuditError, match=r"2 of 4 rows refused.*unknown_kind"):
        events.run(ctx.cfg, ctx)
    assert not ctx.lake.exists("events")
    assert sorted(ctx.lake.read("quarantine")["reason"].to_pylist()) == ["not_json", "unknown_kind"]


def test_a_file_that_leads_out_of_the_data_folder_is_refused(make_ctx, tmp_path):
    ctx = make_ctx(ONE_DAY)
    path = day_of(ctx, [])
    outside = write(tmp_path / "outside.jsonl.gz", [line()])
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(InputError, match="leads out of the data folder"):
        events.run(ctx.cfg, ctx)


def test_a_day_that_was_never_simulated_is_refused(make_ctx):
    ctx = Context(make_ctx(["simulator.days=2"]).cfg, dt.date(2027, 1, 1))
    with pytest.raises(InputError, match="not a simulated day"):
        events.run(ctx.cfg, ctx)


# -- the Amazon 2014 format ---------------------------------------------------------------------------------------


@pytest.fixture
def amazon(make_ctx, tmp_path):
    """A context over a folder of this format, and that folder."""
    folder = tmp_path / "amazon"
    folder.mkdir()
    settings = [
        "data.source=amazon2014",
        f"data.path={folder}",
        "data.protocol=leave_one_out",
        "data.period=year",
        "data.max_quarantine_share=1.0",
    ]
    return make_ctx(settings), folder


def seconds(text: str) -> str:
    return str(int(dt.datetime.fromisoformat(text + "T00:00:00+00:00").timestamp()))


def test_reviews_keep_their_order_and_unknown_days_are_filled_from_their_neighbours(amazon):
    ctx, folder = amazon
    rows = [
        "user_id,item_id,position,timestamp,stars",
        "1,158978068X,1,,5", f"1,0439893577,2,{seconds('2012-03-01')},5", "1,3,3,,4", f"1,4,4,{seconds('2013-01-01')},4",
        "2,4,1,,3", "2,5,2,,3",
        f"3,4,1,{seconds('2012-03-01')},3", f"3,4,1,{seconds('2012-03-01')},3",
        "4,5,one,,1", "5,6", ",7,1,,1", f"6,7,1,{seconds('2150-01-01')},1", "7,8,1,soon,1",
        f"8,4,1,{seconds('2012-03-01')}.0,3",
    ]  # fmt: skip
    write(folder / "interactions.csv.gz", rows)
    result = events.run(ctx.cfg, ctx)
    assert (result.rows_in, result.rows_out, result.duplicates, result.quarantined) == (14, 8, 1, 5)
    assert result.detail["reasons"] == {"bad_line": 1, "bad_position": 1, "bad_time": 1, "future_date": 1, "missing_user": 1}
    assert result.detail["unknown_columns"].keys() == {"stars"}
    found = ctx.lake.read("events", order_by=["user_id", "source_order"]).to_pylist()
    assert [(r["user_id"], r["item_id"], str(r["event_date"]), r["day_known"]) for r in found] == [
        ("1", "158978068X", "2012-03-01", False), ("1", "0439893577", "2012-03-01", True), ("1", "3", "2012-03-01", False),
        ("1", "4", "2013-01-01", True), ("2", "4", "1970-01-01", False), ("2", "5", "1970-01-01", False), ("3", "4", "2012-03-01", True),
        ("8", "4", "2012-03-01", True),
    ]  # fmt: skip
    assert {r["period"] for r in found} == {"2012", "2013", "1970"}
    assert {r["kind"] for r in found} == {"review"}


def test_a_day_that_is_filled_in_later_makes_no_second_event(amazon):
    """The user's first time gives a day, and with it another period, to what was ingested without any."""
    ctx, folder = amazon
    rows = ["user_id,item_id,position,timestamp", "1,3,1,", "1,4,2,"]
    write(folder / "interactions.csv.gz", rows)
    assert events.run(ctx.cfg, ctx).rows_out == 2
    write(folder / "interactions.csv.gz", [*rows, f"1,5,3,{seconds('2014-03-01')}", "1,6,4,"])
    result = events.run(ctx.cfg, ctx)
    assert (result.rows_in, result.rows_out, result.duplicates) == (4, 2, 2)
    found = ctx.lake.read("events", order_by=["source_order"]).to_pylist()
    assert [(r["item_id"], r["period"]) for r in found] == [("3", "1970"), ("4", "1970"), ("5", "2014"), ("6", "2014")]
    assert interactions.run(ctx.cfg, ctx).rows_out == 4
    assert events.run(ctx.cfg, ctx).rows_out == 0


def test_without_the_csv_file_the_sequences_are_read(amazon):
    ctx, folder = amazon
    write(folder / "sequences.txt.gz", ["1 10 11 10", "2 12", "3", "4 13 {bad}"])
    result = events.run(ctx.cfg, ctx)
    assert (result.rows_in, result.rows_out, result.quarantined) == (7, 5, 2)
    assert result.detail["reasons"] == {"bad_item": 1, "bad_line": 1}
    found = ctx.lake.read("events", order_by=["user_id", "source_order"]).to_pylist()
    assert [(r["user_id"], r["source_order"], r["item_id"]) for r in found] == [
        ("1", 1, "10"), ("1", 2, "11"), ("1", 3, "10"), ("2", 1, "12"), ("4", 1, "13"),
    ]  # fmt: skip


def test_a_folder_without_the_files_or_a_file_without_the_columns_is_refused(amazon):
    ctx, folder = amazon
    with pytest.raises(InputError, match=r"has no interactions\.csv\.gz or .*sequences\.txt\.gz or .*sequences"):
        events.run(ctx.cfg, ctx)
    write(folder / "interactions.csv.gz", ["user,item", "1,2"])
    with pytest.raises(InputError, match="lacks the columns"):
        events.run(ctx.cfg, ctx)


@pytest.mark.skipif(not (BEAUTY / "interactions.csv.gz").exists(), reason="the Amazon 2014 Beauty files are not here")
def test_all_of_beauty_arrives(make_ctx):
    ctx = make_ctx(["data.source=amazon2014", f"data.path={BEAUTY}", "data.protocol=leave_one_out", "data.period=year"])
    result = events.run(ctx.cfg, ctx)
    assert (result.rows_in, result.rows_out, result.quarantined, result.duplicates) == (198_502, 198_502, 0, 0)
    table = ctx.lake.read("events", ["user_id", "item_id", "day_known"])
    assert len(set(table["user_id"].to_pylist())) == 22_363
    assert sum(not known for known in table["day_known"].to_pylist()) == 287
    catalogue = items.run(ctx.cfg, ctx)
    assert (catalogue.rows_out, catalogue.quarantined, catalogue.detail["without_metadata"]) == (12_101, 0, 0)
    assert not any("&#" in t or "&amp;" in t for t in ctx.lake.read("items", ["text"])["text"].to_pylist())
    frame = interactions.to_interactions(read(ctx, "events"), ctx.cfg.data, ctx.cfg.seed, [])
    splits = {r["split"]: r["count"] for r in frame.groupBy("split").count().collect()}
    assert splits == {"pretrain": 198_502 - 3 * 22_363, "rerank": 22_363, "valid": 22_363, "test": 22_363}
