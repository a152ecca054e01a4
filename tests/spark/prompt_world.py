"""The world of `rerank_world` with semantic IDs and tiny models of one vocabulary, for the stages that render prompts."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

from gr2 import artifacts
from gr2.config import load
from gr2.context import Context
from gr2.prompts import load_template, vocabulary_texts
from scoring.model import build_model, build_vocabulary, save
from tests.e2e.tiny import SIZE, TOKENS, sid
from tests.spark import rerank_world
from tests.tables import put


@cache
def _built() -> Path:
    root = rerank_world.scratch()
    build(Context(load("demo", [f"paths.root={root}"])))
    return root


def settle(ctx: Context) -> Context:
    """`build`, made once a process and copied under a test's own root."""
    shutil.copytree(_built(), ctx.root, dirs_exist_ok=True)
    ctx.__dict__.pop("lake", None)
    return ctx


def build(ctx: Context, *models: str) -> dict[str, dict[str, Any]]:
    """Publishes requests, codes and a model under each name (`midtrain` always); returns the requests by id."""
    requests = rerank_world.learnable(ctx)
    with artifacts.publish_folder(ctx.root, "tokenizer", {}) as folder:
        (folder / "config.json").write_text("{}")
    version = ctx.model("tokenizer").id
    rows = []
    for item in range(24):
        codes = [item // 12, item % 12]
        row = {"tokenizer": version, "item_id": f"i{item}", "codes": codes, "token_text": sid(item), "learned_codes": codes}
        rows.append({**row, "separated": False, "residual": 0.1, "added_on": rerank_world.DAY})
    put(ctx, "semantic_ids", rows)
    tokenizer = build_vocabulary(vocabulary_texts(load_template()), 500, TOKENS, ctx.work("vocabulary"))
    for seed, name in enumerate(("midtrain", *models)):
        with artifacts.publish_folder(ctx.root, name, {}) as folder:
            save(build_model(SIZE, tokenizer, None, seed), tokenizer, folder)
    return requests
