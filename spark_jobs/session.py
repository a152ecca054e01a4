"""The Spark session that every job shares, and reading Delta tables through it."""

import contextlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, SparkSession

from gr2 import PROJECT
from gr2.config import Config
from gr2.context import Context
from gr2.environment import class_path, delta_jars, yarn_jars
from gr2.errors import EnvironmentProblem

LOGGING = PROJECT / "conf" / "log4j2.properties"
# The C1 compiler and the serial collector halve the start of small jobs. Without a larger code cache C1 has 48 MB, which twenty stages in
# one session fill: then the JVM compiles nothing more and interprets.
JVM = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:ReservedCodeCacheSize=256m"

JOINED = {"spark.driver.extraClassPath": ":", "spark.jars": ","}  # a profile adds to these; anything else it replaces


def get_session(cfg: Config, root: Path) -> SparkSession:
    """The session of this process, started if there is none. Raises EnvironmentProblem if the Delta jars are not there.

    `JVM` suits small jobs; a profile for heavy ones overrides it in spark.extra.
    """
    if not delta_jars():
        raise EnvironmentProblem("the Delta jars are missing: run `make setup`")
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable  # else workers take another Python
    local = root / "tmp"
    local.mkdir(parents=True, exist_ok=True)
    partitions = str(cfg.spark.shuffle_partitions)
    settings = {
        "spark.driver.extraClassPath": class_path(),
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.driver.memory": cfg.spark.driver_memory,
        "spark.local.dir": str(local),
        "spark.sql.warehouse.dir": str(local / "warehouse"),
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": partitions,
        "spark.default.parallelism": partitions,
        "spark.databricks.delta.snapshotPartitions": "2",
        "spark.sql.sources.parallelPartitionDiscovery.parallelism": "2",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        "spark.sql.codegen.cache.maxEntries": "2000",  # of 100, twenty stages in one session throw out each other's compiled code
        "spark.driver.extraJavaOptions": f"{JVM} -Dlog4j2.configurationFile={LOGGING.as_uri()}",
        **_places(cfg.spark.master),
    }
    for key, value in cfg.spark.extra.items():
        settings[key] = f"{settings[key]}{JOINED[key]}{value}" if key in JOINED and key in settings else value
    builder = SparkSession.builder.master(cfg.spark.master).appName("gr2")
    for key, value in settings.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def _places(master: str) -> dict[str, str]:
    """How the driver is reached, and where executors find the jars."""
    if master.startswith("local"):
        return {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}  # nobody else needs to reach it
    jars = {"spark.jars": ",".join(str(jar) for jar in delta_jars())}
    if master == "yarn" and "CONTAINER_ID" not in os.environ:  # in a container of YARN the submission has said it
        jars["spark.yarn.jars"] = yarn_jars()
    return jars


def read(ctx: Context, name: str, version: int | None = None) -> DataFrame:
    """A table as the lake reads it, or at another version. Raises MissingInputError naming the stage that builds it."""
    ctx.lake.open(name)
    version = ctx.lake.pins.get(name) if version is None else version
    reader = ctx.spark.read.format("delta")
    return (reader if version is None else reader.option("versionAsOf", version)).load(ctx.table_path(name))


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Results of jobs run side by side: while the driver plans one, the cores work for another. The first error passes through."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        return [running.result() for running in [threads.submit(job) for job in jobs]]


def values(frame: DataFrame, column: str) -> set[Any]:
    """The distinct values of a column, collected: a handful."""
    return {row[0] for row in frame.select(column).distinct().collect()}


def remove(ctx: Context, place: str) -> None:
    """Removes a folder with all that is in it, wherever Spark can write; what cannot be removed is left."""
    path = ctx.spark._jvm.org.apache.hadoop.fs.Path(place)
    with contextlib.suppress(Py4JJavaError):
        path.getFileSystem(ctx.spark._jsc.hadoopConfiguration()).delete(path, True)


def alter(ctx: Context, name: str, change: str) -> None:
    """ALTER TABLE of a table. `change` comes from a contract, never from input."""
    path = ctx.table_path(name).replace("`", "``")
    ctx.spark.sql(f"ALTER TABLE delta.`{path}` {change}")


def frame_of(ctx: Context, table: pa.Table) -> DataFrame:
    """An Arrow table as a Spark frame. In one piece: Spark silently drops the rows that follow an empty chunk."""
    return ctx.spark.createDataFrame(table.combine_chunks())
