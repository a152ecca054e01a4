"""The latent compressor on a tiny frozen model: what it stands in for, that it learns, what it leaves behind."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from gr2 import artifacts
from gr2.prompts import load_template
from scoring.model import encode, load
from tests.e2e import tiny
from training import latents
from training.rollouts import read_tasks

pytestmark = pytest.mark.e2e


@pytest.fixture
def world(make_ctx):
    """A frozen model, items with IDs, prompts."""
    ctx = make_ctx(["latents.train.max_steps=30", "latents.train.lr=1e-2", "latents.train.tokens_per_batch=2048", "latents.vectors=1"])
    tokenizer = tiny.model_named(ctx, "rl")
    with artifacts.publish_folder(ctx.root, "tokenizer", {}) as folder:
        (folder / "config.json").write_text("{}")
    version = ctx.model("tokenizer", "tokenizer").id
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
    prompt = latents.direct_form(read_tasks(ctx, "rerank")[0].prompt, template)
    assert template.closing["think"] not in prompt
    assert prompt == tiny.prompt_of(tokenizer, tiny.view(0)[0], "direct"), "the same as if it had been rendered so"
    short = latents.shortened(tokenizer, prompt, items, 0)
    full = []
    for n in short:
        full += [n] if n >= 0 else encode(tokenizer, tiny.sid(int(items.ids[-n - 1][1:])))
    assert full == encode(tokenizer, prompt)
    assert sum(n < 0 for n in short) == 3 + 3


def test_vectors_that_are_the_tokens_own_embeddings_change_nothing(world):
    """With k = the ID's two tokens and a compressor that gives their embeddings, both readings are one."""
    ctx, tokenizer = world
    model, _ = load(ctx.model("rl", "rl").path)
    items = latents.read_items(ctx, ctx.cfg, tokenizer)
    found = latents.texts(model, tokenizer, read_tasks(ctx, "valid"), items, load_template())

    class Same(torch.nn.Module):
        k, device = 2, torch.device("cpu")

        def forward(self, embedded_ISD, lengths_I):
            return embedded_ISD[:, :2]

    with torch.no_grad():
        full, short = (latents.answer_logprobs(model, Same(), items, found[:4], short=s) for s in (False, True))
    torch.testing.assert_close(full, short, atol=1e-4, rtol=1e-4)


def test_it_trains_measures_and_leaves_vectors(world):
    ctx, _ = world
    result = latents.run(ctx.cfg, ctx)
    made = ctx.model("latents", "latents")
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
    assert said["base"] == ctx.model("rl", "rl").id
    latents.run(ctx.cfg, ctx)
    assert ctx.model("latents", "latents").hash == made.hash
