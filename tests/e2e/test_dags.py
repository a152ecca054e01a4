"""The DAGs: they parse light, have one task a stage in the tables' order, and refuse parameters that could escape."""

import copy
import datetime as dt
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import schemas
from gr2 import PROJECT, artifacts
from gr2.pipeline import flow
from tests.tables import put

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def airflow(tmp_path_factory):
    """Airflow's settings for a home of its own, put into this process before its first import."""
    from dags.local import settings

    home = tmp_path_factory.mktemp("airflow")
    os.environ.update({**settings(home), "AIRFLOW__CORE__UNIT_TEST_MODE": "False"})
    return home


@pytest.fixture(scope="module")
def dags(airflow):
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(dag_folder=str(PROJECT / "dags"))
    assert bag.import_errors == {}
    return bag.dags


@pytest.fixture(scope="module")
def nightly(dags):
    return dags["nightly"]


def test_there_are_three_dags(dags):
    assert set(dags) == {"nightly", "retrain", "backfill_rerank"}


@pytest.mark.parametrize(
    ("dag", "name", "more"), [("nightly", "night", {"logs_are_in", "drifted", "ask_for_retraining"}), ("retrain", "build", set())]
)
def test_one_task_a_stage_in_the_order_of_the_tables(dags, dag, name, more):
    stages = flow(name)
    assert set(dags[dag].task_ids) == {s.name for s in stages} | more
    for place, stage in enumerate(stages):
        upstream = dags[dag].get_task(stage.name).upstream_task_ids
        for other in stages[:place]:
            if set(other.writes) & set(stage.reads) or set(other.makes) & set(stage.uses):
                assert other.name in upstream, f"{stage.name} must wait for {other.name}"


def run_of(kind):
    """What a task is given of its run, with the type as Airflow gives it."""
    from airflow.sdk.api.datamodels._generated import DagRunType

    return SimpleNamespace(run_type=DagRunType(kind))


def test_a_backfill_of_nights_does_the_first_day_the_last_and_those_between(nightly):
    from airflow.serialization.serialized_objects import DagSerialization

    from dags.stages import day_of

    first, last = (dt.datetime(2026, 1, day, tzinfo=dt.UTC) for day in (20, 28))  # as `--from-date 2026-01-20 --to-date 2026-01-28`
    runs = list(DagSerialization.from_dict(DagSerialization.to_dict(nightly)).iter_dagrun_infos_between(first, last))
    days = [day_of({"date": "run"}, f"{run.logical_date:%Y-%m-%d}", of_day=True) for run in runs]
    assert days == [f"2026-01-{day}" for day in range(20, 29)]
    assert all(run.data_interval.end == run.logical_date + dt.timedelta(days=1) for run in runs), "no run starts before its day is over"


def test_a_scheduled_night_waits_for_the_last_logs_and_no_other_does(nightly):
    assert [task.task_id for task in nightly.roots] == ["logs_are_in"]
    ready, now = nightly.get_task("logs_are_in").python_callable, dt.datetime.now(dt.UTC)
    assert [ready(now - dt.timedelta(hours=hours), run_of("scheduled")) for hours in (1, 3)] == [False, True]
    assert ready(now, run_of("backfill"))
    assert ready(None, run_of("manual"))


def test_what_the_schedule_itself_starts_of_a_backfill_does_nothing(dags):
    days = dags["backfill_rerank"].get_task("days").python_callable
    own = {"first": "run", "last": "run"}
    assert days(own, "2026-01-05", run_of("scheduled")) == []
    assert days(own, "2026-01-05", run_of("backfill")) == ["2026-01-05"]


@pytest.fixture
def night_of_clicks(ctx, monkeypatch):
    """A log whose last day has other kinds of events than those before, under a root that stages are called with."""
    from dags import stages

    rows = []
    for day in range(1, 11):
        time = dt.datetime(2026, 1, day, 12, tzinfo=dt.UTC)
        for n in range(200):
            event = dict.fromkeys(schemas.get("events").names()) | {"event_id": f"{day}-{n}", "user_id": "u", "item_id": "i"}
            event |= {"kind": "click" if day == 10 or n % 2 else "purchase", "event_time": time, "event_date": time.date()}
            rows.append(event | {"day_known": True, "source_file": "f", "ingest_date": time.date(), "period": "2026"})
    put(ctx, "events", rows)
    for name in ("tokenizer", next(iter(ctx.cfg.scoring.live))):
        with artifacts.publish_folder(ctx.root, name, {}) as folder:
            (folder / "config.json").write_text("{}")
    own = stages.command
    monkeypatch.setattr(stages, "command", lambda *given: [*own(*given), "--set", f"paths.root={ctx.root}"])


def test_only_drift_of_a_real_night_asks_for_retraining(dags, night_of_clicks):
    from dags.stages import call

    assert {a.name for a in dags["nightly"].get_task("ask_for_retraining").outlets} == {"gr2://retrain/wanted"}
    assert [a.name for a in dags["retrain"].timetable.asset_condition.objects] == ["gr2://retrain/wanted"]
    drifted = dags["nightly"].get_task("drifted").python_callable
    said = call("drift", "demo", "2026-01-10", [])
    runs = {kind: run_of(kind) for kind in ("scheduled", "manual", "backfill")}
    assert [drifted(said, run) for run in runs.values()] == [True, True, False]
    assert not drifted("02:10:00 drift: 8 subjects measured, none beyond 0.25", runs["scheduled"])


@pytest.fixture
def called(airflow, monkeypatch):
    """The commands that tasks started, none of which ran."""
    from dags import stages

    words: list[list[str]] = []
    ended = SimpleNamespace(stdout=[], wait=lambda: 0)
    monkeypatch.setattr(stages.subprocess, "Popen", lambda command, **_: words.append(command[3:]) or ended)
    return words


def updates(*extras):
    """What a run that updates of `gr2://retrain/wanted` started is told of them."""
    from airflow.sdk.execution_time.context import TriggeringAssetEventsAccessor

    from dags.stages import WANTED

    return TriggeringAssetEventsAccessor.build(SimpleNamespace(asset=WANTED, source_aliases=[], extra=extra) for extra in extras)


def test_retraining_is_of_the_profile_and_settings_whose_night_asked_for_it(dags, called):
    from airflow.sdk.execution_time.context import OutletEventAccessors

    from dags.stages import WANTED

    told, own = OutletEventAccessors(), {"profile": "demo", "settings": []}
    ask, retrain = dags["nightly"].get_task("ask_for_retraining").python_callable, dags["retrain"].get_task("rl").python_callable
    ask({"profile": "production", "date": "run", "settings": ["rl.group=4"]}, told)
    retrain(own, None, updates(told[WANTED].extra))
    retrain(own, None, updates(told[WANTED].extra, {**told[WANTED].extra, "from_rest_api": True}))
    assert called == [["stage", "rl", "--profile", "production", "--set", "rl.group=4"]] * 2
    retrain(own, None, updates({"profile": "production"}))
    retrain({**own, "profile": "beauty"}, None, updates())
    retrain({**own, "profile": "beauty"}, None, updates({}))
    assert [words[3:] for words in called[2:]] == [["production"], ["beauty"], ["beauty"]]


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ([{"profile": "../demo"}], "does not match"), ([{"profile": ["demo"]}], "not of type"),
        ([{"settings": ["release.gate=false"]}], "does not match"), ([{"settings": "rl.group=4"}], "not of type"),
        ([{"profile": "production"}, {"profile": "beauty"}], "different runs"), ([{"profile": "production"}, {}], "different runs"),
    ],
)  # fmt: skip
def test_an_update_asks_for_one_thing_and_only_for_what_a_run_may_have(dags, called, extras, message):
    from airflow.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match=message):
        dags["retrain"].get_task("rl").python_callable({"profile": "demo", "settings": []}, None, updates(*extras))
    assert called == []


@pytest.mark.parametrize(("variable", "said"), [("production", "{'production'}"), ("", "{'demo'}"), ("../demo", "does not match")])
def test_runs_that_name_no_profile_are_of_the_variables(airflow, variable, said):
    code = "from dags import backfill_rerank, nightly, retrain; "
    code += "print({d().params['profile'] for d in (backfill_rerank.backfill_rerank, nightly.nightly, retrain.retrain)})"
    environment = {**os.environ, "GR2_PROFILE": variable}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, env=environment, check=False)
    assert said in done.stdout + done.stderr


def test_what_needs_a_gpu_waits_for_one(dags):
    pools = {t.task_id: t.pool for t in dags["retrain"].tasks}
    assert {pools[name] for name in ("rl", "sft", "rerank_scores", "reasoning_traces")} == {"gpu"}
    assert {pools[name] for name in ("events", "evidence", "report")} == {"default_pool"}


@pytest.mark.parametrize("module", ["nightly", "retrain", "backfill_rerank"])
def test_a_dag_parses_in_a_second_and_loads_neither_torch_nor_spark(airflow, module):
    heavy = "('torch', 'pyspark', 'vllm', 'deepspeed', 'great_expectations', 'duckdb')"
    code = f"import sys, time, airflow.sdk, airflow.exceptions; t = time.process_time(); import dags.{module}; "
    code += f"print(time.process_time() - t, [m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    seconds, found = done.stdout.strip().splitlines()[-1].split(" ", 1)
    assert found == "[]"
    assert float(seconds) < 1


def test_a_day_of_a_backfill_is_answered_by_the_model_that_the_run_names(dags, called):
    from gr2.config import load

    rerank = dags["backfill_rerank"].get_task("rerank").python_callable
    rerank("2026-01-05", {"profile": "demo", "settings": ["scoring.shuffles=2"], "model": "opd+rl", "mode": "think"})
    assert [words[1] for words in called] == ["candidates", "rerank_scores"]
    assert called[1][2:7] == ["--profile", "demo", "--date", "2026-01-05", "--set"]
    found = load("demo", called[1][7::2])
    assert (found.scoring.live, found.scoring.shuffles) == ({"opd+rl": ("think",)}, 2)
    assert load("demo", [*called[1][7::2], "scoring.splits=[valid]", "scoring.models={rl: [score]}"])


def test_days_of_a_backfill(airflow):
    from airflow.exceptions import AirflowFailException

    from dags.backfill_rerank import days_of

    assert days_of({"first": "run", "last": "run"}, "2026-01-05") == ["2026-01-05"]
    assert days_of({"first": "2026-02-27", "last": "2026-03-01"}, None) == ["2026-02-27", "2026-02-28", "2026-03-01"]
    for first, last, ds in (("run", "run", None), ("2026-03-02", "2026-03-01", None), ("2000-01-01", "2026-01-01", None)):
        with pytest.raises(AirflowFailException):
            days_of({"first": first, "last": last}, ds)


def test_a_failing_stage_says_why_and_what_is_hopeless_is_not_tried_again(airflow, monkeypatch):
    from airflow.exceptions import AirflowException, AirflowFailException

    from dags import stages

    with pytest.raises(AirflowFailException, match="no profile 'nowhere'"):
        stages.call("events", "nowhere", None, [])
    monkeypatch.setattr(stages, "command", lambda *_: [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(AirflowException, match="code -9") as caught:
        stages.call("events", "demo", None, [])
    assert not isinstance(caught.value, AirflowFailException), "a killed stage is tried again"


def test_a_local_airflow_runs_the_profile_and_takes_its_children_along(monkeypatch, tmp_path):
    from dags import local

    ended = []
    process = SimpleNamespace(pid=7, wait=lambda: ended.append("waited for"))
    monkeypatch.setattr(local.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(local.subprocess, "Popen", lambda *_, env, **__: ended.append(env["GR2_PROFILE"]) or process)
    monkeypatch.setattr(local.signal, "signal", lambda *_: None)
    monkeypatch.setattr(local.os, "killpg", lambda group, how: ended.append((group, how)))
    local.start(tmp_path, "beauty", 8080)
    assert ended == ["beauty", "waited for", (7, local.signal.SIGKILL)]


def test_a_failure_is_told_to_the_webhook_and_an_unreachable_one_hides_nothing(airflow, monkeypatch, caplog):
    import http.server
    import threading
    from types import SimpleNamespace

    from dags.stages import tell

    told = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = {
        "task_instance": SimpleNamespace(dag_id="nightly", run_id="r1", task_id="events"),
        "exception": ValueError("too many refused"),
    }
    monkeypatch.setenv("AIRFLOW_CONN_GR2_ALERTS", f"http://127.0.0.1:{server.server_port}/secret-token")
    tell(context)
    server.shutdown()
    server.server_close()
    tell(context)
    assert told == [{"text": "nightly r1: events failed: too many refused"}]
    assert "secret-token" not in caplog.text


@pytest.mark.parametrize(
    "setting",
    [
        "rl.b=$(rm -rf /)", "rl.b=b;c", "rl.b='b'", "nonsense", "rl.b=b c", "rl.b=`id`", "rl.group=4\n", "--profile=x", "profile=x",
        "paths.root=/", "data.path=/etc", "data.events.files=[/etc/*]", "models.student.base=/any/path", "embeddings.encoder=/any/path",
        "spark.master=spark://evil:7077", "spark.extra.spark.jars=/x.jar", "tracker=mlflow", "simulator=x", "rl=x", "drift.fail_at=99",
        "traces.teacher=openai", "traces.url=http://evil.example/v1", "traces.model=x", "release.gate=false", "evaluation.min_tau=-1",
        "tokenizer.min_uniqueness=0", "maintenance.keep_days=0", "scoring.live.tokenizer=[score]", "scoring.audit_replicas=1",
    ],
)  # fmt: skip
def test_settings_that_could_escape_are_refused(airflow, setting):
    from airflow.exceptions import AirflowFailException

    from dags.stages import command

    with pytest.raises(AirflowFailException, match="key=value"):
        command("events", "demo", "all", [setting])


@pytest.mark.parametrize(
    ("conf", "passes"),
    [
        ({}, True), ({"date": "2026-01-05", "profile": "beauty"}, True), ({"date": "{{ ds }}"}, False), ({"date": "../x"}, False),
        ({"profile": "demo; rm"}, False), ({"profile": "../demo"}, False), ({"settings": "rl.group=4"}, False),
        ({"settings": ["rl.group=b c"]}, False), ({"settings": ["release.gate=false"]}, False),
        ({"settings": ["seed=2", "rl.student.max_steps=4", "distill.source=opd+rl", "scoring.shuffles=2"]}, True),
    ],
)  # fmt: skip
def test_parameters_are_typed(nightly, conf, passes):
    from airflow.exceptions import ParamValidationError

    def check() -> dict:
        params = copy.deepcopy(nightly.params)
        params.update(conf)
        return params.validate()

    if passes:
        assert check()["profile"] == conf.get("profile", "demo")
    else:
        with pytest.raises(ParamValidationError):
            check()


def test_a_command_is_a_list_of_words(airflow):
    from dags.stages import command

    assert command("rl", "demo", "2026-01-05", ["rl.group=4"])[1:] == [
        "-m", "gr2", "stage", "rl", "--profile", "demo", "--date", "2026-01-05", "--set", "rl.group=4",
    ]  # fmt: skip


def test_a_planted_secret_is_nowhere_after_a_night_and_after_a_failure(airflow, tmp_path):
    """Neither in logs, tables, manifests and records under the root, nor in what Airflow keeps: its database holds the XComs."""
    root, secret = tmp_path / "root", "planted-8f3a1c"
    profile = PROJECT / "conf" / "test_secret.yaml"
    profile.write_text((PROJECT / "conf" / "demo.yaml").read_text().replace("{root: var/demo}", f"{{root: {root}}}"))
    environment = {
        **os.environ, "AIRFLOW_HOME": str(root / "airflow"), "GR2_TEACHER_KEY": secret, "AWS_SECRET_ACCESS_KEY": secret,
        "OPENLINEAGE_API_KEY": secret, "AIRFLOW_CONN_GR2_ALERTS": f"http://127.0.0.1:1/{secret}",
    }  # fmt: skip
    command = str(Path(sys.executable).parent / "airflow")
    given = json.dumps({"profile": "test_secret", "settings": ["simulator.users=40", "simulator.days=4"]})
    said = ""
    try:
        subprocess.run([command, "db", "migrate"], env=environment, capture_output=True, check=True)
        for day, fine in (("2026-01-02", True), ("2027-01-01", False)):
            words = [command, "tasks", "test", "nightly", "events", day, "--task-params", given]
            done = subprocess.run(words, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=400)
            said += done.stdout + done.stderr
            assert f"new_state={'success' if fine else 'failed'}" in done.stdout, said[-3000:]
    finally:
        profile.unlink()
    files = [path for path in root.rglob("*") if path.is_file()]
    assert {"airflow.db", "gr2.log"} <= {path.name for path in files}
    assert any(path.suffix == ".parquet" for path in files)
    assert secret not in said
    assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []
