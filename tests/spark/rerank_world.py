"""A small random world of the tables around re-ranking, for the tests of features, baselines, evaluation and leakage."""

import atexit
import copy
import datetime as dt
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gr2.config import load
from gr2.context import Context
from spark_jobs.candidates import publish_features
from tests.tables import put

DAY = dt.date(2026, 3, 1)


def scratch() -> Path:
    """A folder that lasts as long as this process."""
    root = Path(tempfile.mkdtemp(prefix="gr2-world-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def item_rows(rng: np.random.Generator, n: int) -> list[dict[str, Any]]:
    """Items i0..: some without brand, price or category."""
    rows = []
    for i in range(n):
        categories = sorted(rng.choice(["Beauty", "Hair", "Skin", "Nails"], size=rng.integers(0, 3), replace=False).tolist())
        brand = None if i % 5 == 0 else f"brand{i % 3}"
        price = None if i % 4 == 0 else round(float(rng.uniform(2, 40)), 2)
        rows.append({"item_id": f"i{i}", "title": f"Item {i}", "brand": brand, "categories": categories, "price": price,
                     "text": f"Item {i}", "has_text": True, "first_seen": None})  # fmt: skip
    return rows


def vector_rows(rng: np.random.Generator, n: int, width: int = 5) -> list[dict[str, Any]]:
    """Unit vectors; the last item has none."""
    vectors = rng.normal(size=(n - 1, width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [{"item_id": f"i{i}", "model": "tfidf_svd", "vector": v.tolist()} for i, v in enumerate(vectors)]


def pair_rows(rng: np.random.Generator, n: int, fit: str) -> list[dict[str, Any]]:
    """About a third of all directed pairs."""
    rows = []
    for i in range(n):
        for j in range(n):
            if i != j and rng.random() < 0.33:
                rows.append({"fit": fit, "item_id": f"i{i}", "next_item_id": f"i{j}", "weight": round(float(rng.uniform(0.1, 3)), 3),
                             "count": int(rng.integers(1, 9)), "next_count": int(rng.integers(0, 4)), "lift": float(rng.uniform(0.1, 5)),
                             "median_gap_days": float(rng.integers(0, 50)), "rank": 1})  # fmt: skip
    return rows


def stats_rows(rng: np.random.Generator, n: int, fit: str) -> list[dict[str, Any]]:
    """Every item but the first was seen."""
    return [
        {"fit": fit, "item_id": f"i{i}", "count": int(rng.integers(1, 50)), "users": 1, "recent": float(rng.uniform(0, 9)),
         "popularity_rank": i, "last_date": DAY - dt.timedelta(days=int(rng.integers(1, 200))), "reference_date": DAY}
        for i in range(1, n)
    ]  # fmt: skip


def candidate_rows(rng: np.random.Generator, n_items: int, split: str, n: int, size: int = 10, hit: float = 0.7) -> list[dict[str, Any]]:
    """Requests of one split; in a share `hit` of them the target is in the list, more often near its head."""
    rows = []
    for r in range(n):
        picked = [f"i{i}" for i in rng.permutation(n_items)[: size + int(rng.integers(1, 6)) + 1]]
        listed, target, history = picked[:size], picked[size], picked[size + 1 :]
        rank = None
        if rng.random() < hit:
            rank = min(size, int(rng.geometric(0.3)))
            target = listed[rank - 1]
        rows.append(
            {
                "request_id": f"{split}:u{r}:9",
                "split": split,
                "night": "none",
                "user_id": f"u{r}",
                "source": "beam",
                "model_id": "midtrain@0",
                "fit": "refit" if split == "test" else "train",
                "as_of": DAY + dt.timedelta(days=1),
                "history_ids": history,
                "history_days": list(range(len(history), 0, -1)),
                "candidate_ids": listed,
                "prior_scores": np.sort(rng.normal(-5, 2, size))[::-1].astype(np.float32).tolist(),
                "grades": [int(i == target) for i in listed],
                "target_id": target,
                "target_rank": rank,
                "full_rank": rank if rank else (int(rng.integers(size + 1, 20)) if r % 2 else None),
                "slice": ("same_day", "later_day", "later_day")[r % 3],
            }
        )
    return rows


def evidence(ctx: Context, rng: np.random.Generator, n_items: int) -> None:
    """Publishes items, vectors, and pairs and statistics of both fits."""
    put(ctx, "items", item_rows(rng, n_items))
    put(ctx, "item_embeddings", vector_rows(rng, n_items))
    for fit in ("train", "refit"):
        put(ctx, "item_pairs", pair_rows(rng, n_items, fit), {"fit": fit})
        put(ctx, "item_stats", stats_rows(rng, n_items, fit), {"fit": fit})


def learnable(ctx: Context, hit: float = 0.8) -> dict[str, dict[str, Any]]:
    """Requests of all splits with their features; targets follow the heaviest pair from the last history item. Made once, then copied."""
    root, requests = _learnable(hit)
    shutil.copytree(root / "tables", ctx.root / "tables", dirs_exist_ok=True)
    return copy.deepcopy(requests)


@cache
def _learnable(hit: float) -> tuple[Path, dict[str, dict[str, Any]]]:
    root = scratch()
    ctx = Context(load("demo", [f"paths.root={root}"]))
    rng = np.random.default_rng(3)
    evidence(ctx, rng, 24)
    requests = [r for split, n in (("rerank", 120), ("valid", 40), ("test", 40)) for r in candidate_rows(rng, 24, split, n, hit=hit)]
    pairs = {(p["fit"], p["item_id"], p["next_item_id"]): p["weight"] for p in ctx.lake.read("item_pairs").to_pylist()}
    for request in requests:
        if request["target_rank"]:
            weights = [pairs.get((request["fit"], request["history_ids"][-1], c), 0.0) for c in request["candidate_ids"]]
            place = int(np.argmax(weights))
            request.update(target_id=request["candidate_ids"][place], target_rank=place + 1, grades=[int(i == place) for i in range(10)])
    put(ctx, "candidates", requests)
    publish_features(ctx)
    return root, {r["request_id"]: r for r in requests}
