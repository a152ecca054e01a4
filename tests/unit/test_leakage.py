"""The leakage checks pass on honest tables, whatever the future holds, and each one fails on the leak that it is there for."""

import copy
import datetime as dt
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st

import schemas
from gr2 import artifacts
from gr2.config import load
from gr2.context import Context
from validation import leakage

pytestmark = pytest.mark.unit
START = dt.date(2026, 1, 1)
ALLOWED = {"train": ("pretrain",), "refit": ("pretrain", "rerank")}
World = dict[str, list[dict[str, Any]]]


def world(logs: list[list[int]], window: int = 2) -> World:
    """Honest tables over users' item lists (leave-one-out: the last three items are the targets), counted in plain Python."""
    interactions, requests = [], []
    for user, items in enumerate(logs):
        for place, item in enumerate(items):
            split = ("pretrain", "rerank", "valid", "test")[max(0, place - (len(items) - 4))]
            day = START + dt.timedelta(days=place)
            interactions.append({"user_id": f"u{user}", "ordinal": place + 1, "item_id": f"i{item}", "event_date": day, "split": split})
            if split != "pretrain":
                requests.append(
                    {"request_id": f"{split}:u{user}", "split": split, "user_id": f"u{user}", "source": "beam", "target_id": f"i{item}",
                     "fit": "refit" if split == "test" else "train", "history_ids": [f"i{i}" for i in items[:place]],
                     "history_days": list(range(place, 0, -1)), "as_of": day}
                )  # fmt: skip
    nights = [{**r, "request_id": f"live:{n}", "split": "live", "fit": "live", "target_id": None} for n, r in enumerate(requests[:2])]
    stats, pairs = [], []
    for fit, splits in ALLOWED.items():
        seen = [row for row in interactions if row["split"] in splits]
        counts = Counter(row["item_id"] for row in seen)
        last = max(row["event_date"] for row in seen)
        stats += [{"fit": fit, "item_id": i, "count": n, "last_date": max(r["event_date"] for r in seen if r["item_id"] == i),
                   "reference_date": last} for i, n in counts.items()]  # fmt: skip
        couples = [(a, b) for a in seen for b in seen if a["user_id"] == b["user_id"] and 1 <= b["ordinal"] - a["ordinal"] <= window]
        directs = Counter((a["item_id"], b["item_id"]) for a, b in couples if b["ordinal"] == a["ordinal"] + 1)
        for (a, b), n in Counter((a["item_id"], b["item_id"]) for a, b in couples).items():
            pairs.append({"fit": fit, "item_id": a, "next_item_id": b, "count": n, "next_count": directs[a, b]})
    train = [r for r in requests if r["split"] == "rerank"]
    examples = [{"example_id": r["request_id"], "request_id": r["request_id"], "source": "rejection"} for r in train]
    popularity = {(s["fit"], s["item_id"]): math.log1p(s["count"]) for s in stats}
    features = [
        {"request_id": r["request_id"], "item_id": r["target_id"], "popularity": popularity.get((r["fit"], r["target_id"]), 0.0)}
        for r in requests
    ]
    prompts = [{"request_id": r["request_id"], "split": r["split"]} for r in requests if r["split"] != "test"]
    lessons = [{"example_id": r["request_id"], "request_id": r["request_id"]} for r in prompts]
    sids = [{"tokenizer": "x", "item_id": f"i{i}", "token_text": f"<a_{i}><b_0>"} for i in range(100)]
    texts = [
        {"fit": fit, "example_id": f"history:u{user}:0", "task": "history", "prompt": "",
         "completion": "".join(f"<a_{i}><b_0>" for i in items[: len(items) - (3 if fit == "train" else 2)])}
        for fit in ALLOWED for user, items in enumerate(logs)
    ]  # fmt: skip
    return {
        "interactions": interactions, "candidates": [*requests, *nights], "candidate_features": features, "item_stats": stats,
        "item_pairs": pairs,
        "midtrain_examples": texts, "semantic_ids": sids, "sft_examples": examples, "distill_examples": lessons, "rl_prompts": prompts,
    }  # fmt: skip


def failed(tables: World, *overrides: str, night: World | None = None) -> set[str]:
    """Names of the failed checks, through real Delta tables. `night`: tables that one publishes after the build's are pinned."""
    with tempfile.TemporaryDirectory() as root:
        with artifacts.publish_folder(Path(root), "tokenizer", {}) as folder:
            (folder / "config.json").write_text("{}")
        tables = {
            **tables,
            "semantic_ids": [{**r, "tokenizer": artifacts.resolve(Path(root), "tokenizer").id} for r in tables["semantic_ids"]],
        }
        ctx = Context(load("demo", [f"paths.root={root}", "evidence.window=2", "data.protocol=leave_one_out", *overrides]))
        for name, rows in [*tables.items(), *(night or {}).items()]:
            fields = [f for f in schemas.get(name).arrow() if rows and f.name in rows[0]]
            path = str(Path(root) / "tables" / name)
            write_deltalake(path, pa.Table.from_pylist(rows, schema=pa.schema(fields)), mode="overwrite")
            if name not in ctx.pins.get("tables", {}):
                ctx.pin("tables", name, ctx.lake.version(name))
        found = leakage.audit(ctx)
    assert {f["subject"] for f in found} >= set(leakage.CHECKS)
    return {f["subject"] for f in found if not f["passed"]}


LOGS = [[0, 1, 2, 3, 4, 5], [1, 2, 3, 5, 4, 0], [2, 0, 1, 4], [5, 3, 1, 0, 2]]


def recount(splits: tuple[str, ...]) -> Callable[[World], None]:
    """Plants statistics, or pairs, that were fitted on more splits than the fit `train` may see."""

    def plant(tables: World) -> None:
        row = next(s for s in tables["item_stats"] if s["fit"] == "train")
        row["count"] += sum(r["split"] in splits and r["item_id"] == row["item_id"] for r in tables["interactions"]) or 1

    return plant


def change(table: str, index: int, **values: Any) -> Callable[[World], None]:
    return lambda tables: tables[table][index].update(values)


LEAKS = {
    "item_stats_recount": recount(("rerank", "valid", "test")),
    "reference_date": change("item_stats", 0, reference_date=START + dt.timedelta(days=300)),
    "item_pairs_recount": change("item_pairs", 0, count=99),
    "midtrain_histories": lambda tables: tables["midtrain_examples"][0].update(prompt=f"<a_{LOGS[0][-1]}><b_0>"),
    "request_fit": change("candidates", 0, fit="refit"),
    "history_before_target": lambda tables: tables["candidates"][0]["history_ids"].append(tables["candidates"][1]["target_id"]),
    "history_before_night": lambda tables: tables["candidates"][-1].update(as_of=START),
    "sft_requests": lambda tables: tables.update(sft_examples=[{"example_id": "x", "request_id": "test:u0", "source": "rejection"}]),
    "rl_requests": change("rl_prompts", 0, request_id="test:u0"),
    "distill_requests": lambda tables: tables.update(distill_examples=[{"example_id": "x", "request_id": "test:u1"}]),
    "splits_in_order": lambda tables: tables["interactions"][0].update(split="test"),
    "features_of_the_fit": change("candidate_features", 2, popularity=9.0),
}


def test_every_check_has_its_planted_leak():
    assert set(LEAKS) == set(leakage.CHECKS)
    assert failed(world(LOGS)) == set()


@pytest.mark.parametrize("name", LEAKS)
def test_a_planted_leak_fails_its_check(name):
    tables = copy.deepcopy(world(LOGS))
    LEAKS[name](tables)
    assert name in failed(tables)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), min_size=4, max_size=9), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_a_poisoned_future_changes_no_fitted_count_and_fitting_on_it_is_found(logs, random):
    poisoned = [items[:-3] + [random.choice([*range(8), 90]) for _ in items[-3:]] for items in logs]
    honest, other = world(logs), world(poisoned)

    def fitted(tables: World, table: str, fit: str) -> list[dict[str, Any]]:
        return sorted((r for r in tables[table] if r["fit"] == fit), key=str)

    assert fitted(honest, "item_stats", "train") == fitted(other, "item_stats", "train")
    assert failed(other) == set()
    leaked = [{**r, "fit": "train"} for r in other["item_stats"] if r["fit"] == "refit"]
    other["item_stats"] = [r for r in other["item_stats"] if r["fit"] != "train"] + leaked
    assert "item_stats_recount" in failed(other), "statistics fitted on split rerank are not statistics of fit train"


def test_a_night_since_a_build_is_no_leak_of_it_and_its_own_lists_are_audited():
    """Under the time protocol one more day moves all windows, and a late event a user's places."""
    tables, later = world([LOGS[0], LOGS[1]]), world([[7, *LOGS[0], 6], [7, *LOGS[1], 6]])
    night = {"interactions": [row | {"event_date": row["event_date"] - dt.timedelta(days=1)} for row in later["interactions"]]}
    time = "data.protocol=time"
    assert failed(tables, time, night=night) == set()
    leak = copy.deepcopy(tables)
    LEAKS["history_before_target"](leak)
    assert "history_before_target" in failed(leak, time, night=night)
    live = {"candidates": [*tables["candidates"], {**tables["candidates"][-1], "history_ids": ["i6"], "as_of": START}]}
    assert failed(tables, time, night=night | live) == {"history_before_night"}


def test_windows_of_the_time_protocol_may_not_overlap():
    assert "windows_in_order" in failed(world(LOGS), "data.protocol=time"), "users of unequal length: their days overlap between splits"
    assert failed(world([LOGS[0], LOGS[1]]), "data.protocol=time") == set()
