"""Runs one stage and dies by SIGKILL at a named point of publishing a table: `python killed.py ROOT STAGE TABLE POINT SETTING...`."""

import importlib
import os
import signal
import sys
from pathlib import Path

from gr2.environment import set_defaults

set_defaults()

from gr2 import pipeline  # noqa: E402
from gr2.config import load  # noqa: E402
from gr2.context import Context  # noqa: E402

if __name__ == "__main__":
    root, stage, table, point, *settings = sys.argv[1:]
    publishing = importlib.import_module("spark_jobs.publish")

    def reached(at: str, name: str) -> None:
        if (at, name) == (point, table):
            os.kill(os.getpid(), signal.SIGKILL)

    publishing.reached = reached
    cfg = load("demo", [f"paths.root={Path(root)}", *settings])
    importlib.import_module(pipeline.get(stage).module).run(cfg, Context(cfg))
    sys.exit(f"{table} was not published to point {point}")
