"""Views say what the tables say, and prompts keep to their budget."""

from dataclasses import replace

import pytest
from deltalake import write_deltalake
from prompt_world import settle

from gr2 import artifacts
from gr2.errors import AuditError, MissingInputError, ModelError
from gr2.prompts import EMPTY_THOUGHT, load_template, make_view
from scoring.model import encode, load_tokenizer
from spark_jobs.prompting import FEATURES, render_texts, sample, views

pytestmark = pytest.mark.spark


def test_views_say_what_the_tables_say(ctx):
    settle(ctx)
    requests = {r["request_id"]: r for r in ctx.lake.read("candidates").to_pylist()}
    features = {(f["request_id"], f["item_id"]): f for f in ctx.lake.read("candidate_features").to_pylist()}
    sids = {r["item_id"]: r["token_text"] for r in ctx.lake.read("semantic_ids").to_pylist()}
    found = list(views(ctx, ctx.cfg, "rerank", replicas=(0, 3)))
    assert [r["request_id"] for r, _ in found] == sorted(i for i, r in requests.items() if r["split"] == "rerank" for _ in range(2))
    assert [r["replica"] for r, _ in found] == [0, 3] * 120
    for row, view in found:
        request = requests[row["request_id"]]
        assert [c.item_id for c in view.candidates] == request["candidate_ids"]
        kept = ctx.cfg.prompt.history_items
        assert [(h.item_id, h.days_ago) for h in view.history] == list(zip(request["history_ids"], request["history_days"], strict=True))[
            -kept:
        ]
        for candidate in view.candidates:
            assert candidate.sid == sids[candidate.item_id]
            assert "grade" not in candidate.features
            assert dict(candidate.features) == {k: features[view.request_id, candidate.item_id][k] for k in FEATURES}
        assert view == make_view(view.request_id, view.history, view.candidates, row["replica"])


def test_only_what_is_asked_for_and_nothing_without_tables(ctx):
    with pytest.raises(MissingInputError, match="gr2 stage"):
        list(views(ctx, ctx.cfg, "rerank"))
    settle(ctx)
    assert [r["request_id"] for r, _ in views(ctx, ctx.cfg, "valid", ["valid:u3:9", "valid:u1:9", "rerank:u2:9"])] == [
        "valid:u1:9",
        "valid:u3:9",
    ]
    assert list(views(ctx, ctx.cfg, "valid", [])) == []


def test_tables_that_disagree_are_refused(ctx):
    settle(ctx)
    features = ctx.lake.read("candidate_features")
    write_deltalake(ctx.table_path("candidate_features"), features.slice(1), mode="overwrite", partition_by=["split", "night"])
    gone = features["split"][0].as_py()
    with pytest.raises(AuditError, match="differ"):
        list(views(ctx, ctx.cfg, gone))
    with artifacts.publish_folder(ctx.root, "tokenizer", {}) as folder:
        (folder / "config.json").write_text('{"new": true}')  # a tokenizer that has given no item its codes
    with pytest.raises(AuditError, match="no semantic ID"):
        list(views(ctx, ctx.cfg, "rerank"))


def test_prompts_keep_to_their_budget_by_leaving_out_the_oldest(make_ctx):
    ctx = settle(make_ctx())
    tokenizer = load_tokenizer(ctx.model("midtrain").path)
    shown = [view for _, view in views(ctx, ctx.cfg, "rerank")][:20]
    whole = render_texts(tokenizer, shown, ctx.cfg, "direct")
    assert all(text.endswith(EMPTY_THOUGHT) for text in whole)
    assert [t + EMPTY_THOUGHT for t in render_texts(tokenizer, shown, ctx.cfg, "direct", filled=False)] == whole
    lengths = sorted(len(encode(tokenizer, text)) for text in whole)
    limit = lengths[-1] - 6
    tight = make_ctx([f"prompt.max_prompt_tokens={limit}"]).cfg
    cut = render_texts(tokenizer, shown, tight, "direct")
    assert max(len(encode(tokenizer, text)) for text in cut) <= limit
    changed = [(view, old, new) for view, old, new in zip(shown, whole, cut, strict=True) if old != new]
    assert changed
    for view, old, new in changed:
        assert len(encode(tokenizer, old)) > limit
        title = f"\n{load_template().candidates_title}\n"
        assert new.partition(title)[2] == old.partition(title)[2], "candidates and evidence stay whole"
        left = new.partition(title)[0].count("<a_")
        assert left < len(view.history)
        assert (
            view.history[0].sid not in new.partition(title)[0] or left == 0 or view.history[0].sid in [h.sid for h in view.history[-left:]]
        )
    bare = render_texts(tokenizer, [replace(view, history=()) for view in shown], ctx.cfg, "direct")
    limit = max(len(encode(tokenizer, text)) for text in bare)  # room for all but the history
    with pytest.raises(ModelError, match=r"max_prompt_tokens.*even with one item of its history"):
        render_texts(tokenizer, shown, make_ctx([f"prompt.max_prompt_tokens={limit}"]).cfg, "direct")


def test_a_targeted_prompt_adds_one_line(ctx):
    settle(ctx)
    tokenizer = load_tokenizer(ctx.model("midtrain").path)
    row, view = next(iter(views(ctx, ctx.cfg, "rerank")))
    plain, told = (render_texts(tokenizer, [view], ctx.cfg, "think", targets=[t])[0] for t in (None, row["candidate_ids"][2]))
    added = set(told.splitlines()) - set(plain.splitlines())
    assert added == {load_template().target_line.format(label=view.labels[2])}


def test_a_sample_is_seeded_and_moves_little():
    ids = [f"r{i}" for i in range(200)]
    assert sample(ids, 0, 1, "x") == sample(ids, 500, 1, "x") == sorted(ids)
    one = sample(ids, 50, 1, "x")
    assert len(one) == 50
    assert one == sample(ids[::-1], 50, 1, "x") == sorted(one)
    assert one != sample(ids, 50, 2, "x") != sample(ids, 50, 2, "y")
    longer = sample([*ids, *(f"s{i}" for i in range(20))], 50, 1, "x")
    assert len(set(one) & set(longer)) >= 40
