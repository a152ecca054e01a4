"""Tasks for the DAGs: each calls one `gr2 stage` in a process of its own. Nothing heavy is imported here or in a worker.

The profile of a run that names none, as the schedule's do, is that of the variable GR2_PROFILE, else demo.
"""

import copy
import datetime as dt
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from airflow.exceptions import AirflowException, AirflowFailException, ParamValidationError
from airflow.sdk import Asset, Param, task

from gr2 import PROJECT
from gr2.errors import AuditError, ConfigError, InputError, MissingInputError, ModelError
from gr2.pipeline import Stage, flow

# What a run may set: what is made and taught. Where things lie, which machines and services are asked, and what must hold before a
# release is promoted (audits, gates, the models that pass them) the operator says in the profile
SECTIONS = ("simulator", "evidence", "midtrain", "sasrec", "candidates", "prompt", "sft", "rl", "opd", "latents", "distill")
SCORING = ("replicas", "shuffles", "miss_sample", "structured")
KEY = rf"(seed|({'|'.join(SECTIONS)})(\.[a-z0-9_+-]+)+|scoring\.({'|'.join(SCORING)}))"
VALUE = r"[^\s'\"`$;|&<>{}]*"  # an alphabet that no shell or template reads
SETTING = f"^{KEY}={VALUE}$"
DAY = r"\d{4}-\d{2}-\d{2}"
PROFILE = Param(
    os.environ.get("GR2_PROFILE") or "demo",
    type="string",
    pattern="^[a-z0-9_]{1,40}$",
    description="A profile: a file in conf/. By default that of the variable GR2_PROFILE, else demo.",
)
SETTINGS = Param(
    [],
    type="array",
    items={"type": "string", "pattern": SETTING, "maxLength": 200},
    maxItems=20,
    description=f"As --set, key=value: the seed, keys of {', '.join(SECTIONS)}, and of scoring {', '.join(SCORING)}.",
)
DEFAULTS = {"retries": 2, "retry_delay": dt.timedelta(minutes=1), "retry_exponential_backoff": True}
CLUSTER = os.environ.get("GR2_SPARK_CONN", "")  # a Spark connection: then Spark stages are submitted to it (`submit.py`)
GPU_POOL = "gpu"  # one slot a GPU (or one, where there is none): `gr2 airflow` makes it
LISTS = Asset("gr2://nightly/lists")  # a night's re-scored lists
WANTED = Asset("gr2://retrain/wanted")  # drift, or a person, asks for new models
RELEASE = Asset("gr2://release")  # new models were promoted
HOPELESS = {e.exit_code: e.__name__ for e in (ConfigError, InputError, AuditError, MissingInputError, ModelError)}  # again gives the same


def command(stage: str, profile: str, date: str | None, settings: list[str], own: Iterable[str] = ()) -> list[str]:
    """Arguments of one `gr2 stage` call, never a shell line; `own` is what the DAG itself sets, beside the run's settings.

    Values are checked again: a run's configuration is user input. Raises AirflowFailException for what a run may not set.
    """
    for item in settings:
        if not re.fullmatch(SETTING, item):
            raise AirflowFailException(f"settings: {item!r} is not key=value, or nothing that a run may set; a profile may")
    for item in own:
        if not re.fullmatch(rf"[a-z0-9_.+-]+={VALUE}", item):
            raise AirflowFailException(f"{item!r} is not key=value")
    words = [sys.executable, "-m", "gr2", "stage", stage, "--profile", profile]
    if date:
        words += ["--date", date]
    for item in (*settings, *own):
        words += ["--set", item]
    return words


def call(stage: str, profile: str, date: str | None, settings: list[str], own: Iterable[str] = ()) -> str:
    """Runs one stage to its end, its log into the task's; returns what the stage said of itself in its last lines.

    Raises AirflowFailException with the stage's reason where trying again would end alike, AirflowException where it may not.
    """
    words = command(stage, profile, date, settings, own)
    process = subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    for line in process.stdout or []:
        print(line, end="")
        lines = [*lines, line.strip()][-20:]
    code = process.wait()
    reason = next((line for line in reversed(lines) if re.match(r"\w+(Error|Problem|Failed|Overtaken): ", line)), "; ".join(lines[-3:]))
    if code in HOPELESS:
        raise AirflowFailException(f"stage {stage}: {reason}")
    if code:
        raise AirflowException(f"stage {stage} ended with code {code}: {reason}")
    return "\n".join(line for line in lines if re.match(rf"[\d:]{{8}} {stage}: ", line))  # the very last one only counts rows


def tell(context: Any) -> None:
    """Failure callback: one line with the reason, to the log and to the webhook of AIRFLOW_CONN_GR2_ALERTS, if there is one."""
    instance, reason = context["task_instance"], context.get("exception")
    line = f"{instance.dag_id} {instance.run_id}: {instance.task_id} failed: {reason}"
    logging.getLogger("gr2").error(line)
    if url := os.environ.get("AIRFLOW_CONN_GR2_ALERTS"):
        import json
        import urllib.request

        request = urllib.request.Request(url, json.dumps({"text": line}).encode(), {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except OSError as error:  # an alert that cannot be sent must not hide what it was about
            logging.getLogger("gr2").warning("the alert could not be sent: %s", type(error).__name__)


def type_of(dag_run: object) -> str:
    """How a run came about: scheduled, manual, backfill, asset_triggered. Airflow gives an enumeration, whose `str` is not its value."""
    kind = getattr(dag_run, "run_type", "")
    return str(getattr(kind, "value", kind))


def chosen(params: dict[str, Any], events: Mapping[Any, Any] | None) -> dict[str, Any]:
    """What a run works with: its parameters, or, if updates of an asset started it, the profile and settings that these name.

    Raises AirflowFailException for what no parameter may be, and where the updates differ: a run does one of them, and none is dropped.
    """
    asked = []
    for event in (event for of_asset in (events or {}).values() for event in of_asset):
        named = {name: param for name, param in (("profile", PROFILE), ("settings", SETTINGS)) if name in event.extra}
        try:
            asked.append({**params, **{name: copy.copy(param).resolve(event.extra[name]) for name, param in named.items()}})
        except ParamValidationError as error:
            raise AirflowFailException(f"an update asks for what no run may have: {str(error).splitlines()[0]}") from None
    if other := [run for run in asked if run != asked[0]]:
        raise AirflowFailException(f"the updates ask for different runs, {asked[0]} and {other[0]}: trigger each")
    return asked[0] if asked else params


def day_of(params: dict[str, Any], ds: str | None, of_day: bool) -> str | None:
    """The day that a run processes; none for a run of no day. Raises AirflowFailException where one is needed and not said."""
    date = None if not of_day else ds if params["date"] == "run" else params["date"]
    if of_day and not date:
        raise AirflowFailException("this run has no logical date: say the day, {'date': 'YYYY-MM-DD'}")
    return date


def stage_task(stage: Stage, of_day: bool, outlets: list[Asset] | None = None) -> Any:
    """A task that runs one stage for the run's profile (and its day)."""
    pool = GPU_POOL if stage.gpu else "default_pool"
    if CLUSTER and not stage.trains and stage.name != "drift":  # what drift found is read from what it said
        from dags.submit import StageSubmit

        return StageSubmit(stage=stage, of_day=of_day, conn_id=CLUSTER, pool=pool, outlets=outlets or [])

    @task(
        task_id=stage.name,
        doc_md=f"`gr2 stage {stage.name}` reads {', '.join(stage.reads + stage.uses) or 'raw files'}.",
        pool=pool,
        outlets=outlets or [],
        on_failure_callback=tell,
    )
    def run_stage(params: dict[str, Any] | None = None, ds: str | None = None, triggering_asset_events: Any = None) -> str:
        run = chosen(params or {}, triggering_asset_events)
        return call(stage.name, run["profile"], day_of(run, ds, of_day), list(run["settings"]))

    return run_stage()


def chain_by_tables(name: str, outlets: dict[str, list[Asset]] | None = None) -> dict[str, Any]:
    """Declares a task for each stage of a flow, after those that write what it reads."""
    made_by: dict[str, list[Any]] = {}
    tasks = {}
    for stage in flow(name):
        current = tasks[stage.name] = stage_task(stage, name == "night", (outlets or {}).get(stage.name))
        for upstream in {id(t): t for table in (*stage.reads, *stage.uses) for t in made_by.get(table, [])}.values():
            upstream >> current
        for table in (*stage.writes, *stage.makes):
            made_by.setdefault(table, []).append(current)
    return tasks
