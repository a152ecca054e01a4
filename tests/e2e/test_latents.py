"""The compressor on a tiny frozen model: what vectors stand for, what a policy may leave out, that both learn, what they leave behind."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from gr2 import artifacts
from gr2.config import load as settings
from gr2.errors import ConfigError
from gr2.prompts import load_template
from schemas import get
from scoring.compressed import compressing, encode_marked, joined, marked, pieces, vectors_of
from scoring.model import encode, load
from tests.e2e import tiny
from training import brief, latents
from training.rollouts import read_tasks

pytestmark = pytest.mark.e2e


@pytest.fixture
def world(make_ctx):
    """A frozen model, items with IDs, prompts."""
    ctx = make_ctx(["latents.train.max_steps=30", "latents.train.lr=1e-2", "latents.train.tokens_per_batch=2048", "latents.vectors=1",
                    "latents.brief={lr: 0.2, max_steps: 40, tokens_per_batch: 8192, weight_decay: 0.0}", "latents.alpha=0.5"])  # fmt: skip
    tokenizer = tiny.model_named(ctx, "rl")
    with artifacts.publish_folder(ctx.root, "tokenizer", {}) as folder:
        (folder / "config.json").write_text("{}")
    version = ctx.model("tokenizer").id
    none = dict.fromkeys(("title", "brand", "price", "first_seen"))
    items = [{**none, "item_id": f"i{i}", "categories": [], "text": f"Item {i}", "has_text": True} for i in range(144)]
    tiny.put(ctx, "items", items)
    codes = [(i // 12, i % 12) for i in range(144)]
    sids = [
        {"tokenizer": version, "item_id": f"i{i}", "codes": c, "token_text": tiny.sid(i), "learned_codes": c, "separated": False,
         "residual": 0.0, "added_on": ctx.day}
        for i, c in enumerate(codes)
    ]  # fmt: skip
    tiny.put(ctx, "semantic_ids", sids)
    tiny.put(ctx, "rl_prompts", tiny.rl_rows(tokenizer, 16) + tiny.rl_rows(tokenizer, 8, "valid", 100))
    return ctx, tokenizer


def test_prompts_are_shortened_where_items_are_said_and_nowhere_else(world):
    ctx, tokenizer = world
    items, template = latents.read_items(ctx, ctx.cfg, tokenizer), load_template()
    prompt = brief.direct_form(read_tasks(ctx, "rerank")[0].prompt, template)
    assert template.closing["think"] not in prompt
    assert prompt == tiny.prompt_of(tokenizer, tiny.view(0)[0], "direct"), "the same as if it had been rendered so"
    (short,) = encode_marked(tokenizer, [marked(prompt, items.known, 0)], {item: (n,) for n, item in enumerate(items.ids)})
    full = []
    for n in short:
        full += [n] if n >= 0 else encode(tokenizer, tiny.sid(int(items.ids[-n - 1][1:])))
    assert full == encode(tokenizer, prompt)
    assert sum(n < 0 for n in short) == 3 + 3
    said = f"{tiny.sid(7)} Item 7 day"
    assert marked(said, items.known, 2) == "\x02i7\x03 day", "with its text, where the template shows one"
    assert marked(f"{tiny.sid(7)} Other", items.known, 2) == "\x02i7\x03 Other"


def test_a_policy_may_leave_out_the_context_and_never_what_an_answer_needs(world):
    ctx, _ = world
    template = load_template()
    prompt = brief.asked(read_tasks(ctx, "rerank")[0], template).prompt
    found = pieces(prompt, template)
    assert joined(found, [True] * len(found)) == prompt == "".join(text for text, _ in found)
    free = [text.strip() for text, where in found if where]
    assert sum("<a_" in text for text in free) == 6
    assert sum(text.startswith("nextTop @") for text in free) == 1, "a list goes with its labels"
    least = joined(found, [where is None for _, where in found])
    labels = read_tasks(ctx, "rerank")[0].shown
    assert least.endswith("candidates\n" + "\n".join(f" @{label}" for label in labels) + prompt[prompt.rindex('\n["', 0, -10) :])
    assert least.startswith(prompt[: prompt.index("history\n")])


@pytest.mark.parametrize("section", ["models", "live"])
def test_a_compressor_is_not_asked_for_thoughts(section):
    with pytest.raises(ConfigError, match="brief is trained on prompts that ask for no thought"):
        settings("demo", [f"scoring.{section}.brief=[think]"])
    with pytest.raises(ConfigError, match=r"latents\.brief trains in one process"):
        settings("demo", ["latents.brief.processes=2"])


def test_vectors_that_are_the_tokens_own_embeddings_change_nothing(world):
    """With k = the ID's two tokens and a compressor that gives their embeddings, both readings are one."""
    ctx, tokenizer = world
    model, _ = load(ctx.model("rl").path)
    items = latents.read_items(ctx, ctx.cfg, tokenizer)
    found = latents.texts(model, tokenizer, read_tasks(ctx, "valid"), items, load_template())

    class Same(torch.nn.Module):
        k, device = 2, torch.device("cpu")

        def forward(self, embedded_ISD, lengths_I):
            return embedded_ISD[:, :2]

    with torch.no_grad():
        full, short = (latents.answer_logprobs(model, Same(), items, found[:4], short=s) for s in (False, True))
    torch.testing.assert_close(full, short, atol=1e-4, rtol=1e-4)


class Stop(Exception):
    """What has been seen is enough."""


def test_the_frozen_model_goes_where_the_compressor_trains(world, monkeypatch):
    ctx, _ = world

    def seen(model, *_):
        raise Stop(model.device.type)

    monkeypatch.setattr(latents, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(latents, "texts", seen)
    with pytest.raises(Stop, match="meta"):
        latents.run(ctx.cfg, ctx)


def test_it_trains_measures_and_leaves_vectors(world):
    ctx, _ = world
    result = latents.run(ctx.cfg, ctx)
    made = ctx.model("latents")
    before, after = result.detail["before"], result.detail["after"]
    assert after["kl"] < 0.7 * before["kl"]
    assert after["tokens"] == after["tokens_full"] - 6  # three history items and three candidates, two tokens each
    assert made.manifest["after"] == after
    with pa.memory_map(str(made.path / "vectors.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table["item_id"].to_pylist() == sorted(f"i{i}" for i in range(144))
    vectors = np.array(table["vectors"].to_pylist())
    assert vectors.shape == (144, tiny.SIZE.hidden)
    assert np.isfinite(vectors).all()
    assert set(table["text_tokens"].to_pylist()) == {2}
    said = json.loads((made.path / "compressor.json").read_text())
    assert said["base"] == ctx.model("rl").id
    shorter = result.detail["brief"]
    assert 0.05 < shorter["saved"] == 1 - shorter["tokens"] / shorter["tokens_full"]
    latents.run(ctx.cfg, ctx)
    assert (ctx.model("latents").hash, ctx.model("brief").manifest["after"]) == (made.hash, shorter)


def test_a_policy_learns_what_its_ranker_needs_and_leaves_out_the_rest(world, monkeypatch):
    """The ranker here puts first what the list nextTop names first, and reads nothing else."""
    ctx, tokenizer = world

    def orders(model, tokenizer, tasks):
        found = [re.search(r"nextTop @(\w)", task.prompt) for task in tasks]
        return [sorted(t.incoming, key=lambda label: (m is None or m[1] != label, label)) for t, m in zip(tasks, found, strict=True)]

    monkeypatch.setattr(brief, "orders", orders)
    trained, train = [], brief.train
    monkeypatch.setattr(brief, "train", lambda *parts, **more: trained.append(more["fingerprint"]) or train(*parts, **more))
    model, _ = load(ctx.model("rl").path)
    template = load_template()
    after = brief.fit(ctx.cfg, ctx, model, tokenizer, ctx.model("rl"), template)["brief"]
    (short,) = compressing(ctx.cfg, ctx, ctx.model("brief"))([brief.asked(read_tasks(ctx, "valid")[0], template).prompt])
    assert "nextTop @" in short
    assert short.count("<a_") < 3
    assert (after["ndcg3"], after["tau"]) == (after["ndcg3_full"], 1.0)
    assert after["saved"] > 0.25
    assert trained == [ctx.model("brief").manifest["fingerprint"]], "by which a tracker knows its run"
    curve = [json.loads(line) for line in (ctx.model("brief").path / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1]["reward"] > curve[0]["reward"] + 0.05


def test_prompts_that_mark_no_item_need_no_vectors():
    nothing = get("item_latents").arrow().empty_table()
    ctx = SimpleNamespace(lake=SimpleNamespace(read=lambda *_, **__: nothing))
    found = vectors_of(ctx, "latents@1", ["rank these: @A @B"])
    assert (found.rows_of, found.vectors_ND.shape) == ({}, (0, 1))
