"""The DAGs: they parse light, have one task a stage in the tables' order, and refuse parameters that could escape."""

import copy
import os
import subprocess
import sys

import pytest

from gr2 import PROJECT
from gr2.pipeline import STAGES

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def airflow(tmp_path_factory):
    """Airflow's settings for a home of its own, put into this process before its first import."""
    from dags.local import settings

    home = tmp_path_factory.mktemp("airflow")
    os.environ.update({**settings(home), "AIRFLOW__CORE__UNIT_TEST_MODE": "False"})
    return home


@pytest.fixture(scope="module")
def nightly(airflow):
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(dag_folder=str(PROJECT / "dags"))
    assert bag.import_errors == {}
    return bag.dags["nightly"]


def test_one_task_a_stage_in_the_order_of_the_tables(nightly):
    assert set(nightly.task_ids) == {s.name for s in STAGES}
    for stage in STAGES:
        upstream = nightly.get_task(stage.name).upstream_task_ids
        for other in STAGES:
            if set(other.writes) & set(stage.reads) or set(other.makes) & set(stage.uses):
                assert other.name in upstream, f"{stage.name} must wait for {other.name}"


def test_parsing_loads_neither_torch_nor_spark():
    heavy = "('torch', 'pyspark', 'vllm', 'deepspeed', 'great_expectations', 'duckdb')"
    code = f"import sys, dags.nightly; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    "setting", ["a.b=$(rm -rf /)", "a.b=b;c", "a.b='b'", "nonsense", "a.b=b c", "a.b=`id`", "--profile=x", "paths.root=/", "data.path=/etc"]
)
def test_settings_that_could_escape_are_refused(airflow, setting):
    from airflow.exceptions import AirflowException

    from dags.stages import command

    with pytest.raises(AirflowException, match="key=value"):
        command("events", "demo", "all", [setting])


@pytest.mark.parametrize(
    ("conf", "passes"),
    [
        ({}, True), ({"date": "2026-01-05", "profile": "beauty"}, True), ({"date": "{{ ds }}"}, False), ({"date": "../x"}, False),
        ({"profile": "demo; rm"}, False), ({"profile": "../demo"}, False), ({"settings": ["a=b c"]}, False), ({"settings": "a=b"}, False),
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
