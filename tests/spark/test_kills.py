"""SIGKILL at the named points of publishing: what was there stays readable as it was, and the next run completes it (DESIGN contract 3).

Each stage and each point once runs always; `GR2_KILLS=all` tries each point of each table of the data plane.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import schemas
from gr2 import PROJECT, pipeline
from gr2.config import load
from gr2.context import Context

pytestmark = pytest.mark.spark
SETTINGS = ["simulator.users=40", "simulator.items=60", "simulator.days=4", "simulator.malformed_share=0.02"]
STAGES = ("events", "items", "interactions", "impressions", "evidence")
POINTS = ("begun", "staged", "audited", "committed", "cleaned")
SOME = [
    ("events", "events", "committed"), ("items", "items", "audited"), ("interactions", "histories", "staged"),
    ("impressions", "impressions", "cleaned"), ("evidence", "item_pairs", "begun"),
]  # fmt: skip
ALL = [(s, t, p) for s in STAGES for t in pipeline.get(s).writes if (s, t) != ("items", "quarantine") for p in POINTS]


def context(root: Path, days: int) -> Context:
    """A context that sees so many simulated days."""
    return Context(load("demo", [f"paths.root={root}", *SETTINGS, f"simulator.days={days}"]))


def build(ctx: Context) -> None:
    """Every stage of the data plane, one after the other."""
    for name in STAGES:
        stage = pipeline.get(name)
        pipeline.execute(stage, ctx.cfg, ctx, "")


def contents(ctx: Context) -> dict[str, list]:
    """Every table, row for row, clocks aside."""
    return {name: contents_of(ctx, name) for name in dict.fromkeys(t for s in STAGES for t in pipeline.get(s).writes)}


def test_a_killed_stage_leaves_the_snapshot_before_and_the_next_run_completes_it(tmp_path):
    """The tables of two days are there; each stage is killed while it adds the third and fourth, then all run to their end."""
    clean, ctx = context(tmp_path / "clean", 4), context(tmp_path / "killed", 4)
    build(clean)
    build(context(tmp_path / "killed", 2))
    settled: set[str] = set()  # tables that a run has completed, or that a kill came too late for
    before = contents(ctx)
    for stage, table, point in ALL if os.environ.get("GR2_KILLS") == "all" else SOME:
        for earlier in STAGES[: STAGES.index(stage)]:
            if earlier not in settled:
                pipeline.execute(pipeline.get(earlier), ctx.cfg, ctx, "")
                settled.add(earlier)
        known = contents(ctx)
        words = [sys.executable, str(Path(__file__).with_name("killed.py")), str(ctx.root), stage, table, point, *SETTINGS]
        done = subprocess.run(words, cwd=PROJECT, env={**os.environ, "PYTHONPATH": str(PROJECT)}, capture_output=True, text=True)
        assert done.returncode == -9, done.stderr[-2000:]
        after = contents(ctx)
        for name, rows in after.items():
            whole = contents_of(clean, name)
            assert rows in (known[name], whole), f"{name} is half there after {stage} was killed at {point} of {table}"
        if point in ("begun", "staged", "audited"):
            assert after[table] == known[table], "nothing of a table is to be seen before its commit"
        else:
            assert after[table] == contents_of(clean, table)
    build(ctx)
    assert contents(ctx) == contents(clean) != before


def contents_of(ctx: Context, name: str) -> list:
    """One table, row for row; of what was refused only that of one stage, since two write it."""
    table = schemas.get(name)
    only = {"target": "events"} if name == "quarantine" else {}
    return ctx.lake.read(name, table.stable(), order_by=table.key, **only).to_pylist()
