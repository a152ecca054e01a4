"""One small world through every stage, by the command a newcomer types; then everybody reads the tables, and a second run does nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from deltalake import DeltaTable

import schemas
from gr2 import PROJECT, pipeline
from gr2.config import load
from gr2.context import Context
from schemas.query import query
from spark_jobs.table_pages import questions

pytestmark = pytest.mark.e2e
SIZE = "{hidden: 64, layers: 2, heads: 2, kv_heads: 2, mlp: 128, dropout: 0.05}"
SMALL = [
    f"models.student={SIZE}", f"models.teacher={SIZE}",
    "simulator.users=160", "tokenizer.steps=150", "midtrain.student.max_steps=120", "midtrain.refit.max_steps=20",
    "midtrain.teacher.max_steps=60", "midtrain.refit.processes=1", "midtrain.teacher.processes=1", "sft.student.processes=1",
    "sft.teacher.processes=1", "traces.max_attempts=4", "traces.no_target_requests=5", "sft.drills=100", "sft.student.max_steps=15",
    "sft.teacher.max_steps=10", "candidates.n=10", "sft.student.row_tokens=640", "sft.teacher.row_tokens=640",
    "rl.student.max_steps=2", "rl.teacher.max_steps=2", "rl.prompts_per_step=4", "rl.group=4",
    "rl.max_refills=0", "rl.validate_requests=8", "opd.train.max_steps=2", "latents.train.max_steps=5",
    "latents.brief.max_steps=2", "distill.train.max_steps=5", "distill.max_requests=20",
    "distill.train.row_tokens=640", "distill.train.processes=1",
    "scoring.audit_requests=4", "scoring.miss_sample=5", "evaluation.bootstrap=100",
]  # fmt: skip


def gr2(root: Path, *words: str) -> str:
    """Runs the command; returns what it printed. Fails with its last lines."""
    settings = [part for item in (f"paths.root={root}", *SMALL) for part in ("--set", item)]
    environment = {**os.environ, "COLUMNS": "140"}
    done = subprocess.run(
        [sys.executable, "-m", "gr2", *words, *settings], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def versions(root: Path) -> dict[str, int]:
    """Version of every table."""
    return {path.name: DeltaTable(str(path)).version() for path in sorted((root / "tables").iterdir())}


def test_every_stage_runs_every_table_can_be_read_and_a_rerun_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "root"
    printed = gr2(root, "run")
    assert "lambdamart" in printed, "a run ends with the results"
    assert {s.name for s in pipeline.flow("build") if not (root / "runs" / f"{s.name}.json").exists()} == set()
    names = {table.name for table in schemas.all_tables()}
    assert set(versions(root)) == names

    ctx = Context(load("demo", [f"paths.root={root}"]))
    for name in names:
        path = str(root / "tables" / name)
        rows = DeltaTable(path).to_pyarrow_table().num_rows
        assert pl.read_delta(path).height == rows
        assert query(ctx, f"SELECT count(*) AS rows FROM {name}", latest=True).to_pylist() == [{"rows": rows}], "DuckDB"
    report = (root / "reports" / "index.html").read_text()
    pages = {path.stem: path.read_text() for path in (root / "reports" / "tables").glob("*.html")}
    assert set(pages) == names
    for page in (report, *pages.values()):
        assert not re.search(r"""(?:src|href)=["']https?:""", page), "the report opens without a network"

    silent = [question for question, text in questions() if not query(ctx, text).num_rows]
    assert (len(questions()), silent) == (20, ["Did an item's ID change between tokenizers?"]), "there is one tokenizer"

    before, results = versions(root), results_of(root)
    again = gr2(root, "run")
    assert again.count("up to date") == len(pipeline.flow("build"))
    assert versions(root) == before
    assert results_of(root) == results

    told = gr2(root, "run", "--set", "maintenance.keep_days=3")
    rerun = ("evaluation", "release", "report", "maintenance")
    assert told.count("up to date") == len(pipeline.flow("build")) - len(rerun), "figures and releases bear the run's id"
    later = Context(load("demo", [f"paths.root={root}", *SMALL, "maintenance.keep_days=3"])).run_id
    states = query(ctx, f"SELECT status, count(*) AS n FROM stage_runs WHERE run_id = '{later}' GROUP BY ALL ORDER BY n").to_pylist()
    assert states == [{"status": "ok", "n": 1}, {"status": "up_to_date", "n": len(pipeline.flow("build")) - len(rerun)}]
    assert results_of(root) == [row | {"run_id": later} for row in results]
    results = results_of(root)

    gr2(root, "run", "--date", "2026-01-28")
    found = query(
        ctx, "SELECT status, count(*) AS n FROM rerank_scores WHERE night = '2026-01-28' AND mode = 'score' GROUP BY ALL"
    ).to_pylist()
    lists = query(ctx, "SELECT count(*) AS n FROM candidates WHERE split = 'live'").to_pylist()[0]["n"]
    assert found == [{"status": "ok", "n": lists}]
    assert lists > 10, "the release holds the night's lists, each scored once"
    assert query(ctx, "SELECT count(*) AS n FROM audits WHERE audit = 'drift'").to_pylist()[0]["n"] == 8
    assert results_of(root) == results


def results_of(root: Path) -> list[dict[str, object]]:
    """The metrics, sorted."""
    return sorted(DeltaTable(str(root / "tables" / "metrics")).to_pyarrow_table().to_pylist(), key=str)
