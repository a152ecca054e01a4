"""Accepted traces become texts that a student can be taught from; what no longer fits today's lists is left out."""

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from prompt_world import settle

import schemas
from gr2.answers import parse
from gr2.errors import AuditError
from gr2.prompts import EMPTY_THOUGHT
from scoring.model import encode, load_tokenizer
from spark_jobs import reasoning_traces, sft_examples
from spark_jobs.prompting import Requests, render_texts
from spark_jobs.sft_examples import taught

pytestmark = pytest.mark.spark
SHARES = ["sft.modes.think=0.6", "sft.modes.direct=0.4", "sft.drills=0"]


@pytest.fixture
def traced(make_ctx):
    """A world with traces of both modes."""
    ctx = settle(make_ctx([*SHARES, "traces.accepted_per_request=2", "traces.max_requests=40", "traces.no_target_requests=3"]))
    reasoning_traces.run(ctx.cfg, ctx)
    return ctx


def test_examples_teach_accepted_orders_with_the_prompt_the_student_sees(traced, make_ctx):
    ctx = traced
    result = sft_examples.run(ctx.cfg, ctx)
    traces = {t["sample_id"]: t for t in ctx.lake.read("reasoning_traces").to_pylist()}
    rows = ctx.lake.read("sft_examples", order_by=["ordinal"]).to_pylist()
    tokenizer = load_tokenizer(ctx.model("midtrain").path)
    requests = Requests(ctx, ctx.cfg, "rerank")
    places = {request: place for place, request in enumerate(requests.ids)}
    wanted = {i for i, t in traces.items() if t["verdict"] == "accepted" and t["mode"] == "rejection"}
    assert {r["sample_id"] for r in rows} == wanted, "0.6 and 0.4 part the traces, and only rejection teaches by default"
    assert result.rows_out == len(rows) == len(wanted) == result.detail["think"] + result.detail["direct"]
    assert 0.4 < result.detail["think"] / len(rows) < 0.8
    for row in rows:
        trace = traces[row["sample_id"]]
        place = places[row["request_id"]]
        request = requests.rows_of(place)
        view = requests.view(place, request, trace["attempt"])
        assert row["prompt"] == render_texts(tokenizer, [view], ctx.cfg, row["mode"], filled=False)[0]
        parsed = parse(row["reasoning"] + row["answer"], view.labels, row["mode"])
        assert view.item_of(parsed.order[0]) == request["target_id"] == trace["answer"][0]
        assert (row["reasoning"] == EMPTY_THOUGHT) == (row["mode"] == "direct")
        assert row["mode"] == "direct" or row["reasoning"] + row["answer"] == trace["text"]
        assert len(encode(tokenizer, row["reasoning"])) <= ctx.cfg.prompt.max_thought_tokens + 2
    version = ctx.lake.version("sft_examples")
    sft_examples.run(ctx.cfg, ctx)
    assert ctx.lake.version("sft_examples") == version, "a rerun makes no new version"
    assert ctx.lake.read("sft_examples", order_by=["ordinal"]).to_pylist() == rows

    wide = ["sft.traces=both", "sft.modes.think=1", "sft.modes.direct=1", "sft.drills=20"]
    both = make_ctx([*wide, "traces.max_requests=40", "traces.no_target_requests=3"]).cfg
    many = sft_examples.run(both, ctx).detail
    assert many["think"] == many["direct"] == sum(t["verdict"] == "accepted" for t in traces.values())
    assert 0 < many["drill"] <= 20, "those whose thought is too long are left out"
    assert {r["source"] for r in ctx.lake.read("sft_examples").to_pylist()} == {"rejection", "targeted", "drill"}

    few = make_ctx([*SHARES, "sft.max_traces=7", "traces.max_requests=40", "traces.no_target_requests=3"]).cfg
    assert sft_examples.run(few, ctx).rows_out == 7
    assert {r["sample_id"] for r in ctx.lake.read("sft_examples").to_pylist()} < wanted
    unproven = make_ctx([*SHARES, "sft.no_target=true", "traces.max_requests=40", "traces.no_target_requests=3"]).cfg
    sft_examples.run(unproven, ctx)
    taught_by = {r["sample_id"]: r["source"] for r in ctx.lake.read("sft_examples").to_pylist()}
    without = {i for i, t in traces.items() if t["verdict"] == "no_target" and t["mode"] == "rejection"}
    assert without
    assert taught_by == dict.fromkeys(wanted, "rejection") | dict.fromkeys(without, "no_target")

    short = make_ctx(["prompt.max_thought_tokens=5", "sft.modes.direct=0"]).cfg
    with pytest.raises(AuditError, match="no usable trace"):  # the prompt settings are part of the teacher's name
        sft_examples.run(short, ctx)


def test_traces_of_lists_that_changed_are_left_out(traced):
    ctx = traced
    before = sft_examples.run(ctx.cfg, ctx)
    traces = ctx.lake.read("reasoning_traces").to_pylist()
    stale = next(t for t in traces if t["verdict"] == "accepted" and t["mode"] == "rejection")
    stale["prompt_hash"] = "0" * 16
    gone = next(t for t in traces if t["verdict"] == "accepted" and t["mode"] == "rejection" and t["request_id"] != stale["request_id"])
    gone["request_id"] = "rerank:nobody:1"
    table = pa.Table.from_pylist(traces, schema=schemas.get("reasoning_traces").arrow())
    write_deltalake(ctx.table_path("reasoning_traces"), table, mode="overwrite")
    after = sft_examples.run(ctx.cfg, ctx)
    assert after.rows_out == before.rows_out - 2
    assert (after.detail["left_out_list_changed"], after.detail["left_out_request_gone"]) == (1, 1)


def test_shares(make_ctx):
    cfg = make_ctx(["sft.modes.think=0.3", "sft.modes.direct=0.5"]).cfg
    ids = [f"s{i}" for i in range(2000)]
    think, direct = ({i for i in ids if taught(i, mode, cfg)} for mode in ("think", "direct"))
    assert len(think) == pytest.approx(600, abs=80)
    assert len(direct) == pytest.approx(1000, abs=90)
    assert not think & direct
    assert not any(taught(i, "direct", make_ctx(["sft.modes.think=1", "sft.modes.direct=0.0"]).cfg) for i in ids[:50])
