"""Answers 80 rows in chunks of 8 on two workers; `python killed_chunks.py ROOT N` dies by SIGKILL, driver and workers, in chunk N + 1."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from gr2.environment import set_defaults

set_defaults()

import pyarrow as pa  # noqa: E402

from gr2.config import load  # noqa: E402
from gr2.context import Context  # noqa: E402
from spark_jobs.engine_pool import Rows, answered  # noqa: E402

SCHEMA = pa.schema([("key", pa.int64()), ("square", pa.int64())])
ROWS, CHUNK = 80, 8


def asked() -> pa.Table:
    """The rows."""
    return pa.table({"key": pa.array(range(ROWS), pa.int64())})


def job_of(log: Path, group: int, deadly: int) -> Callable[[Rows], Callable[[Rows], Rows]]:
    """Squares, telling `log` of each chunk that it begins; both process groups die where `deadly` were begun before."""

    def answer(chunk: Rows) -> Rows:
        if 0 < deadly <= len(log.read_text().split()):
            os.killpg(group, signal.SIGKILL)
            os.killpg(0, signal.SIGKILL)  # Spark's Python workers are a group of their own, and would go on for a moment
        with log.open("a") as file:
            file.write(f"{chunk[0]['key']}\n")
        return [{"key": row["key"], "square": row["key"] ** 2} for row in chunk]

    return lambda _: answer


def context(root: str, *settings: str) -> Context:
    """Small chunks, two workers."""
    return Context(load("demo", [f"paths.root={root}", f"scoring.chunk={CHUNK}", "scoring.workers=2", *settings]))


if __name__ == "__main__":
    ctx = context(sys.argv[1])
    log = Path(sys.argv[1]) / "begun"
    log.touch()
    with answered(ctx, "squares", asked(), job_of(log, os.getpgrp(), int(sys.argv[2])), SCHEMA):
        sys.exit("nobody died")
