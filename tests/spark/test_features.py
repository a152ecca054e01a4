"""Every feature equals a plain reading of its definition, on a random world; nothing of the other fit is ever read."""

import math
from typing import Any

import numpy as np
import pytest
from rerank_world import candidate_rows, evidence, vector_rows

from gr2.errors import MissingInputError
from spark_jobs.features import LOOKBACK, with_features
from spark_jobs.session import read
from tests.tables import put

pytestmark = pytest.mark.spark
N = 24


def expected(request: dict, place: int, tables: dict[str, dict]) -> dict[str, Any]:
    """The features of one candidate, by their definitions, without Spark."""
    own, fit = request["candidate_ids"][place], request["fit"]
    history = list(reversed(request["history_ids"]))[:LOOKBACK]
    pairs = [(tables["pairs"].get((fit, h, own)), -step, h) for step, h in enumerate(history)]
    found = [(p["weight"], late, h, p) for p, late, h in pairs if p]
    best = max(found, key=lambda f: f[:3]) if found else None
    item, others = tables["items"][own], [tables["items"][h] for h in history]
    stats = tables["stats"].get((fit, own))
    vector = tables["vectors"].get(own, np.zeros(5, np.float32))
    cosines = [float(vector @ tables["vectors"].get(h, np.zeros(5, np.float32))) for h in history]
    prices = [o["price"] for o in others if o["price"] is not None]
    overlaps = [len({*item["categories"]} & {*o["categories"]}) / max(1, len({*item["categories"]} | {*o["categories"]})) for o in others]
    last = pairs[0][0] if pairs else None
    scores = request["prior_scores"]
    return {
        "incoming_rank": place + 1,
        "prior_score": scores[place],
        "prior_gap": scores[0] - scores[place],
        "popularity": math.log1p(stats["count"]) if stats else 0.0,
        "recent": math.log1p(stats["recent"]) if stats else 0.0,
        "pair_last": last["weight"] if last else 0.0,
        "pair_next": last["next_count"] if last else 0.0,
        "pair_max": best[0] if best else 0.0,
        "pair_sum": sum(p["weight"] * 0.5**-late for p, late, _ in pairs if p),
        "lift_max": max([p["lift"] for *_, p in found], default=0.0),
        "pair_item": best[2] if best else None,
        "pair_gap_days": best[3]["median_gap_days"] if best else None,
        "same_brand": sum(item["brand"] is not None and o["brand"] == item["brand"] for o in others),
        "category_overlap": max(overlaps, default=0.0),
        "text_similarity": cosines[0] if cosines else 0.0,
        "text_similarity_max": max(cosines, default=0.0),
        "price_ratio": item["price"] / np.mean(prices) if prices and item["price"] is not None else 1.0,
        "days_since_seen": (request["as_of"] - stats["last_date"]).days if stats else -1.0,
        "days_since_last": request["history_days"][-1] if request["history_days"] else None,
        "grade": request["grades"][place],
        "grade_weight": request["weights"][place] if request.get("weights") else None,
    }


def test_vectors_of_an_encoder_are_found_and_none_at_all_are_an_error(make_ctx):
    ctx = make_ctx(["embeddings.encoder=intfloat/e5-small"])
    rng = np.random.default_rng(5)
    evidence(ctx, rng, N)
    put(ctx, "candidates", candidate_rows(rng, N, "rerank", 4))
    with pytest.raises(MissingInputError, match=r"'intfloat--e5-small': run `gr2 stage item_embeddings`"):
        with_features(ctx, read(ctx, "candidates"))
    put(ctx, "item_embeddings", [row | {"model": "intfloat--e5-small"} for row in vector_rows(rng, N)], {"model": "intfloat--e5-small"})
    rows = with_features(ctx, read(ctx, "candidates")).toArrow().to_pylist()
    assert np.mean([row["text_similarity"] != 0 for row in rows]) > 0.8


def test_features_equal_their_definitions_and_a_rerun_equals_them_bit_by_bit(ctx):
    rng = np.random.default_rng(5)
    evidence(ctx, rng, N)
    requests = [row for split, n in (("rerank", 12), ("test", 12)) for row in candidate_rows(rng, N, split, n)]
    requests[0]["history_ids"], requests[0]["history_days"] = [], []
    requests[1]["weights"] = [1.0 + 0.5 * place for place in range(10)]  # of a debiased log
    long = [f"i{i % N}" for i in range(LOOKBACK + 7)]
    requests[1]["history_ids"], requests[1]["history_days"] = long, [1] * len(long)
    put(ctx, "candidates", requests)
    first = with_features(ctx, read(ctx, "candidates")).toArrow().to_pylist()
    again = with_features(ctx, read(ctx, "candidates").repartition(3)).toArrow().to_pylist()

    def by_key(rows: list[dict]) -> dict:
        return {(r["request_id"], r["item_id"]): r for r in rows}

    assert by_key(first) == by_key(again)
    tables = {
        "pairs": {(p["fit"], p["item_id"], p["next_item_id"]): p for p in ctx.lake.read("item_pairs").to_pylist()},
        "stats": {(s["fit"], s["item_id"]): s for s in ctx.lake.read("item_stats").to_pylist()},
        "items": {i["item_id"]: i for i in ctx.lake.read("items").to_pylist()},
        "vectors": {v["item_id"]: np.array(v["vector"], np.float32) for v in ctx.lake.read("item_embeddings").to_pylist()},
    }
    rows = by_key(first)
    assert len(first) == len(rows) == sum(len(r["candidate_ids"]) for r in requests)
    for request in requests:
        for place, item in enumerate(request["candidate_ids"]):
            row = rows[request["request_id"], item]
            want = expected(request, place, tables)
            numbers = {k: v for k, v in want.items() if not isinstance(v, str | None)}
            assert {k: row[k] for k in numbers} == pytest.approx(numbers, abs=2e-6), (request["request_id"], item)
            assert row["pair_item"] == want["pair_item"]
            assert (row["pair_gap_days"] is None) == (want["pair_gap_days"] is None)
