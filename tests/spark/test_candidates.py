"""Requests are cut by their definitions; lists are distinct live items without the history, scored as the model itself scores them."""

import datetime as dt
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rerank_world import pair_rows, stats_rows, vector_rows
from sequence_world import ITEMS, START, asin, catalogue, codes_of, interaction_rows, model_named, sasrec_named, walks

from gr2.clicks import examination, inverse_weights
from gr2.context import Context
from gr2.errors import ConfigError, InputError
from scoring import sasrec
from scoring.model import load, sid_ids
from spark_jobs import candidates
from spark_jobs.candidates import requests, sampled
from spark_jobs.logged_lists import logged
from spark_jobs.session import read
from tests.tables import put

pytestmark = pytest.mark.spark
WINDOWS = (16, 22, 28)
SMALL = ["candidates.n=5", "candidates.depth=9", "candidates.beam=40", "data.max_history=4", "midtrain.history_items=6"]
TIME = [*SMALL, "data.protocol=time", "data.max_requests_per_user=2"]


def expected(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every possible request, from the definition."""
    found = {}
    for target in rows:
        before = [r for r in rows if r["user_id"] == target["user_id"] and r["ordinal"] < target["ordinal"]]
        seen = [r["item_id"] for r in before]
        if target["split"] == "pretrain" or not before or target["item_id"] in seen:
            continue
        last = before[-1]
        known = target["day_known"] and last["day_known"] and target["event_date"] >= last["event_date"]
        same = "same_day" if target["event_date"] == last["event_date"] else "later_day"
        one, other = asin(target["item_id"]), asin(last["item_id"])
        proven = one is not None and other is not None and one < other
        found[f"{target['split']}:{target['user_id']}:{target['ordinal']}"] = {
            "target_id": target["item_id"],
            "as_of": target["event_date"],
            "history_ids": seen[-4:],
            "history_days": [max(0, (target["event_date"] - r["event_date"]).days) for r in before][-4:],
            "slice": same if known else "provably_later" if proven else "unknown_day",
            "seen_ids": set(seen),
        }
    return found


def as_dict(frame: Any) -> dict[str, dict[str, Any]]:
    return {r["request_id"]: r | {"seen_ids": set(r["seen_ids"])} for r in frame.toArrow().to_pylist()}


@pytest.mark.parametrize("protocol", ["leave_one_out", "time"])
def test_requests_are_what_their_definition_says(make_ctx: Callable[..., Context], protocol: str) -> None:
    ctx = make_ctx([*TIME, f"data.protocol={protocol}", "data.source=amazon2014"])
    rng = np.random.default_rng(2)
    rows = interaction_rows(walks(rng, 30, noise=0.4), rng, WINDOWS if protocol == "time" else None)
    if protocol == "leave_one_out":  # the order is the source's own, whatever days it gives
        fallen = next(r for r in reversed(rows) if r["split"] == "test" and r["day_known"])
        fallen |= {"event_date": fallen["event_date"] - dt.timedelta(days=400)}
    put(ctx, "interactions", rows)
    catalogue(ctx)
    drawn_from = (ctx.cfg, read(ctx, "interactions"), read(ctx, "items"))
    found, wanted = as_dict(requests(*drawn_from)), expected(rows)
    assert found
    assert all({k: row[k] for k in wanted[i]} == wanted[i] for i, row in found.items())
    most = 1 if protocol == "leave_one_out" else 2
    groups = [(i.split(":")[0], i.split(":")[1]) for i in wanted]
    assert sorted((i.split(":")[0], i.split(":")[1]) for i in found) == sorted(
        g for g in set(groups) for _ in range(min(most, groups.count(g)))
    )
    assert {r["slice"] for r in found.values()} == {"same_day", "later_day", "provably_later", "unknown_day"}
    elsewhere = ctx.cfg.model_copy(update={"data": ctx.cfg.data.model_copy(update={"source": "files"})})
    told = {r["slice"] for r in as_dict(requests(elsewhere, *drawn_from[1:])).values()}
    assert told == {"same_day", "later_day", "unknown_day"}, "only of Amazon's logs is it known that a day's rows ascend"
    at_most = {"max_requests": 4, "max_rerank": 6, "max_valid": 3}
    few = ctx.cfg.model_copy(update={"candidates": ctx.cfg.candidates.model_copy(update=at_most)})
    drawn = sampled(requests(*drawn_from), few).toArrow()["request_id"].to_pylist()
    assert drawn == sorted(drawn)
    assert set(drawn) <= set(found)
    sizes = {split: sum(i.startswith(split) for i in drawn) for split in ("rerank", "valid", "test")}
    assert sizes == {s: min(most, sum(i.startswith(s) for i in found)) for s, most in (("rerank", 6), ("valid", 3), ("test", 4))}


def evidence_of(ctx: Context, rng: np.random.Generator) -> None:
    put(ctx, "item_embeddings", vector_rows(rng, ITEMS))
    for fit in ("train", "refit"):
        put(ctx, "item_pairs", pair_rows(rng, ITEMS, fit), {"fit": fit})
        put(ctx, "item_stats", stats_rows(rng, ITEMS, fit), {"fit": fit})


def world(ctx: Context, windows: tuple[int, int, int] | None) -> list[dict[str, Any]]:
    rng = np.random.default_rng(4)
    rows = interaction_rows(walks(rng, 25), rng, windows)
    catalogue(ctx)
    put(ctx, "interactions", rows)
    evidence_of(ctx, rng)
    model_named(ctx, "midtrain", "midtrain-refit")
    sasrec_named(ctx, "sasrec", "sasrec-refit")
    return rows


def scores_of_all(ctx: Context, name: str, row: dict[str, Any], banned: set[str]) -> np.ndarray:
    """log of the mixture of every item that may be listed: the language model one by one, by whole forward passes; counts in plain loops;
    SASRec by its softmax over what may be listed."""
    history = row["history_ids"]
    model, tokenizer = load(ctx.model(name).path)
    ids_LK = sid_ids(tokenizer)
    prompt = [tokenizer.bos_token_id, *(int(ids_LK[level, c]) for i in history[-5:] for level, c in enumerate(codes_of(int(i[1:]))))]
    found = []
    for item in range(ITEMS):
        own = [int(ids_LK[level, c]) for level, c in enumerate(codes_of(item))]
        with torch.inference_mode():
            logps_TV = model(torch.tensor([[*prompt, *own]])).logits[0].log_softmax(-1)
        found.append(sum(float(logps_TV[len(prompt) - 1 + k, t]) for k, t in enumerate(own)))
    with torch.inference_mode():
        state_D = model.base_model(torch.tensor([prompt])).last_hidden_state[0, -1]
        table = model.get_input_embeddings().weight
        items_ND = torch.stack([sum(table[ids_LK[level, c]] for level, c in enumerate(codes_of(item))) for item in range(ITEMS)])
        whole_N = torch.log_softmax(items_ND @ state_D, dim=-1).numpy()
    network_N = np.exp((np.array(found) + whole_N) / 2)
    items = sasrec.load(ctx.model(name.replace("midtrain", "sasrec")).path)
    number = {item: place for place, item in enumerate(items.names, 1)}
    listed = [i for i in range(ITEMS) if f"i{i}" not in banned]
    logits_M = items.after([[number[i] for i in history]])[0]
    items_N = np.zeros(ITEMS)
    items_N[listed] = logits_M[[number[f"i{i}"] for i in listed]].softmax(0).numpy()
    return np.log(0.6 * (0.5 * network_N + 0.5 * items_N) + 0.4 * counted(ctx, row["fit"], history))


def counted(ctx: Context, fit: str, history: list[str]) -> np.ndarray:
    """What `item_pairs` of a fit say of each item after a history, by the definition."""
    pairs = ctx.lake.read("item_pairs", ["item_id", "next_item_id", "count"], fit=fit).to_pylist()
    votes_N, total = np.zeros(ITEMS), sum(0.5**step for step in range(len(history)))
    for step, item in enumerate(reversed(history)):
        own = np.zeros(ITEMS)
        for pair in pairs:
            if pair["item_id"] == item:
                own[int(pair["next_item_id"][1:])] += pair["count"]
            if pair["next_item_id"] == item:
                own[int(pair["item_id"][1:])] += 0.3 * pair["count"]
        votes_N += 0.5**step / total * own / (own.sum() + 3)
    return votes_N


def test_beams_rank_every_live_item_but_the_history(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx(TIME)
    rows = world(ctx, WINDOWS)
    candidates.run(ctx.cfg, ctx)
    table, wanted = ctx.lake.read("candidates", order_by=["request_id"]).to_pylist(), expected(rows)
    assert {r["split"] for r in table} == {"rerank", "valid", "test"}
    for row in table:
        name = "midtrain-refit" if row["split"] == "test" else "midtrain"
        assert row["fit"] == ("refit" if row["split"] == "test" else "train")
        assert row["model_id"] == ctx.model(name).id
        assert row["source"] == "beam"
        unborn = {f"i{k}" for k in range(ITEMS) if START + dt.timedelta(days=k) > row["as_of"]}
        listed, banned = row["candidate_ids"], wanted[row["request_id"]]["seen_ids"] | unborn
        assert len(set(listed)) == len(listed) == 5
        assert not set(listed) & banned
        assert row["prior_scores"] == sorted(row["prior_scores"], reverse=True)
        assert row["grades"] == [int(i == row["target_id"]) for i in listed]
        assert (row["full_rank"] is None) == (row["target_id"] in banned)  # the beam is as wide as the catalogue
        assert row["target_rank"] == (row["full_rank"] if row["full_rank"] and row["full_rank"] <= 5 else None)
    for row in table[:: len(table) // 4]:
        name = "midtrain-refit" if row["split"] == "test" else "midtrain"
        unborn = {f"i{k}" for k in range(ITEMS) if START + dt.timedelta(days=k) > row["as_of"]}
        scores = scores_of_all(ctx, name, row, wanted[row["request_id"]]["seen_ids"] | unborn)
        assert np.allclose([scores[int(i[1:])] for i in row["candidate_ids"]], row["prior_scores"], atol=0.1)
    features = ctx.lake.read("candidate_features", order_by=["request_id", "incoming_rank"]).to_pylist()
    assert [(f["request_id"], f["item_id"]) for f in features] == [(r["request_id"], i) for r in table for i in r["candidate_ids"]]
    lessons: dict[str, list[dict[str, Any]]] = {}
    for row in ctx.lake.read("program_lists", order_by=["request_id", "incoming_rank"]).to_pylist():
        lessons.setdefault(row["request_id"], []).append(row)
    teaching = {r["request_id"]: r for r in table if r["split"] != "test" and r["full_rank"] and r["full_rank"] <= 9}
    assert set(lessons) == set(teaching)
    assert any(r["full_rank"] > 5 for r in teaching.values()), "some hold their target only in the part that is not shown"
    for request, own in lessons.items():
        assert [r["incoming_rank"] for r in own] == list(range(1, 10))
        assert [r["incoming_rank"] for r in own if r["grade"]] == [teaching[request]["full_rank"]]
        assert own[:5] == [f for f in features if f["request_id"] == request]
    tables = ("candidates", "candidate_features", "program_lists")
    versions = [ctx.lake.version(t) for t in tables]
    candidates.run(ctx.cfg, ctx)
    assert versions == [ctx.lake.version(t) for t in tables], "a rerun made a new version"


def test_no_target_is_an_error_that_says_so(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx(SMALL)
    put(ctx, "interactions", interaction_rows({"u1": ["i1"]}, np.random.default_rng(0)))
    catalogue(ctx)
    with pytest.raises(InputError, match="no user has a target"):
        candidates.run(ctx.cfg, ctx)


def test_lists_of_a_log_keep_its_order_and_grades(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx([*TIME, "candidates.source=log"])
    rng = np.random.default_rng(6)
    rows = interaction_rows(walks(rng, 12), rng, WINDOWS)
    put(ctx, "interactions", rows)
    slates: dict[str, list[tuple[str, int]]] = {}
    shown, users = [], {}
    for number in range(60):
        user, day = f"u{rng.integers(12)}", START + dt.timedelta(days=int(rng.integers(8, 45)))
        listed = [f"i{i}" for i in rng.permutation(ITEMS)[:6]]
        grades = [int(g) for g in rng.choice(3, size=6, p=[0.8, 0.1, 0.1])]
        slates[f"q{number}"], users[f"q{number}"] = list(zip(listed, grades, strict=True)), (user, day)
        shown += [
            {"request_id": f"q{number}", "user_id": user, "item_id": item, "request_time": dt.datetime.combine(day, dt.time(12), dt.UTC),
             "event_date": day, "slot_row": p, "slot_col": 1, "position": p, "propensity": None, "click": g > 0, "purchase": g > 1,
             "grade": g, "period": "2026"}
            for p, (item, g) in enumerate(zip(listed, grades, strict=True), 1)
        ]  # fmt: skip
    put(ctx, "impressions", [shown[i] for i in rng.permutation(len(shown))])
    found = {r["request_id"]: r for r in logged(ctx.cfg, read(ctx, "interactions"), read(ctx, "impressions")).toArrow().to_pylist()}
    assert found
    until = {s: max(r["event_date"] for r in rows if r["split"] == s) for s in ("pretrain", "rerank", "valid")}
    for request, row in found.items():
        user, day = users[request]
        kept = slates[request][:5]
        assert row["candidate_ids"] == [i for i, _ in kept]
        assert row["grades"] == [g for _, g in kept]
        assert any(row["grades"])
        assert row["prior_scores"] == [-1.0, -2.0, -3.0, -4.0, -5.0]
        assert row["source"] == row["model_id"] == "log"
        before = [r for r in rows if r["user_id"] == user and r["event_time"].date() <= day]  # shown at noon, chosen at ten
        assert row["history_ids"] == [r["item_id"] for r in before][-4:]
        assert row["history_ids"]
        assert row["split"] == next((s for s in ("pretrain", "rerank", "valid") if day <= until[s]), "test") != "pretrain"
        positive = [i for i, g in kept if g]
        assert (row["target_id"], row["target_rank"]) == (
            (positive[0], row["candidate_ids"].index(positive[0]) + 1) if len(positive) == 1 else (None, None)
        )
    possible = {(u, r["split"]) for r in found.values() for u in [r["user_id"]]}
    assert max(sum((r["user_id"], r["split"]) == p for r in found.values()) for p in possible) <= 2
    assert all(row["weights"] is None for row in found.values())
    catalogue(ctx)
    evidence_of(ctx, rng)
    candidates.run(ctx.cfg, ctx)
    lessons = ctx.lake.read("program_lists", ["request_id", "grade"]).to_pylist()
    assert {r["request_id"] for r in lessons} == {q for q, row in found.items() if row["split"] != "test"}
    assert sum(r["grade"] for r in lessons) == sum(sum(row["grades"]) for row in found.values() if row["split"] != "test")
    weighed = make_ctx([*TIME, "candidates.source=log", "candidates.debias=position", "candidates.max_weight=1.5"]).cfg
    debiased = logged(weighed, read(ctx, "interactions"), read(ctx, "impressions")).toArrow().to_pylist()
    seen = [s for q, s in slates.items() if users[q][1] <= until["rerank"]]  # later slates teach nothing
    shown_K1, clicked_K1 = np.full((6, 1), len(seen)), np.array([[sum(s[k][1] > 0 for s in seen)] for k in range(6)])
    by_slot = inverse_weights(examination(shown_K1, clicked_K1), 1.5)[:5]
    assert len(set(by_slot)) > 2
    for row in debiased:
        np.testing.assert_allclose(row.pop("weights"), by_slot, rtol=1e-6)
        assert row == {k: v for k, v in found[row["request_id"]].items() if k != "weights"}, "all else is the log's"
    with pytest.raises(ConfigError, match="protocol=time"):
        logged(make_ctx([*SMALL, "data.protocol=leave_one_out"]).cfg, read(ctx, "interactions"), read(ctx, "impressions"))
