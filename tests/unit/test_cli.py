"""The command as a user meets it: help is quick and teaches, failures are one line and a code."""

import os
import re
import subprocess
import sys
import time

import pytest

from gr2.config import load
from gr2.context import Context
from gr2.errors import ConfigError

pytestmark = pytest.mark.unit


def gr2(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gr2", *words], capture_output=True, text=True, env={**os.environ, **variables}, check=False
    )


def test_help_names_every_command_and_loads_nothing_heavy():
    shown = gr2("--help")
    assert shown.returncode == 0
    for command in ("run", "stage", "tables", "sql", "report", "release", "doctor", "airflow"):
        assert re.search(rf"\b{command}\b", shown.stdout)
    loaded = subprocess.run([sys.executable, "-X", "importtime", "-m", "gr2", "--help"], capture_output=True, text=True, check=False).stderr
    assert not re.search(r"\b(pydantic|torch|pyspark|pyarrow|duckdb|pandas|numpy)\b", loaded)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("run", "--profile", "dmo"), 2, "did you mean 'demo'"),
        (("stage", "rll"), 2, "no stage 'rll'"),
        (("run", "--set", "rl.grup=1"), 2, "did you mean 'group'"),
        (("stage", "events", "--date", "2026-02-30"), 3, "not a day"),
        (("stage", "events", "--date", "yesterday"), 3, "YYYY-MM-DD"),
        (("sql", "SELECT 1", "--format", "xml"), 2, "choose table, csv or json"),
    ],
)
def test_a_failure_is_one_line_and_its_code(words, code, message, tmp_path):
    done = gr2(*words)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (code, 1), done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("stage", ["tokenizer", "midtrain"])  # of one process, and of two
def test_a_failure_says_what_to_run_with_the_settings_at_hand_and_its_code_outlives_torchrun(stage, tmp_path):
    given = f"--profile demo --set paths.root={tmp_path} --set midtrain.student.processes=2"
    done = gr2("stage", stage, *given.split())
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 5, done.stderr
    assert re.search(rf"MissingInputError: .*`gr2 stage \w+ {re.escape(given)}`", last), last


def test_a_finished_command_does_not_wait_for_the_interpreter_to_end():
    lines = "import atexit, os, sys; atexit.register(os.abort); sys.argv[1:] = ['run', '--help']; from gr2.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--profile" in done.stdout


def test_a_missing_java_is_named(tmp_path):
    done = gr2("doctor", "--set", f"paths.root={tmp_path}", JAVA_HOME=str(tmp_path))
    assert done.returncode == 6
    assert "install Java 17" in done.stdout


def test_two_runs_under_one_root_do_not_race(tmp_path):
    from gr2.cli import _lock

    ctx = Context(load("demo", [f"paths.root={tmp_path}"]))
    with _lock(ctx), pytest.raises(ConfigError, match="another `gr2 run`"), _lock(ctx):
        pass


def test_progress_reaches_a_log_that_is_no_terminal(ctx, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(ctx.track(range(2), "reading", total=2)) == [0, 1]
    assert "reading: 1/2" in (ctx.root / "logs" / "gr2.log").read_text()
