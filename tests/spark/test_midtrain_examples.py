"""The texts of mid-training: every item of a fit is learned once, after what came before it, and nothing later is ever read."""

import re
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sequence_world import ITEMS, catalogue, interaction_rows, sid, walks

from gr2.context import Context
from schemas.interactions import FITS
from spark_jobs import midtrain_examples
from tests.tables import put

pytestmark = pytest.mark.spark
WINDOW = 6
SMALL = [f"midtrain.history_items={WINDOW}", "midtrain.title_words=3", "data.protocol=leave_one_out"]
FULL = ["midtrain.titles=1", "midtrain.persona=2.5", "midtrain.captions=1", "midtrain.lookup=0.5"]


@pytest.fixture
def built(make_ctx: Callable[..., Context]) -> tuple[Context, list[dict[str, Any]]]:
    ctx = make_ctx([*SMALL, *FULL])
    rows = interaction_rows(walks(rng := np.random.default_rng(5), 40, longest=22), rng)
    catalogue(ctx)
    put(ctx, "interactions", rows)
    midtrain_examples.run(ctx.cfg, ctx)
    return ctx, rows


def texts(ctx: Context, fit: str) -> dict[str, dict[str, Any]]:
    return {r["example_id"]: r for r in ctx.lake.read("midtrain_examples", order_by=["ordinal"], fit=fit).to_pylist()}


def of_task(found: dict[str, dict[str, Any]], task: str) -> list[dict[str, Any]]:
    return [r for r in found.values() if r["task"] == task]


def items_of(text: str) -> list[str]:
    return [part + ">" for part in text.split(">")[:-1]]


def test_each_item_is_learned_once_after_those_before_it(built: tuple[Context, list[dict[str, Any]]]) -> None:
    ctx, rows = built
    for fit, splits in FITS.items():
        walked: dict[str, str] = {}
        for row in rows:
            if row["split"] in splits:
                walked[row["user_id"]] = walked.get(row["user_id"], "") + sid(row["item_id"])
        windows: dict[str, list[dict[str, Any]]] = {}
        for row in of_task(texts(ctx, fit), "history"):
            windows.setdefault(row["example_id"].split(":")[1], []).append(row)
        assert windows.keys() == walked.keys()
        for user, parts in windows.items():
            parts.sort(key=lambda r: int(r["example_id"].split(":")[2]))
            assert "".join(p["completion"] for p in parts) == walked[user]
            done = ""
            for part in parts:
                assert done.endswith(part["prompt"])
                assert bool(part["prompt"]) == bool(done)
                tokens = items_of(part["prompt"] + part["completion"])
                assert len(tokens) <= 3 * WINDOW
                assert part["completion"]
                done += part["completion"]
        assert max(len(p) for p in windows.values()) > 3


def test_text_tasks_say_true_things_in_their_shares(built: tuple[Context, list[dict[str, Any]]]) -> None:
    ctx, rows = built
    found = texts(ctx, "train")
    captions, lookup = of_task(found, "captions"), of_task(found, "lookup")
    assert len(captions) == ITEMS
    assert 5 < len(lookup) < ITEMS - 5
    titles = {r["item_id"]: " ".join((r["title"] or "").split()[:3]) for r in ctx.lake.read("items").to_pylist()}
    by_sid = {sid(item): title for item, title in titles.items()}
    assert all(by_sid[r["prompt"].removesuffix(" is")] == r["completion"][1:].split(";")[0] for r in captions)
    assert all(by_sid[r["completion"]] == r["prompt"].removeprefix("item ").split(";")[0] for r in lookup)
    users = {r["user_id"] for r in rows if r["split"] == "pretrain"}
    persona = of_task(found, "persona")
    assert 2 * len(users) < len(persona) < 3 * len(users)
    seen = {u: "".join(titles[r["item_id"]] + "|" for r in rows if r["user_id"] == u and r["split"] == "pretrain") for u in users}
    for row in of_task(found, "titles"):
        names = [*row["prompt"].removeprefix("chosen: ").removesuffix("; next:").split("; "), row["completion"][1:]]
        walked = [t for t in seen[row["example_id"].split(":")[1]].split("|") if t]
        assert 2 <= len(names) <= 4
        assert any(walked[k : k + len(names)] == names for k in range(len(walked)))
    assert all(re.fullmatch(r"(<[a-c]_\d+>)+", r["completion"].split(" then ")[1].split(" ")[0]) for r in persona)


def test_a_poisoned_future_changes_no_text(built: tuple[Context, list[dict[str, Any]]]) -> None:
    ctx, rows = built
    before = {fit: texts(ctx, fit) for fit in FITS}
    versions = ctx.lake.version("midtrain_examples")
    midtrain_examples.run(ctx.cfg, ctx)
    assert ctx.lake.version("midtrain_examples") == versions, "a rerun made a new version"
    poison = np.random.default_rng(9)
    for fit, held in (("refit", {"valid", "test"}), ("train", {"rerank", "valid", "test"})):
        put(ctx, "interactions", [r | {"item_id": f"i{poison.integers(ITEMS)}"} if r["split"] in held else r for r in rows])
        midtrain_examples.run(ctx.cfg, ctx)
        assert texts(ctx, fit) == before[fit]
    assert texts(ctx, "refit") != before["refit"], "the poison was none"


def test_no_text_task_without_a_share(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx([*SMALL, *(f"midtrain.{task}=0" for task in ("titles", "persona", "captions", "lookup"))])
    catalogue(ctx)
    put(ctx, "interactions", interaction_rows({"u1": ["i1", "i2", "i3", "i4", "i5"]}, np.random.default_rng(0)))
    midtrain_examples.run(ctx.cfg, ctx)
    assert {(r["task"], r["completion"]) for r in texts(ctx, "train").values()} == {("history", sid("i1") + sid("i2"))}


def test_files_hold_sorted_ranges_of_the_ordinal(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx([*SMALL, *FULL])
    catalogue(ctx)
    put(ctx, "interactions", interaction_rows(walks(rng := np.random.default_rng(5), 40, longest=22), rng))
    ctx.spark.conf.set("spark.sql.adaptive.coalescePartitions.enabled", "false")  # several files also of a table this small
    try:
        midtrain_examples.run(ctx.cfg, ctx)
    finally:
        ctx.spark.conf.unset("spark.sql.adaptive.coalescePartitions.enabled")
    ranges: dict[str, list[list[int]]] = {}
    for path in ctx.lake.open("midtrain_examples").file_uris():
        ranges.setdefault(path.split("fit=")[1].split("/")[0], []).append(pq.read_table(path)["ordinal"].to_pylist())
    assert ranges.keys() == {"train", "refit"}
    for files in ranges.values():
        assert len(files) > 1
        found = list(chain(*sorted(files)))
        assert found == sorted(found)
