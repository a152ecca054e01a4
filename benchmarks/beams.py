"""Constrained beams against the beam search of transformers with `prefix_allowed_tokens_fn`: the same items, how much sooner, and whether
the number of items matters.

    python -m benchmarks.beams                      # 12,101 and 1,000,000 items, width 20, about five minutes on two cores

Model: the student of `conf/beauty.yaml` with random weights, 3 x 1,024 codes, prompts of 64 tokens, fp32 on both sides. Both searches
get the same prompts, one after the other and all at once; each figure is the best of three runs. transformers keeps the key-value cache
of every beam and calls back for each beam of each step; its prefix tree is built before the clock starts.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.stages import header
from gr2.config import load
from gr2.sids import Trie, sid_tokens
from scoring.beams import beam_search
from scoring.model import build_model, build_vocabulary, item_tokens, sid_ids

LEVELS, CODES, WIDTH, PROMPT, SEED = 3, 1024, 20, 64, 13


def catalogue(items: int) -> np.ndarray:
    """(N, L) distinct random codes."""
    places = np.random.default_rng(SEED).choice(CODES**LEVELS, items, replace=False)
    return np.stack(np.unravel_index(places, [CODES] * LEVELS), axis=1)


def prefixes(tokens_NL: np.ndarray) -> dict[tuple[int, ...], list[int]]:
    """Which tokens may follow each beginning of an ID."""
    found: dict[tuple[int, ...], set[int]] = {}
    for row in tokens_NL.tolist():
        for level, token in enumerate(row):
            found.setdefault(tuple(row[:level]), set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in found.items()}


def theirs(model: Any, ids_BT: torch.Tensor, allowed: dict[tuple[int, ...], list[int]]) -> np.ndarray:
    """(B, W, L) tokens that the beam search of transformers finds, best first."""
    made = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        num_beams=WIDTH,
        num_return_sequences=WIDTH,
        max_new_tokens=LEVELS,
        prefix_allowed_tokens_fn=lambda _, ids: allowed[tuple(ids[PROMPT:].tolist())],
        length_penalty=0.0,
        do_sample=False,
    )
    return made[:, PROMPT:].reshape(len(ids_BT), WIDTH, LEVELS).numpy()


def all_of(model: Any, parts: Sequence[torch.Tensor], allowed: dict[tuple[int, ...], list[int]]) -> np.ndarray:
    """The same of several batches."""
    return np.concatenate([theirs(model, part, allowed) for part in parts])


def best_of(job: Callable[[], Any], runs: int = 3) -> tuple[float, Any]:
    """(seconds of the fastest run, what it gave)."""
    seconds, made = [], None
    for _ in range(runs):
        started = time.perf_counter()
        made = job()
        seconds.append(time.perf_counter() - started)
    return min(seconds), made


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[12_101, 1_000_000])
    parser.add_argument("--prompts", type=int, default=32)
    chosen = parser.parse_args()
    print(header("beams"))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_vocabulary(["history of items"] * 5, 1536, sid_tokens(LEVELS, CODES), Path(folder))
    model = build_model(load("beauty", ["data.path=."]).models.student, tokenizer, None, SEED).eval()
    ids_BT = torch.from_numpy(np.random.default_rng(SEED).integers(3, len(tokenizer), size=(chosen.prompts, PROMPT)))
    print("| items | prompts at once | transformers ms a prompt | ours ms a prompt | times faster | same items in the same order |")
    print("| --- | --- | --- | --- | --- | --- |")
    for items in chosen.items:
        codes_NL = catalogue(items)
        trie, ids_LK = Trie.build(codes_NL), sid_ids(tokenizer)
        tokens_NL = item_tokens(ids_LK, codes_NL)
        allowed = prefixes(tokens_NL)
        for batch in (1, chosen.prompts):
            # both take turns within one process: the ratio is of one machine in one state
            seconds, other = best_of(partial(all_of, model, ids_BT.split(batch), allowed))
            search = {"pad": tokenizer.pad_token_id, "batch": batch, "bf16": False}
            own, found = best_of(partial(beam_search, model, ids_LK, trie, ids_BT.tolist(), WIDTH, **search))
            same = (tokens_NL[found.items_BW] == other).all(axis=(1, 2)).mean()
            ms, own_ms = 1000 * seconds / len(ids_BT), 1000 * own / len(ids_BT)
            print(f"| {items:,} | {batch} | {ms:.1f} | {own_ms:.1f} | {seconds / own:.1f} | {same:.1%} |", flush=True)


if __name__ == "__main__":
    main()
