"""Raw formats as people have them: each arrives under the contract's names, and what no contract declares reaches no table."""

import datetime as dt
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from event_world import write

from gr2.errors import ConfigError, InputError
from spark_jobs import events, impressions, items

pytestmark = pytest.mark.spark
SHARED = Path(os.environ.get("GR2_SHARED_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
UTC = dt.UTC


def needs(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (SHARED / folder).is_dir(), reason=f"the files of {folder} are not here")


@pytest.fixture
def ctx_of(make_ctx, tmp_path):
    """`ctx_of("amazon_reviews")`: a context over an empty raw folder, and that folder."""

    def make(source: str, *settings: str, path: Path | None = None):
        folder = path or tmp_path / "raw"
        folder.mkdir(exist_ok=True)
        return make_ctx([f"data.source={source}", f"data.path={folder}", "data.max_quarantine_share=1.0", *settings]), folder

    return make


def found(ctx, table: str, key: str) -> dict[str, dict]:
    return {row[key]: row for row in ctx.lake.read(table).to_pylist()}


def texts(root: Path) -> str:
    """All that stands in the tables, as one text."""
    return "\n".join(str(pq.read_table(path).to_pylist()) for path in sorted((root / "tables").rglob("*.parquet")))


REVIEWS = {
    2014: {"reviewerID": "U1", "asin": "0439893577", "reviewerName": "Jo Doe", "helpful": [0, 1], "reviewText": "fine soap", "overall": 4.0,
           "summary": "nice", "unixReviewTime": 1393545600, "reviewTime": "02 28, 2014"},
    2018: {"overall": 5.0, "verified": True, "reviewerID": "U1", "asin": "0439893577", "style": {"Size:": " L"}, "reviewerName": "Jo Doe",
           "reviewText": "fine soap", "unixReviewTime": 1393545600, "vote": "2"},
    2023: {"rating": 1.0, "title": "fine soap", "text": "Jo Doe wrote", "images": [], "asin": "B0CHILD", "parent_asin": "0439893577",
           "user_id": "U1", "timestamp": 1393545600123, "helpful_vote": 0, "verified_purchase": True},
}  # fmt: skip
SOAP = 'It\'s "soap"'
PRODUCTS = {
    2014: repr({"asin": "0439893577", "title": SOAP, "price": 29.99, "brand": "Moss", "related": {"also_bought": ["B1"]},
                "categories": [["Beauty", "Soap"], ["Beauty", "Gifts"]], "salesRank": {"Beauty": 7}}),
    2018: {"category": ["Beauty", "Soap", "Gifts"], "title": SOAP, "brand": "Moss", "price": "$29.99", "asin": "0439893577", "rank": []},
    2023: {"main_category": "All Beauty", "title": SOAP, "store": "Moss", "price": 29.99, "categories": ["Beauty", "Soap", "Gifts"],
           "parent_asin": "0439893577", "details": {"Brand": "x"}},
}  # fmt: skip


@pytest.mark.parametrize(("year", "ending"), [(2014, ".json.gz"), (2018, ".json.gz"), (2023, ".jsonl.gz")])
def test_the_three_releases_of_amazon_reviews_say_the_same(ctx_of, year, ending):
    ctx, folder = ctx_of("amazon_reviews")
    broken = json.dumps({**REVIEWS[year], "reviewerName": "Ann Roe"})[:-1]
    unnamed = {k: v for k, v in REVIEWS[year].items() if k not in ("reviewerID", "user_id")}
    write(folder / f"Beauty{ending}", [REVIEWS[year], broken, unnamed])
    odd = PRODUCTS[year].replace("29.99", "'see page'") if year == 2014 else json.dumps({**PRODUCTS[year], "price": "see page"})
    write(folder / f"meta_Beauty{ending}", [PRODUCTS[year], odd.replace("0439893577", "B2"), "{'asin': __import__('os')}"])
    result = events.run(ctx.cfg, ctx)
    assert (result.rows_in, result.rows_out, result.quarantined) == (3, 1, 2)
    (event,) = ctx.lake.read("events").to_pylist()
    assert (event["user_id"], event["item_id"], event["kind"], str(event["event_date"])) == ("U1", "0439893577", "review", "2014-02-28")
    assert event["rating"] == {2014: 4.0, 2018: 5.0, 2023: 1.0}[year]
    catalogue = items.run(ctx.cfg, ctx)
    assert (catalogue.rows_in, catalogue.rows_out, catalogue.detail["reasons"]) == (3, 2, {"not_json": 1})
    soap = found(ctx, "items", "item_id")["0439893577"]
    assert (soap["title"], soap["brand"], soap["price"]) == (SOAP, "Moss", 29.99)
    assert soap["categories"] == ["Beauty", "Soap", "Gifts"]
    assert str(soap["first_seen"]) == "2014-02-28", "where files have no day, the events tell"
    assert found(ctx, "items", "item_id")["B2"]["price"] is None, "a price that is none is unknown"
    for private in ("Jo Doe", "Ann Roe", "fine soap", "Jo Doe wrote"):
        assert private not in texts(ctx.root)


@needs("amazon2018_gift_cards_raw")
def test_real_gift_cards_arrive(ctx_of):
    ctx, _ = ctx_of("amazon_reviews", path=SHARED / "amazon2018_gift_cards_raw")
    result = events.run(ctx.cfg, ctx)
    assert (result.rows_in, result.quarantined) == (2972, 0)
    assert result.rows_out + result.duplicates == 2972
    assert result.detail["unknown_columns"]["reviewText"] == 2966
    table = ctx.lake.read("events", ["user_id", "item_id", "rating"])
    assert (len(set(table["user_id"].to_pylist())), len(set(table["item_id"].to_pylist()))) == (458, 148)
    catalogue = items.run(ctx.cfg, ctx)
    assert (catalogue.rows_in, catalogue.quarantined, catalogue.detail["without_metadata"]) == (1547, 0, 0)
    prices = [p for p in ctx.lake.read("items", ["price"])["price"].to_pylist() if p is not None]
    assert 100 < len(prices) <= 1547 - 1185
    assert all(0 < p < 10_000 for p in prices)


@needs("open_bandit_small")
def test_open_bandit_rows_are_impressions_and_their_clicks(ctx_of):
    ctx, folder = ctx_of("open_bandit")
    for name in ("random_men.csv.gz", "bts_men.csv.gz", "random_men_item_context.csv.gz"):
        (folder / name).write_bytes((SHARED / "open_bandit_small" / name).read_bytes())
    result = events.run(ctx.cfg, ctx)
    assert (result.rows_in, result.rows_out, result.quarantined) == (20_115, 20_115, 0), "20,000 rows, 46 and 69 clicks"
    impressions.run(ctx.cfg, ctx)
    shown = ctx.lake.read("impressions").to_pylist()
    assert (len(shown), sum(r["click"] for r in shown), len({r["request_id"] for r in shown})) == (20_000, 115, 20_000)
    assert {(r["slot_row"], r["slot_col"]) for r in shown} == {(1, 1), (1, 2), (1, 3)}
    uniform = [r["propensity"] for r in shown if r["propensity"] == pytest.approx(1 / 34)]
    assert len(uniform) >= 10_000
    assert items.run(ctx.cfg, ctx).rows_out == 34
    assert "user_feature_0" not in result.detail["unknown_columns"]


ORDERS = [
    {"customer": "ann", "sku": 7, "at": dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "email": "a@example.org"},
    {"customer": "bob", "sku": 8, "at": dt.datetime(2026, 1, 2, 4, 0, 0, tzinfo=UTC), "email": None},
    {"customer": None, "sku": 8, "at": dt.datetime(2026, 1, 2, 4, 0, 0, tzinfo=UTC), "email": "c@example.org"},
]
GOODS = [{"sku": 7, "name": "Soap", "tags": ["Care", "Soap"], "cost": 2.5}, {"sku": 8, "name": "Comb", "tags": [], "cost": None}]
NAMES = "columns: {user_id: [customer, buyer], item_id: [sku], time: [at]}, constants: {kind: purchase}"
GOODS_NAMES = "columns: {item_id: [sku], title: [name], categories: [tags], price: [cost]}"


def csv(rows: list[dict]) -> list[str]:
    def cell(value: object) -> str:
        return "" if value is None else '"' + str(value).replace('"', '""') + '"' if "," in str(value) else str(value)

    return [",".join(rows[0]), *(",".join(cell(v) for v in row.values()) for row in rows)]


@pytest.mark.parametrize("format_", ["csv", "parquet", "delta", "jsonl"])
def test_own_files_come_by_the_names_they_have(ctx_of, format_):
    pattern = {"csv": "orders/*.csv.gz", "parquet": "orders/*.parquet", "delta": "orders", "jsonl": "orders/*.jsonl.gz"}[format_]
    goods = pattern.replace("orders", "goods")
    ctx, folder = ctx_of(
        "files",
        f"data.events={{files: ['{pattern}'], format: {format_}, {NAMES}}}",
        f"data.items={{files: ['{goods}'], format: {format_}, {GOODS_NAMES}}}",
    )
    for name, rows in (("orders", ORDERS), ("goods", GOODS)):
        plain = [
            {k: v.isoformat() if isinstance(v, dt.datetime) else json.dumps(v) if isinstance(v, list) else v for k, v in r.items()}
            for r in rows
        ]
        if format_ == "csv":
            write(folder / name / "a.csv.gz", csv([{k: v.replace('"', "'") if k == "tags" else v for k, v in r.items()} for r in plain]))
        elif format_ == "jsonl":
            write(
                folder / name / "a.jsonl.gz", [{k: v.isoformat() if isinstance(v, dt.datetime) else v for k, v in r.items()} for r in rows]
            )
        elif format_ == "parquet":
            (folder / name).mkdir()
            pq.write_table(pa.Table.from_pylist(rows), folder / name / "a.parquet")
        else:
            write_deltalake(str(folder / name), pa.Table.from_pylist(rows))
    result = events.run(ctx.cfg, ctx)
    assert (result.rows_in, result.rows_out, result.detail["reasons"]) == (3, 2, {"missing_user": 1})
    assert result.detail["unknown_columns"].keys() == {"email"}
    bought = found(ctx, "events", "user_id")
    assert (bought["ann"]["item_id"], bought["ann"]["event_time"]) == ("7", ORDERS[0]["at"])
    assert {r["kind"] for r in bought.values()} == {"purchase"}
    (refused,) = ctx.lake.read("quarantine").to_pylist()
    assert '"sku":"8"' in refused["record"]
    assert "example.org" not in texts(ctx.root)
    items.run(ctx.cfg, ctx)
    catalogue = found(ctx, "items", "item_id")
    assert (catalogue["7"]["title"], catalogue["7"]["categories"], catalogue["7"]["price"]) == ("Soap", ["Care", "Soap"], 2.5)
    again = events.run(ctx.cfg, ctx)
    assert (again.rows_out, again.duplicates) == (0, 2), "a rerun adds nothing"


def test_a_log_without_a_catalogue_has_the_items_that_it_names(ctx_of):
    ctx, folder = ctx_of("files", f"data.events={{files: ['o.csv'], format: csv, {NAMES}}}")
    (folder / "o.csv").write_text("buyer,sku,at\nann,7,2026-01-02T03:04:05Z\n")
    assert events.run(ctx.cfg, ctx).rows_out == 1
    assert items.run(ctx.cfg, ctx).rows_out == 1
    assert found(ctx, "items", "item_id")["7"]["has_text"] is False


def test_sequences_may_be_json_and_repeat_an_item(ctx_of):
    ctx, folder = ctx_of("amazon2014")
    write(folder / "sequences_rebuilt.jsonl.gz", [{"user_id": "A9", "items": [5, 6, 5], "split": "x"}, {"user_id": "A1", "items": []}])
    result = events.run(ctx.cfg, ctx)
    assert (result.rows_out, result.quarantined) == (3, 1)
    rows = ctx.lake.read("events", order_by=["source_order"]).to_pylist()
    assert [(r["user_id"], r["item_id"]) for r in rows] == [("A9", "5"), ("A9", "6"), ("A9", "5")]


def test_marks_of_clicks_are_read_however_they_are_spelled(ctx_of):
    names = "columns: {user_id: [u], item_id: [i], time: [at], row: [], col: []}, constants: {kind: view}, clicked: c"
    ctx, folder = ctx_of("files", f"data.events={{files: ['o.csv'], format: csv, {names}}}")
    marks = ["1", "1.0", "TRUE", "true", "yes", "0", "0.0", "False", "no", "", " ", "maybe", "2", "NaN"]
    (folder / "o.csv").write_text("u,i,at,c\n" + "".join(f"u{n},7,2026-01-02T03:04:05Z,{mark}\n" for n, mark in enumerate(marks)))
    result = events.run(ctx.cfg, ctx)
    kinds = [(int(r["user_id"][1:]), r["kind"]) for r in ctx.lake.read("events").to_pylist()]
    assert sorted(n for n, kind in kinds if kind == "click") == [0, 1, 2, 3, 4]
    assert sorted(n for n, kind in kinds if kind == "view") == list(range(11)), "what cannot be read is not taken for unclicked"
    assert result.detail["reasons"] == {"bad_mark": 3}


def test_wrong_declarations_are_named(ctx_of, make_ctx):
    with pytest.raises(ConfigError, match=r"data\.events\.files"):
        make_ctx(["data.source=files"])
    with pytest.raises(ConfigError, match="did you mean 'columns'"):
        make_ctx(["data.source=files", "data.events={files: [a], colums: {}}"])
    ctx, folder = ctx_of("files", f"data.events={{files: ['o.csv'], format: csv, {NAMES}}}")
    with pytest.raises(InputError, match=r"has no o\.csv"):
        events.run(ctx.cfg, ctx)
    (folder / "o.csv").write_text("sku,at\n7,2026-01-02T03:04:05Z\n")
    with pytest.raises(InputError, match="lacks the columns"):
        events.run(ctx.cfg, ctx)
    outside = folder.parent / "outside.csv"
    outside.write_text("buyer,sku,at\n")
    (folder / "o.csv").unlink()
    (folder / "o.csv").symlink_to(outside)
    with pytest.raises(InputError, match="leads out of the data folder"):
        events.run(ctx.cfg, ctx)
