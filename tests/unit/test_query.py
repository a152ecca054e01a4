"""`gr2 sql`, `gr2 tables` and the lake: without a JVM, at the promoted release, reaching nothing but the tables."""

import datetime as dt
import json
import re
import subprocess
import sys

import pytest

import schemas
from gr2 import PROJECT
from gr2.errors import EnvironmentProblem, InputError, MissingInputError
from schemas.lake import Lake
from schemas.query import print_query, print_tables, query
from tests.tables import put

pytestmark = pytest.mark.unit
DAY = dt.date(2026, 1, 1)


def stats(*items: str) -> list[dict]:
    return [
        {"fit": "train", "item_id": i, "count": n, "users": 1, "recent": 1.0, "popularity_rank": 1, "last_date": DAY, "reference_date": DAY}
        for n, i in enumerate(items, 1)
    ]


def release(version: int) -> dict:
    return {
        **dict.fromkeys(("profile", "run_id", "code", "config_hash", "lock_hash"), "x"),
        "release_id": "r",
        "status": "promoted",
        "pins": json.dumps({"tables": {"item_stats": version}}),
        "seed": 1,
        "promoted_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    }


def test_a_query_reads_the_promoted_release_and_latest_the_newest(ctx):
    put(ctx, "item_stats", stats("a"))
    put(ctx, "releases", [release(0)])
    put(ctx, "item_stats", stats("a", "b"))
    count = "SELECT count(*) AS n FROM item_stats"
    assert query(ctx, count).to_pylist() == [{"n": 1}]
    assert query(ctx, count, latest=True).to_pylist() == [{"n": 2}]


@pytest.mark.parametrize(
    "text",
    [
        "SELECT * FROM read_csv('/etc/passwd')", "SELECT * FROM '/etc/passwd'", "COPY (SELECT 1) TO '/tmp/x.csv'", "INSTALL httpfs",
        "ATTACH '/tmp/x.db'", "SET enable_external_access = true", "SELECT nonsense", "",
    ],
)  # fmt: skip
def test_a_query_that_reaches_out_or_is_wrong_is_a_named_error(ctx, text):
    put(ctx, "item_stats", stats("a"))
    with pytest.raises(InputError, match="the query failed"):
        query(ctx, text)


@pytest.mark.parametrize(("output", "expected"), [("csv", "item_id,count\na,1\n"), ("json", '{"item_id": "a", "count": 1}\n')])
def test_formats(ctx, capsys, output, expected):
    put(ctx, "item_stats", stats("a"))
    print_query(ctx, "SELECT item_id, count FROM item_stats", output, latest=False)
    assert capsys.readouterr().out.replace("\r", "") == expected


@pytest.mark.parametrize("output", ["csv", "json", "table"])
def test_columns_of_one_name_keep_their_values(ctx, capsys, output):
    print_query(ctx, "SELECT 1 AS a, 2 AS a, 3 AS b", output, latest=False)
    told = re.findall(r"[a-z]\w*|\d", capsys.readouterr().out)
    assert told == (["a", "1", "a_2", "2", "b", "3"] if output == "json" else ["a", "a_2", "b", "1", "2", "3"])


def test_a_long_result_is_cut_on_a_terminal_and_says_so(ctx, capsys):
    put(ctx, "item_stats", stats("a"))
    print_query(ctx, "SELECT n FROM range(1000) AS t(n), item_stats", "table", latest=False)
    shown = capsys.readouterr()
    assert "999" not in shown.out
    assert "the first 100 of 1,000 rows" in shown.err


def test_tables_lists_every_table_with_rows_of_those_that_exist(ctx, capsys):
    put(ctx, "item_stats", stats("a", "b"))
    print_tables(ctx)
    shown = capsys.readouterr().out
    assert all(name[:8] in shown for name in schemas.NAMES)


def test_a_place_that_cannot_be_reached_is_named():
    with pytest.raises(EnvironmentProblem, match=r"hdfs://127\.0\.0\.1:1/gr2 cannot be reached"):
        Lake("hdfs://127.0.0.1:1/gr2").exists("events")


def test_the_lake_filters_sorts_and_names_the_builder(ctx):
    put(ctx, "item_stats", stats("c", "a", "b"))
    assert ctx.lake.read("item_stats", ["item_id"], order_by=["item_id"])["item_id"].to_pylist() == ["a", "b", "c"]
    assert ctx.lake.read("item_stats", ["item_id"], item_id=["a", "c"], fit="train", order_by=["count"])["item_id"].to_pylist() == [
        "c",
        "a",
    ]
    for most in (1, 2, 3, 9):
        first = ctx.lake.read("item_stats", ["item_id"], order_by=["count", "item_id"], most=most)
        assert first["item_id"].to_pylist() == ["c", "a", "b"][:most]
    with pytest.raises(MissingInputError, match="gr2 stage evidence"):
        ctx.lake.read("item_pairs")
    with pytest.raises(KeyError):
        ctx.lake.read("../../etc")


READ_AND_END = """
import sys
from schemas.lake import Lake
Lake(sys.argv[1]).read("item_stats", ["item_id", "count"], fit="train")
"""


def test_a_process_that_has_read_ends_well(ctx):
    """Of eight, delta-rs's own file system lets about half abort."""
    put(ctx, "item_stats", stats("c", "a", "b"))
    command = [sys.executable, "-c", READ_AND_END, str(ctx.root)]
    ended = [subprocess.run(command, cwd=PROJECT, capture_output=True, text=True) for _ in range(8)]
    assert [(done.returncode, done.stderr) for done in ended] == [(0, "")] * 8
