"""RL prompts: what they hold, how the incoming order is re-drawn, and that nothing of it depends on the run."""

import json
import re
from collections import Counter

import pytest

from gr2.prompts import format_answer, load_template
from spark_jobs import rl_prompts
from tests.spark import prompt_world

pytestmark = pytest.mark.spark
PRIOR = load_template().evidence["prior"].words[0]


@pytest.fixture
def requests(make_ctx):
    """A world with requests, semantic IDs and a vocabulary; (ctx, requests by id)."""
    ctx = make_ctx(["rl.replicas=2", "rl.validate_requests=20", "prompt.max_prompt_tokens=1000", "rl.redraw_share=0.5"])
    return ctx, prompt_world.build(ctx)


def read(ctx) -> list[dict]:
    return ctx.lake.read("rl_prompts", order_by=["prompt_id"]).to_pylist()


def test_prompts_of_relevant_requests_with_a_drawn_prior_that_the_text_follows(requests):
    ctx, asked = requests
    result = rl_prompts.run(ctx.cfg, ctx)
    rows = read(ctx)
    relevant = {i for i, r in asked.items() if r["target_rank"]}
    assert {r["request_id"] for r in rows if r["split"] == "rerank"} == {i for i in relevant if asked[i]["split"] == "rerank"}
    assert sum(r["split"] == "valid" for r in rows) == min(20, sum(asked[i]["split"] == "valid" for i in relevant))
    assert not any(r["redrawn"] for r in rows if r["split"] == "valid")
    assert result.detail["redrawn"] == sum(r["redrawn"] for r in rows)
    assert 0.3 < result.detail["redrawn"] / sum(r["split"] == "rerank" for r in rows) < 0.7
    for row in rows:
        assert re.findall(r"^<a_\d+><b_\d+> .*@([A-T])$", row["prompt"], re.M) == row["shown"], "slots as shown"
        assert f"\n{PRIOR}\n{format_answer(row['incoming'])}\n" in row["prompt"], "the evidence tells the order D that the reward knows"
        target = row["incoming"][row["grades"].index(1)]
        place = row["grades"].index(1) + 1
        original = asked[row["request_id"]]
        assert sum(row["grades"]) == 1
        assert row["redrawn"] or place == original["target_rank"]
        codes = prompt_world.sid(int(original["target_id"][1:]))
        assert re.search(rf"^{re.escape(codes)} .*@{target}$", row["prompt"], re.M), "the label names the target itself"
        assert set(row["evidence"]) >= {*row["incoming"], f"{target}:{PRIOR}"}


def test_redrawn_places_are_spread_and_a_rerun_changes_nothing(requests):
    ctx, _ = requests
    rl_prompts.run(ctx.cfg, ctx)
    rows, version = read(ctx), ctx.lake.version("rl_prompts")
    moved = Counter(r["grades"].index(1) for r in rows if r["redrawn"])
    assert len(moved) == 10, "every place is drawn"
    assert max(moved.values()) < 0.35 * sum(moved.values())
    replicas = {}
    for row in rows:
        replicas.setdefault(row["request_id"], []).append(json.dumps([row["incoming"], row["shown"]]))
    assert all(len(set(seen)) == len(seen) for seen in replicas.values()), "each replica has shuffles of its own"
    rl_prompts.run(ctx.cfg, ctx)
    assert read(ctx) == rows
    assert ctx.lake.version("rl_prompts") == version
