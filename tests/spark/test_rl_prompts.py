"""RL prompts: what they hold, how the incoming order is re-drawn, and that nothing of it depends on the run."""

import json
import re
from collections import Counter

import pytest

from gr2 import artifacts
from gr2.prompts import load_template, vocabulary_texts
from scoring.model import build_vocabulary
from spark_jobs import rl_prompts
from tests.spark import rerank_world as world

pytestmark = pytest.mark.spark
PLACES = load_template().evidence["prior"].words


@pytest.fixture
def requests(make_ctx):
    """A world with requests, semantic IDs and a vocabulary; (ctx, requests by id)."""
    ctx = make_ctx(["rl.replicas=2", "rl.validate_requests=20", "prompt.max_prompt_tokens=1000", "rl.redraw_share=0.5"])
    requests = world.learnable(ctx)
    with artifacts.publish_folder(ctx.root, "tokenizer", {}) as folder:
        (folder / "config.json").write_text("{}")
    version = ctx.model("tokenizer", "tokenizer").id
    world.put(ctx, "semantic_ids", [world_sid(version, i) for i in range(24)])
    with artifacts.publish_folder(ctx.root, "midtrain", {}) as folder:
        build_vocabulary(vocabulary_texts(load_template()), 500, [f"<{level}_{c}>" for level in "ab" for c in range(12)], folder)
    return ctx, requests


def world_sid(version: str, item: int) -> dict:
    codes = [item // 12, item % 12]
    text = f"<a_{codes[0]}><b_{codes[1]}>"
    return {"tokenizer": version, "item_id": f"i{item}", "codes": codes, "token_text": text, "learned_codes": codes, "separated": False,
            "residual": 0.1, "added_on": world.DAY}  # fmt: skip


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
        lines = dict(re.findall(r"^<a_\d+><b_\d+> (.*)@([A-T])$", row["prompt"], re.M)[i][::-1] for i in range(10))
        assert list(lines) == row["shown"], "slots as shown"
        for place, label in enumerate(row["incoming"]):
            assert PLACES[place] in lines[label].split(), "the evidence tells the place in the order D that the reward knows"
        target = row["incoming"][row["grades"].index(1)]
        place = row["grades"].index(1) + 1
        original = asked[row["request_id"]]
        assert sum(row["grades"]) == 1
        assert row["redrawn"] or place == original["target_rank"]
        codes = world_sid("", int(original["target_id"][1:]))["token_text"]
        assert re.search(rf"^{re.escape(codes)} .*@{target}$", row["prompt"], re.M), "the label names the target itself"
        assert set(row["evidence"]) >= {*row["incoming"], f"{target}:{PLACES[place - 1]}"}


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
