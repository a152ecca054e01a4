"""Tasks for the DAGs: each calls one `gr2 stage` in a process of its own. Nothing heavy is imported here or in a worker."""

import re
import subprocess
import sys
from typing import Any

from airflow.exceptions import AirflowException
from airflow.sdk import Param, task

from gr2 import PROJECT
from gr2.pipeline import STAGES, Stage

# key=value, in an alphabet that no shell or template reads; where things lie is the operator's to say, not a run's
SETTING = r"^(?!paths\.|data\.path|models\.)[a-z_]+(\.[a-z0-9_]+)*=[^\s'\"`$;|&<>{}]*$"
PARAMS = {
    "profile": Param("demo", type="string", pattern="^[a-z0-9_]{1,40}$", description="A profile: a file in conf/."),
    "date": Param(
        "all", type="string", pattern=r"^(all|run|\d{4}-\d{2}-\d{2})$", description="all: what there is; run: the run's day; or a day."
    ),
    "settings": Param([], type="array", items={"type": "string", "pattern": SETTING, "maxLength": 200}, maxItems=20),
}


def command(stage: str, profile: str, date: str, settings: list[str]) -> list[str]:
    """Arguments of one `gr2 stage` call, never a shell line. Values are checked again: a run's configuration is user input."""
    for item in settings:
        if not re.fullmatch(SETTING, item):
            raise AirflowException(f"settings: {item!r} is not key=value")
    words = [sys.executable, "-m", "gr2", "stage", stage, "--profile", profile]
    if date != "all":
        words += ["--date", date]
    for item in settings:
        words += ["--set", item]
    return words


def stage_task(stage: Stage) -> Any:
    """A task that runs one stage; its failure carries the stage's last lines."""

    @task(task_id=stage.name, doc_md=f"`gr2 stage {stage.name}` reads {', '.join(stage.reads + stage.uses) or 'raw files'}.")
    def run_stage(params: dict[str, Any] | None = None, ds: str | None = None) -> str:
        chosen = params or {}
        date = ds if chosen["date"] == "run" else chosen["date"]
        words = command(stage.name, chosen["profile"], str(date), list(chosen["settings"]))
        process = subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines: list[str] = []
        for line in process.stdout or []:
            print(line, end="")
            lines = [*lines, line][-20:]
        if process.wait():
            raise AirflowException(f"stage {stage.name} ended with code {process.returncode}: {''.join(lines)}")
        return lines[-1].strip() if lines else ""

    return run_stage()


def chain_by_tables() -> None:
    """Declares a task for each stage, after those that write what it reads."""
    made_by: dict[str, Any] = {}
    for stage in STAGES:
        current = stage_task(stage)
        for upstream in {id(made_by[name]): made_by[name] for name in (*stage.reads, *stage.uses) if name in made_by}.values():
            upstream >> current
        made_by.update(dict.fromkeys((*stage.writes, *stage.makes), current))
