"""A tiny world for trainers: a real vocabulary and model of a few thousand parameters, requests whose evidence tells the target."""

import random
from typing import Any

from gr2 import artifacts
from gr2.config import Model
from gr2.context import Context
from gr2.prompts import (
    Candidate,
    HistoryItem,
    View,
    compose_thought,
    evidence_words,
    format_answer,
    format_thought,
    load_template,
    make_view,
    prompt_hash,
    render,
    vocabulary_texts,
)
from gr2.sids import sid_tokens, to_text
from scoring.model import build_model, build_vocabulary, load, prompt_text, save
from tests.tables import put
from training import sft

SIZE = Model(hidden=64, layers=2, heads=2, kv_heads=2, mlp=96, dropout=0.0)  # heads of 32: the least that vLLM serves on a CPU
TOKENS = sid_tokens(2, 12)


def sid(item: int) -> str:
    """Two levels of twelve codes."""
    return to_text((item // 12, item % 12))


def view(number: int, replica: int = 0, candidates: int = 3) -> tuple[View, int]:
    """A request and the incoming place of its target, which alone was often chosen after the last item."""
    rng = random.Random(f"{number}")
    items = rng.sample(range(144), candidates + 3)
    target = rng.randrange(candidates)
    features = [
        {
            "incoming_rank": p + 1,
            "prior_score": -float(p),
            "prior_gap": float(p),
            "pair_next": 8.0 * (p == target),
            "recent": rng.uniform(0, 5),
        }
        for p in range(candidates)
    ]
    listed = [Candidate(f"i{item}", sid(item), f"Item {item}", f) for item, f in zip(items, features, strict=False)]
    history = [HistoryItem(sid(item), f"Item {item}", 3, f"i{item}") for item in items[candidates:]]
    return make_view(f"r{number}", history, listed, replica), target


def prompt_of(tokenizer: Any, shown: View, mode: str) -> str:
    """The rendered prompt."""
    return prompt_text(tokenizer, render(shown, load_template(), mode))  # type: ignore[arg-type]


def best_order(shown: View, target: int) -> list[str]:
    """Labels with the target first, the others as they came."""
    return [shown.labels[target], *(label for place, label in enumerate(shown.labels) if place != target)]


def model_named(ctx: Context, *names: str, seed: int = 1) -> Any:
    """Publishes a fresh tiny model under each name; returns the tokenizer."""
    folder = ctx.work("vocabulary")
    tokenizer = build_vocabulary(vocabulary_texts(load_template()), 420, TOKENS, folder)
    for name in names:
        with artifacts.publish_folder(ctx.root, name, {}) as draft:
            save(build_model(SIZE, tokenizer, None, seed), tokenizer, draft)
    return tokenizer


def sft_rows(tokenizer: Any, count: int, mode: str = "think") -> list[dict[str, Any]]:
    """Examples that put the target first."""
    rows = []
    for number in range(count):
        shown, target = view(number)
        order = best_order(shown, target)
        thought = compose_thought(shown, order, ["next"], ["next"], cited=1) if mode == "think" else ""
        rows.append(
            {
                "example_id": f"e{number}",
                "sample_id": f"s{number}",
                "request_id": f"r{number}",
                "mode": mode,
                "source": "rejection",
                "prompt": prompt_of(tokenizer, shown, mode),
                "reasoning": format_thought(thought),
                "answer": format_answer(order),
                "ordinal": number,
            }
        )
    return rows


def rl_rows(tokenizer: Any, count: int, split: str = "rerank", first: int = 0) -> list[dict[str, Any]]:
    """Prompts for RL."""
    rows = []
    for number in range(first, first + count):
        shown, target = view(number)
        prompt = prompt_of(tokenizer, shown, "think")
        rows.append(
            {
                "prompt_id": f"r{number}:0",
                "request_id": f"r{number}",
                "split": split,
                "redrawn": False,
                "prompt": prompt,
                "mode": "think",
                "incoming": list(shown.labels),
                "shown": list(shown.shown_labels),
                "grades": [int(place == target) for place in range(len(shown.labels))],
                "evidence": evidence_words(shown),
                "prompt_hash": prompt_hash(load_template(), prompt),
                "ordinal": number,
            }
        )
    return rows


def trained(ctx: Context, *names: str) -> Any:
    """Tiny models after SFT (the settings of `ctx`), published under each name: they answer in the form. Returns the tokenizer."""
    tokenizer = model_named(ctx, "midtrain", "midtrain-teacher")
    put(ctx, "sft_examples", sft_rows(tokenizer, 64))
    sft.run(ctx.cfg, ctx)
    model, _ = load(ctx.model("sft").path)
    for name in set(names) - {"sft"}:
        with artifacts.publish_folder(ctx.root, name, {}) as draft:
            save(model, tokenizer, draft)
    return tokenizer
