"""On an S3 of this machine (moto's server): tables by URL, written by Spark, read with and without a JVM."""

import os
import subprocess
import sys
from collections.abc import Iterator

import boto3
import pytest
from botocore.config import Config
from test_nights import contents

from gr2 import PROJECT
from gr2.config import load
from gr2.context import Context
from gr2.environment import CACHE
from spark_jobs.jars import retrieve

pytestmark = pytest.mark.spark
JARS, SDK = CACHE / "s3", "2.57.8"
# The SDK's parts that S3A uses, a thirtieth of the bundle. What Spark has itself (Netty, HttpClient 4) must not come twice.
PARTS = """annotations apache-client arns auth aws-core aws-query-protocol aws-xml-protocol checksums checksums-spi crt-core endpoints-spi
    eventstream http-auth http-auth-aws http-auth-aws-eventstream http-auth-spi http-client-spi identity-spi json-utils
    metrics-spi netty-nio-client profiles protocol-core regions retries retries-spi s3 s3-transfer-manager sdk-core sts
    third-party-jackson-core utils utils-lite"""
S3A = (
    ("org.apache.hadoop", "hadoop-aws", "3.5.0"),
    ("software.amazon.s3.analyticsaccelerator", "analyticsaccelerator-s3", "1.3.1"),
    ("org.reactivestreams", "reactive-streams", "1.0.4"),
    *(("software.amazon.awssdk", part, SDK) for part in PARTS.split()),
)

TABLES = ("events", "quarantine", "items", "interactions", "histories", "impressions", "pair_days", "item_pairs", "item_stats")


@pytest.fixture(scope="module")
def store(free_port) -> Iterator[str]:
    """URL of the store, which holds the bucket `lake`; credentials are in the environment, where every reader looks for them."""
    if len(list(JARS.glob("*.jar"))) < len(S3A):
        retrieve(S3A, JARS)
    port = free_port()
    # A process of its own: delta-rs waits for it without letting other threads of this one run.
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ALLOW_HTTP": "true",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        retries = Config(retries={"total_max_attempts": 20, "mode": "standard"})  # it takes a second to listen
        boto3.client("s3", region_name="us-east-1", config=retries).create_bucket(Bucket="lake")
        yield os.environ["AWS_ENDPOINT_URL"]
    server.terminate()
    server.wait(30)


def run(settings: list[str]) -> None:
    """`gr2 run` from raw logs to evidence, on a small market."""
    words = [
        word
        for setting in (*settings, "simulator.users=60", "simulator.days=12", "spark.driver_memory=700m")
        for word in ("--set", setting)
    ]
    command = [sys.executable, "-m", "gr2", "run", "--profile", "demo", "--to", "evidence", *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def test_tables_on_s3_equal_those_in_a_folder(store, tmp_path):
    s3a = {"endpoint": store, "endpoint.region": "us-east-1", "path.style.access": "true"}
    extra = [f"spark.driver.extraClassPath: '{JARS}/*'", *(f"spark.hadoop.fs.s3a.{key}: '{value}'" for key, value in s3a.items())]
    there, here = [f"paths.root={tmp_path / 'there'}", "paths.lake=s3a://lake/gr2"], [f"paths.root={tmp_path / 'here'}"]
    run([*there, f"spark.extra={{{', '.join(extra)}}}"])
    run(here)
    made, expected = Context(load("demo", there)), Context(load("demo", here))
    assert contents(made, TABLES) == contents(expected, TABLES)
    assert all(contents(made, TABLES).values()), "each has rows, read without a JVM"
    assert not (tmp_path / "there" / "tables").exists()
