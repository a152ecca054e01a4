"""The context compressor: tokens saved against ranking lost, in both forms (METHOD 9).

    python -m benchmarks.compressor --root var/beauty --profile beauty        # a finished root; minutes on two cores
    python -m benchmarks.compressor --root var/text --set prompt.template=rerank_text_v3 --set prompt.max_prompt_tokens=1900

All forms ask the model `rl` about the same requests in the mode `score`, through one vLLM engine whose prefix cache is emptied before each;
`latents` reads the vectors of the table `item_latents`. The goal is at least 80 % of the tokens saved at an N@3 within 1 %. How far the
latent form can get depends on the template: it saves what items are said with, less k vectors each. rerank_v3 says an item with the few
tokens of its semantic ID; rerank_text_v3 with 40 words as well. A root for the second is built with the same settings. Brackets are paired
95 % bootstrap intervals; KL is of the distributions over a request's labels.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import log_softmax

from benchmarks.scoring import copied
from benchmarks.stages import header, told
from gr2.config import Config, load
from gr2.context import Context
from gr2.environment import set_defaults
from gr2.metrics import kendall_tau, ndcg_at, recall_at
from gr2.prompts import LABELS
from scoring.compressed import items_in, vectors_of
from scoring.vllm_engine import VLLMEngine
from spark_jobs.rerank_scores import asks, label_priors, score_order

FORMS = {"rl": "whole", "latents": "latent", "brief": "text"}
SETTINGS = [
    f"scoring.models={{{', '.join(f'{name}: [score]' for name in FORMS)}}}", "scoring.miss_sample=0", "scoring.audit_requests=1",
    "scoring.audit_replicas=1", "release.gate=false",
]  # fmt: skip


@dataclass(frozen=True)
class Form:
    """What came of one form, a value a request; orders hold item ids, log-probabilities those of a request's labels."""

    tokens: list[int]
    orders: list[list[str]]
    logprobs: list[np.ndarray]
    ranks: list[int]
    seconds: float


def scored(engine: VLLMEngine, ctx: Context, rows: Sequence[dict[str, Any]], targets: dict[str, str]) -> Form:
    """Asks, and orders as the stage does: by each label's log-probability less its prior."""
    prompts = [row["prompts"][0] for row in rows]
    engine.vectors = vectors_of(ctx, rows[0]["model_id"], prompts) if rows[0]["model"] == "latents" else None
    labels = LABELS[: max(len(row["labels"]) for row in rows)]
    engine.label_logprobs(prompts[:8], labels)
    engine._llm.reset_prefix_cache()
    started = time.perf_counter()
    found_BY = engine.label_logprobs(prompts, labels)
    seconds = time.perf_counter() - started
    logprobs = [found_Y[[labels.index(label) for label in row["labels"]]] for row, found_Y in zip(rows, found_BY, strict=True)]
    answers = [{**{k: row[k] for k in ("model_id", "mode", "labels")}, "logprobs": own} for row, own in zip(rows, logprobs, strict=True)]
    prior = label_priors(pa.Table.from_pylist(answers))[rows[0]["model_id"]]
    orders = [score_order(r["candidates"], r["labels"], own.tolist(), prior) for r, own in zip(rows, logprobs, strict=True)]
    ranks = [order.index(targets[row["request_id"]]) + 1 for row, order in zip(rows, orders, strict=True)]
    return Form([len(ids) for ids in engine.encode(prompts)], orders, logprobs, ranks, seconds)


def table(forms: dict[str, Form]) -> None:
    """Prints a line a form, each against the whole context."""
    whole = forms["rl"]
    print(
        "| context | prompt tokens | saved | R@1 | N@3 | R@1 less whole | N@3 less whole | N@3 kept | KL | same first | tau | requests/s |"
    )
    print("| --- " * 12 + "|")
    for name, form in forms.items():
        n3, r1 = ndcg_at(form.ranks, 3), recall_at(form.ranks, 1)
        less = [told(own - metric(whole.ranks, k), True) for own, metric, k in ((r1, recall_at, 1), (n3, ndcg_at, 3))]
        ps = [(log_softmax(a), log_softmax(b)) for a, b in zip(whole.logprobs, form.logprobs, strict=True)]
        kl = np.mean([float((np.exp(p) * (p - q)).sum()) for p, q in ps])
        pairs = list(zip(whole.orders, form.orders, strict=True))
        same, tau = np.mean([a[0] == b[0] for a, b in pairs]), np.mean([kendall_tau(a, b) for a, b in pairs])
        cells = [FORMS[name], f"{np.mean(form.tokens):.0f}", f"{1 - sum(form.tokens) / sum(whole.tokens):.1%}"]
        cells += [f"{r1.mean():.4f}", f"{n3.mean():.4f}", *less, f"{n3.mean() / ndcg_at(whole.ranks, 3).mean():.1%}"]
        cells += [f"{kl:.4f}", f"{same:.3f}", f"{tau:.3f}", f"{len(form.ranks) / form.seconds:.1f}"]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--profile", default="beauty")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="key=value", help="as the root was made with")
    parser.add_argument("--requests", type=int, default=1000, help="at most; those whose list holds the target")
    chosen = parser.parse_args()
    set_defaults()
    print(header("compressor"))
    with tempfile.TemporaryDirectory(dir=chosen.root.resolve().parent) as folder:
        there = Path(folder) / "root"
        copied(chosen.root, there)  # without the answers that are there
        _measure(load(chosen.profile, [f"paths.root={there}", *chosen.settings, *SETTINGS]), chosen.requests)


def _measure(cfg: Config, most: int) -> None:
    ctx = Context(cfg)
    models = [ctx.model(name) for name in FORMS]
    candidates = ctx.lake.read("candidates", ["request_id", "candidate_ids", "grades"], split="test").to_pylist()
    targets = {r["request_id"]: r["candidate_ids"][int(np.argmax(r["grades"]))] for r in candidates}
    asked = asks(cfg, ctx, models).to_pylist()
    rows = {name: [row for row in asked if row["model"] == name and row["prompts"]][:most] for name in FORMS}
    engine = VLLMEngine(rows["rl"][0]["path"], cfg.scoring)
    forms = {name: scored(engine, ctx, rows[name], targets) for name in FORMS}
    engine.close()
    said = ctx.lake.read("item_latents", ["item_id", "text_tokens"], compressor=models[1].id)
    tokens_of = dict(zip(said["item_id"].to_pylist(), said["text_tokens"].to_pylist(), strict=True))
    share = sum(tokens_of[item] for row in rows["latents"] for item in items_in(row["prompts"][0])) / sum(forms["rl"].tokens)
    table(forms)
    print(f"\n{len(rows['rl'])} requests, template {cfg.prompt.template}; {share:.1%} of the whole prompts' tokens say items.", flush=True)


if __name__ == "__main__":
    main()
