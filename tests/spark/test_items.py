"""The catalogue: text as people would read it, bad rows refused, no item of the events forgotten."""

from dataclasses import asdict

import pytest
from event_world import event_table, write

from gr2.errors import InputError
from gr2.pipeline import write_record
from spark_jobs import evaluation, items
from spark_jobs.publish import publish
from spark_jobs.session import frame_of

pytestmark = pytest.mark.spark


GOOD = [
    {
        "item_id": "a",
        "title": "L&#39;Oreal &amp; Co  &#9733;",
        "brand": "L&#39;Oreal",
        "categories": ["Skin &amp; Hair", "Care"],
        "price": 4.5,
    },
    {"item_id": 2, "title": "x" * 400, "brand": None, "categories": None, "price": None, "asin": "B0", "colour": "red"},
    {"item_id": "0439893577", "title": None, "brand": " ", "categories": [], "price": ""},
    {"item_id": "n", "title": "No such &#1114112; &amp; sign", "categories": " "},
    {"item_id": "k", "title": None, "brand": None, "categories": None, "text_id": "pocoyo and friends swiggle"},
    {"item_id": "b", "title": "[Old version] It&apos;s &quot;fine&quot;", "brand": "B", "categories": ["Only &lt;one&gt;"]},
]
BAD = {
    "not_json": ["{", '["item"]'],
    "missing_item": [{"title": "t"}],
    "bad_item": [{"item_id": {"a": 1}}],
    "bad_title": [{"item_id": "c", "title": ["t"]}, {"item_id": "c", "title": {"en": "t"}}],
    "bad_brand": [{"item_id": "c", "brand": {"n": 1}}],
    "bad_categories": [{"item_id": "c", "categories": "Makeup"}],
    "bad_price": [{"item_id": "c", "price": "cheap"}, {"item_id": "c", "price": -1}, {"item_id": "c", "price": "Infinity"}],
}


def test_text_is_resolved_bad_rows_are_refused_and_bare_items_get_a_row(make_ctx):
    ctx = make_ctx(["simulator.days=2", "data.max_quarantine_share=1.0"])
    publish(ctx, "events", frame_of(ctx, event_table([("u", "a", "click", 0), ("u", "only-seen", "click", 3)])))
    newer = {"item_id": "a", "title": "Renamed &eacute;", "brand": "L", "categories": [], "price": 5}
    write(ctx.raw_path() / "day=2026-01-01" / "items.jsonl.gz", [*GOOD, GOOD[0], *(x for found in BAD.values() for x in found)])
    write(ctx.raw_path() / "day=2026-01-02" / "items.jsonl.gz", [newer])
    result = items.run(ctx.cfg, ctx)
    refused = sum(map(len, BAD.values()))
    bare = 1
    assert (result.rows_in, result.quarantined, result.duplicates, result.rows_out) == (len(GOOD) + 2 + refused + bare, refused, 2, 7)
    assert result.detail["reasons"] == {k: len(v) for k, v in sorted(BAD.items())}
    assert result.detail["without_metadata"] == bare
    write_record(ctx, "items", asdict(result))
    assert [(f["subject"], f["value"], f["passed"]) for f in evaluation._reconciled(ctx)] == [("items", 0.0, True)], (
        "bare items are no loss"
    )
    found = {r["item_id"]: r for r in ctx.lake.read("items").to_pylist()}
    assert found["a"]["text"] == "Renamed é | L"
    assert (str(found["a"]["first_seen"]), found["a"]["price"]) == ("2026-01-01", 5.0)
    assert (found["2"]["title"], found["2"]["asin"], found["only-seen"]["asin"]) == ("x" * 300, "B0", None)
    assert (found["0439893577"]["text"], found["0439893577"]["has_text"], found["0439893577"]["brand"]) == ("0439893577", False, None)
    assert (found["k"]["text"], found["k"]["title"], found["k"]["has_text"]) == ("pocoyo and friends swiggle", None, True)
    assert found["b"]["text"] == '[Old version] It\'s "fine" | B | Only <one>'
    assert found["b"]["categories"] == ["Only <one>"]
    assert found["n"]["text"] == "No such &#1114112; &amp; sign", "what names no character is kept as it stands"
    assert (found["only-seen"]["text"], found["only-seen"]["has_text"]) == ("only-seen", False)
    targets = {(r["target"], r["reason"]) for r in ctx.lake.read("quarantine").to_pylist()}
    assert targets == {("items", reason) for reason in BAD}
    version = ctx.lake.version("items")
    items.run(ctx.cfg, ctx)
    assert ctx.lake.version("items") == version


def test_a_truncated_catalogue_is_named(make_ctx):
    ctx = make_ctx(["simulator.days=1"])
    publish(ctx, "events", frame_of(ctx, event_table([("u", "a", "click", 0)])))
    path = ctx.raw_path() / "day=2026-01-01" / "items.jsonl.gz"
    write(path, [{"item_id": f"i{i * 7919 % 10007}"} for i in range(3000)])
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(InputError, match=r"items\.jsonl\.gz"):
        items.run(ctx.cfg, ctx)
    assert not ctx.lake.exists("items")
