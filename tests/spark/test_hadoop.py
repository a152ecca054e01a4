"""On a real HDFS and a real YARN of this machine: tables by URL, and stages whose executors, or whose driver, YARN places."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from event_world import event_table
from pyspark import SparkConf
from pyspark.java_gateway import launch_gateway
from test_interactions import random_log
from test_nights import SETTINGS, contents, root

from gr2 import PROJECT
from gr2.config import load
from gr2.context import Context
from gr2.environment import CACHE
from spark_jobs import evidence, interactions
from spark_jobs.jars import retrieve
from spark_jobs.publish import publish
from spark_jobs.session import frame_of

pytestmark = pytest.mark.spark
JARS = CACHE / "hadoop"
HADOOP = (
    ("org.apache.hadoop", "hadoop-client-minicluster", "3.5.0"),
    ("org.junit.jupiter", "junit-jupiter-api", "5.11.4"),  # the mini cluster asserts with it
    ("org.opentest4j", "opentest4j", "1.3.0"),
    ("org.junit.platform", "junit-platform-commons", "1.11.4"),
    ("org.bouncycastle", "bcpkix-jdk18on", "1.79"),  # the resource manager signs with it
    ("org.bouncycastle", "bcprov-jdk18on", "1.79"),
    ("org.bouncycastle", "bcutil-jdk18on", "1.79"),
)
PLACED = ("interactions", "histories")
YARN = "{spark.executor.memory: 512m, spark.executor.instances: '1', spark.yarn.am.memory: 512m}"
LIMITS = {
    "yarn.nodemanager.vmem-check-enabled": "false",
    "yarn.nodemanager.disk-health-checker.max-disk-utilization-per-disk-percentage": "100",
    "yarn.scheduler.minimum-allocation-mb": "256",
    "yarn.resourcemanager.scheduler.class": "org.apache.hadoop.yarn.server.resourcemanager.scheduler.fifo.FifoScheduler",
}


@pytest.fixture(scope="module")
def hadoop(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """(URL of HDFS, folder with its clients' configuration): name, data, resource and node managers in one JVM of their own."""
    home = tmp_path_factory.mktemp("hadoop")
    if len(list(JARS.glob("*.jar"))) < len(HADOOP):
        retrieve(HADOOP, JARS)
    own = {"spark.driver.extraClassPath": f"{JARS}/*", "spark.driver.memory": "700m"}
    gateway = launch_gateway(SparkConf(loadDefaults=False).setAll(list(own.items())))
    try:
        gateway.jvm.java.lang.System.setProperty("test.build.data", str(home))  # else both write to the folder that this runs in
        java = gateway.jvm.org.apache.hadoop
        conf = java.yarn.conf.YarnConfiguration()
        for name, value in LIMITS.items():
            conf.set(name, value)
        files = java.hdfs.MiniDFSCluster.Builder(conf).numDataNodes(1).build()
        files.waitActive()
        nodes = java.yarn.server.MiniYARNCluster("gr2", 1, 1, 1)
        nodes.init(conf)
        nodes.start()
        assert nodes.waitForNodeManagersToConnect(30_000)
        clients = java.conf.Configuration(nodes.getConfig())
        clients.unset("net.topology.node.switch.mapping.impl")  # a class of the mini cluster's own
        for name in ("core-site.xml", "yarn-site.xml"):  # the second since YARN's defaults are read after the first
            stream = gateway.jvm.java.io.FileOutputStream(str(home / name))
            clients.writeXml(stream)
            stream.close()
        yield str(files.getFileSystem().getUri()), home
    finally:
        gateway.shutdown()
        gateway.proc.stdin.close()  # the JVM ends with its parent's end of the pipe
        gateway.proc.wait(60)


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Context:
    """What local mode makes, in a folder."""
    ctx = root(tmp_path_factory.mktemp("local"), "local")
    publish(ctx, "events", frame_of(ctx, event_table(random_log(7, users=40), period="2026")))
    interactions.run(ctx.cfg, ctx)
    evidence.run(ctx.cfg, ctx)
    return ctx


def test_tables_on_hdfs_equal_those_in_a_folder(hadoop, local, tmp_path):
    url, _ = hadoop
    there = Context(load("demo", [f"paths.root={tmp_path}", f"paths.lake={url}/gr2/local", *SETTINGS]))
    publish(there, "events", local.spark.read.format("delta").load(local.table_path("events")))
    interactions.run(there.cfg, there)
    evidence.run(there.cfg, there)
    assert contents(there) == contents(local)
    assert there.lake.read("interactions").num_rows == local.lake.read("interactions").num_rows, "without a JVM, too"
    assert not (tmp_path / "tables").exists()
    assert not (tmp_path / "staging").exists()


def test_a_stage_whose_executors_yarn_places(hadoop, local, tmp_path):
    url, home = hadoop
    settings = [f"paths.root={tmp_path}", f"paths.lake={url}/gr2/yarn", *SETTINGS]
    there = Context(load("demo", settings))
    publish(there, "events", local.spark.read.format("delta").load(local.table_path("events")))
    words = [word for item in (*settings, "spark.master=yarn", f"spark.extra={YARN}") for word in ("--set", item)]
    done = subprocess.run(
        [sys.executable, "-m", "gr2", "stage", "interactions", "--profile", "demo", *words],
        cwd=PROJECT, env={**os.environ, "HADOOP_CONF_DIR": str(home)}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(there, PLACED) == contents(local, PLACED)


@pytest.fixture
def profile(hadoop, tmp_path) -> Iterator[str]:
    """A profile of this cluster, in the only folder where the DAGs look for one."""
    path = PROJECT / "conf" / "test_on_yarn.yaml"
    path.write_text(
        f"paths: {{root: {tmp_path}, lake: {hadoop[0]}/gr2/submitted}}\n"
        "data: {source: jsonl, path: /nowhere, max_history: 4}\nevidence: {window: 3}\n"
        f"spark: {{master: yarn, driver_memory: 700m, extra: {YARN}}}\n"
    )
    yield path.stem
    path.unlink()


def test_airflow_submits_a_stage_whose_driver_yarn_places(hadoop, local, profile, tmp_path):
    from dags.local import settings

    url, home = hadoop
    there = Context(load("demo", [f"paths.root={tmp_path}", f"paths.lake={url}/gr2/submitted"]))
    publish(there, "events", local.spark.read.format("delta").load(local.table_path("events")))
    manager = (home / "yarn-site.xml").read_text().split("<name>yarn.resourcemanager.webapp.address</name><value>")[1].split("<")[0]
    connection = {"conn_type": "spark", "host": "yarn", "extra": {"yarn_resourcemanager_webapp_address": f"http://{manager}"}}
    environment = {
        **os.environ, **settings(tmp_path), "HADOOP_CONF_DIR": str(home), "GR2_SPARK_CONN": "hadoop",
        "AIRFLOW_CONN_HADOOP": json.dumps(connection), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    airflow = str(Path(sys.executable).parent / "airflow")
    subprocess.run([airflow, "db", "migrate"], env=environment, capture_output=True, check=True)
    given = json.dumps({"profile": profile, "settings": []})
    words = [airflow, "tasks", "test", "retrain", "interactions", "--task-params", given]
    done = subprocess.run(words, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert contents(there, PLACED) == contents(local, PLACED)
