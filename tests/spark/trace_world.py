"""A world in which a teacher can work: learnable lists with codes and a vocabulary, built once and copied for each test."""

import shutil
from functools import cache
from pathlib import Path

from rerank_world import DAY, learnable, scratch

from gr2 import artifacts
from gr2.config import load
from gr2.context import Context
from gr2.prompts import load_template, vocabulary_texts
from gr2.sids import sid_tokens, to_text
from scoring.model import build_vocabulary
from tests.tables import put


@cache
def _built() -> Path:
    """120 lists of split rerank, 40 of valid, 40 of test; in four of five the target follows the heaviest pair."""
    root = scratch()
    ctx = Context(load("demo", [f"paths.root={root}"]))
    learnable(ctx)
    with artifacts.publish_folder(root, "tokenizer", {}) as folder:
        (folder / "config.json").write_text("{}")
    tokenizer = artifacts.resolve(root, "tokenizer", "tokenizer").id
    codes = [(i // 5, i % 5) for i in range(24)]
    rows = [
        {"tokenizer": tokenizer, "item_id": f"i{i}", "codes": pair, "token_text": to_text(pair), "learned_codes": pair}
        | {"separated": False, "residual": 0.1, "added_on": DAY}
        for i, pair in enumerate(codes)
    ]
    put(ctx, "semantic_ids", rows, {"tokenizer": tokenizer})
    with artifacts.publish_folder(root, "midtrain", {}) as folder:
        build_vocabulary(vocabulary_texts(load_template()), 420, sid_tokens(2, 5), folder)
    return root


def settle(ctx: Context) -> Context:
    """Copies the world under a test's own root."""
    shutil.copytree(_built(), ctx.root, dirs_exist_ok=True)
    ctx.__dict__.pop("lake", None)
    return ctx
