"""Where there is a cluster: Spark stages whose driver runs on it too, and whose task finds the application again after a crash.

The operator's environment names an Airflow connection of type `spark` (GR2_SPARK_CONN). Then each stage of `spark_jobs` is submitted in
cluster mode (YARN or Kubernetes; Spark has no such mode for Python on a standalone master) under the id that Airflow keeps for the
task: a worker that dies loses nothing, since the retry waits for the application that is under way, and starts none beside it. On YARN the
connection's extra names the resource manager, `{"yarn_resourcemanager_webapp_address": "http://rm:8088"}`.

Every node needs this project's environment and the profile's root under the same paths. Trainers stay on the worker and its GPUs.
"""

import sys
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk.bases.hook import BaseHook

from dags.stages import chosen, command, day_of, tell
from gr2 import PROJECT
from gr2.config import load
from gr2.environment import class_path, yarn_jars
from gr2.pipeline import Stage


class StageSubmit(SparkSubmitOperator):
    """`gr2 stage NAME` as a Spark application. Parameters are checked as they are for a process of the worker."""

    def __init__(self, *, stage: Stage, of_day: bool, conn_id: str, **rest: Any) -> None:
        super().__init__(task_id=stage.name, conn_id=conn_id, name=f"gr2-{stage.name}", deploy_mode="cluster", yarn_track_via_rm_api=True,
                         application=str(PROJECT / "gr2" / "__main__.py"), on_failure_callback=tell, **rest)  # fmt: skip
        self.stage, self.of_day, self.conn = stage, of_day, conn_id

    def execute(self, context: Any) -> None:
        """Submits the stage, or finds what an earlier try submitted, and waits for its end."""
        run = chosen(dict(context["params"]), context.get("triggering_asset_events"))
        words = command(self.stage.name, run["profile"], day_of(run, context.get("ds"), self.of_day), list(run["settings"]))
        self.application_args = words[words.index("stage") :]
        self.conf = driver_settings(run["profile"], list(run["settings"]))
        self._track_driver_via_k8s_api = "k8s" in (BaseHook.get_connection(self.conn).host or "")
        super().execute(context)


def driver_settings(profile: str, settings: list[str]) -> dict[str, str]:
    """What a driver must know before its JVM starts; the rest the stage's session says itself."""
    cfg = load(profile, settings)
    return {
        "spark.driver.memory": cfg.spark.driver_memory,
        "spark.driver.extraClassPath": class_path(),
        "spark.pyspark.python": sys.executable,
        "spark.pyspark.driver.python": sys.executable,
        "spark.yarn.appMasterEnv.PYSPARK_PYTHON": sys.executable,
        "spark.yarn.jars": yarn_jars(),
        **cfg.spark.extra,
    }
