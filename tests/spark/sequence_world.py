"""Users who walk through a catalogue, with a frozen tokenizer and codes: what the tests of mid-training and candidates are built on.

Items stand on a ring, and a user mostly goes on to the next one, so that a model that learned anything ranks the successor first.
"""

import datetime as dt
from typing import Any

import numpy as np
import torch

from gr2 import artifacts
from gr2.config import Model
from gr2.context import Context
from gr2.prompts import load_template, vocabulary_texts
from gr2.sections import Sasrec
from gr2.sids import sid_tokens, to_text
from scoring import sasrec
from scoring.model import build_model, build_vocabulary, save
from tests.tables import put
from training.codebooks import Codebooks

ITEMS, CODES = 40, 8
START = dt.date(2026, 1, 1)
SIZE = Model(hidden=32, layers=1, heads=2, kv_heads=2, mlp=48, dropout=0.0)
LEAVE_ONE_OUT = {1: "test", 2: "valid", 3: "rerank"}


def codes_of(item: int) -> tuple[int, int, int]:
    """Three levels of eight codes."""
    return item // CODES, item % CODES, (3 * item) % CODES


def asin(item: str) -> str | None:
    """Amazon's number of `i7`: in another order than the items; every fifth has none."""
    return None if int(item[1:]) % 5 == 0 else f"B{23 * int(item[1:]) % ITEMS:03}"


def sid(item: str) -> str:
    """Written codes of `i7`."""
    return to_text(codes_of(int(item[1:])))


def catalogue(ctx: Context, count: int = ITEMS) -> None:
    """Tokenizer, items and codes. Every fifth item has neither title nor brand."""
    eye = np.eye(4, dtype=np.float32)
    books = Codebooks(
        "rqkmeans", np.random.default_rng(0).normal(size=(3, CODES, 4)).astype(np.float32), ((eye, eye[0]),), ((eye, eye[0]),)
    )
    with artifacts.publish_folder(ctx.root, "tokenizer", {}) as folder:
        books.save(folder, {})
    version = ctx.model("tokenizer").id
    names = ["red", "blue", "green", "small", "large", "soft", "bright", "old"]
    items, codes = [], []
    for k in range(count):
        bare = k % 5 == 0
        title = None if bare else f"{names[k % 8]} {names[k // 8]} thing with many more words than are said {k}"
        items.append(
            {"item_id": f"i{k}", "title": title, "brand": None if bare else f"maker{k % 3}", "categories": ["All", names[k % 4]],
             "price": None, "text": title or f"i{k}", "has_text": not bare, "first_seen": START + dt.timedelta(days=k),
             "asin": asin(f"i{k}")}
        )  # fmt: skip
        codes.append(
            {"tokenizer": version, "item_id": f"i{k}", "codes": codes_of(k), "token_text": sid(f"i{k}"), "learned_codes": codes_of(k),
             "separated": False, "residual": 0.1, "added_on": START}
        )  # fmt: skip
    put(ctx, "items", items)
    put(ctx, "semantic_ids", codes)


def walks(rng: np.random.Generator, users: int, longest: int = 12, noise: float = 0.1) -> dict[str, list[str]]:
    """Items of each user, none twice in a row."""
    found = {}
    for u in range(users):
        at, walk = int(rng.integers(ITEMS)), []
        for _ in range(int(rng.integers(1, longest + 1))):
            walk.append(f"i{at}")
            at = (at + (int(rng.integers(2, ITEMS)) if rng.random() < noise else 1)) % ITEMS
        found[f"u{u}"] = walk
    return found


def interaction_rows(
    walked: dict[str, list[str]], rng: np.random.Generator, windows: tuple[int, int, int] | None = None
) -> list[dict[str, Any]]:
    """Interactions of the walks, a day or none between two. Splits by leave-one-out, or by days since START."""
    rows = []
    for user, walk in walked.items():
        day = int(rng.integers(0, 30))
        for place, item in enumerate(walk, 1):
            day += int(rng.integers(0, 3))
            end = len(walk) - place + 1
            split = LEAVE_ONE_OUT.get(end, "pretrain") if place > 1 else "pretrain"
            if windows:
                split = ("pretrain", "rerank", "valid", "test")[sum(day >= edge for edge in windows)]
            date = START + dt.timedelta(days=day)
            rows.append(
                {"user_id": user, "ordinal": place, "item_id": item, "event_id": f"{user}:{place}", "kind": "review",
                 "event_time": dt.datetime.combine(date, dt.time(10), dt.UTC), "event_date": date, "day_known": place % 7 != 0,
                 "session": 1, "gap_days": None, "split": split, "period": "2026"}
            )  # fmt: skip
    return rows


def model_named(ctx: Context, *names: str, seed: int = 3) -> None:
    """Publishes an untrained model, a different one under each name."""
    tokenizer = build_vocabulary(vocabulary_texts(load_template()), 420, sid_tokens(3, CODES), ctx.work("vocabulary"))
    for place, name in enumerate(names):
        with artifacts.publish_folder(ctx.root, name, {}) as folder:
            save(build_model(SIZE, tokenizer, None, seed + place), tokenizer, folder)


def sasrec_named(ctx: Context, *names: str, seed: int = 5) -> None:
    """Publishes an untrained model of whole items, a different one under each name."""
    for place, name in enumerate(names):
        torch.manual_seed(seed + place)
        model = sasrec.SASRec([f"i{k}" for k in reversed(range(ITEMS))], Sasrec(hidden=16, layers=1))
        torch.nn.init.normal_(model.items.weight, std=0.3)
        with artifacts.publish_folder(ctx.root, name, {}) as folder:
            sasrec.save(model, folder)
