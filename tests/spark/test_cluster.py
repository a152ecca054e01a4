"""A real standalone cluster, one master and two workers on this machine, gives the tables that local mode gives."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyspark
import pytest
from event_world import event_table
from test_interactions import random_log
from test_nights import contents, root

from gr2 import PROJECT
from spark_jobs import evidence, interactions
from spark_jobs.publish import publish
from spark_jobs.session import frame_of

pytestmark = pytest.mark.spark
SPARK = "{spark.driver.host: 127.0.0.1, spark.driver.bindAddress: 127.0.0.1, spark.executor.memory: 512m}"
SPARK_CLASS = Path(pyspark.__file__).parent / "bin" / "spark-class"


@pytest.fixture
def cluster(tmp_path, free_port) -> Iterator[tuple[str, str]]:
    """(master URL, address of the master's page); all three processes end with the test."""
    port, page = free_port(), free_port()
    master, package = f"spark://127.0.0.1:{port}", "org.apache.spark.deploy"
    environment = {**os.environ, "SPARK_LOG_DIR": str(tmp_path), "SPARK_DAEMON_MEMORY": "256m"}
    words = [[f"{package}.master.Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", str(page)]]
    script = tmp_path / "gpus.sh"  # one pretended GPU a worker, each with an address of its own
    script.write_text('#!/bin/sh\necho "{\\"name\\": \\"gpu\\", \\"addresses\\": [\\"$GPU\\"]}"\n')
    script.chmod(0o755)
    environment["SPARK_WORKER_OPTS"] = f"-Dspark.worker.resource.gpu.amount=1 -Dspark.worker.resource.gpu.discoveryScript={script}"
    for number in (1, 2):  # of two hosts, as far as Spark can tell: a second attempt at a task goes to another host
        words.append(
            [f"{package}.worker.Worker", master, "--host", f"127.0.0.{number}", "--cores", "1", "--memory", "1g", "--webui-port", "0"]
        )
        words[-1] += ["--work-dir", str(tmp_path / f"worker{number}")]
    logs = [(tmp_path / f"{n}.log").open("w") for n in range(3)]
    started = [
        subprocess.Popen([str(SPARK_CLASS), *w], env={**environment, "GPU": str(n + 4)}, stdout=log, stderr=log)
        for n, (w, log) in enumerate(zip(words, logs, strict=True))
    ]
    try:
        for _ in range(120):
            if workers(page) == 2:
                break
            time.sleep(0.5)
        assert workers(page) == 2, (tmp_path / "0.log").read_text()[-2000:]
        yield master, f"http://127.0.0.1:{page}"
    finally:
        for process in started:
            process.kill()
            process.wait()
        for log in logs:
            log.close()


def workers(page: int) -> int:
    """Workers that the master counts as alive."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{page}/json/", timeout=2) as answer:
            return int(json.load(answer)["aliveworkers"])
    except (OSError, ValueError):  # not there yet, or there and not yet with the page as JSON
        return 0


def test_interactions_to_evidence_on_a_cluster_equal_local_mode(cluster, tmp_path):
    master, page = cluster
    local = root(tmp_path, "local")
    publish(local, "events", frame_of(local, event_table(random_log(7, users=40), period="2026")))
    shutil.copytree(local.root, tmp_path / "cluster")
    interactions.run(local.cfg, local)
    evidence.run(local.cfg, local)
    settings = ["data.max_history=4", "evidence.window=3", f"spark.master={master}", f"spark.extra={SPARK}"]
    overrides = [part for item in (f"paths.root={tmp_path / 'cluster'}", *settings) for part in ("--set", item)]
    words = [sys.executable, "-m", "gr2", "run", "--from", "interactions", "--to", "evidence", "--profile", "demo", *overrides]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(root(tmp_path, "cluster")) == contents(local)
    with urllib.request.urlopen(f"{page}/json/", timeout=5) as answer:
        finished = json.load(answer)["completedapps"]
    assert len(finished) == 1, "the stages ran on the cluster, in one session"
    executors = {p.name for n in (1, 2) for p in (tmp_path / f"worker{n}").glob("app-*/*") if re.fullmatch(r"\d+", p.name)}
    assert len(executors) >= 2, "on both workers"


def test_engine_jobs_get_a_gpu_each_and_a_second_attempt_writes_nothing_twice(cluster, tmp_path):
    words = [sys.executable, str(Path(__file__).with_name("cluster_chunks.py")), str(tmp_path / "root"), cluster[0]]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(words, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["key"] for row in rows] == list(range(32)), "every row once"
    assert {row["gpu"] for row in rows} == {"5", "6"}, "each task sees the GPU that Spark gave it, and no other"
    attempts = (tmp_path / "root" / "attempts").read_text().split()
    assert attempts.count("0") == 2, "the slow task was tried a second time, elsewhere"
