"""Answers 32 rows on a cluster whose workers have a GPU each; the first attempt at the first chunk waits until a second one has ended.

`python cluster_chunks.py ROOT MASTER` prints the rows as JSON.
"""

import json
import os
import sys
import time
from pathlib import Path

from gr2.environment import set_defaults

set_defaults()

import pyarrow as pa  # noqa: E402

from gr2.config import load  # noqa: E402
from gr2.context import Context  # noqa: E402
from spark_jobs.engine_pool import answered  # noqa: E402

SCHEMA = pa.schema([("key", pa.int64()), ("gpu", pa.string())])
EXTRA = {
    "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1", "spark.executor.memory": "512m",
    "spark.executor.resource.gpu.amount": "1", "spark.task.resource.gpu.amount": "1",
    "spark.speculation": "true", "spark.speculation.interval": "100ms", "spark.speculation.quantile": "0.5",
}  # fmt: skip

if __name__ == "__main__":
    root = Path(sys.argv[1])
    said = ", ".join(f"{key}: '{value}'" for key, value in EXTRA.items())
    ctx = Context(
        load(
            "demo", [f"paths.root={root}", "scoring.chunk=8", "scoring.workers=2", f"spark.master={sys.argv[2]}", f"spark.extra={{{said}}}"]
        )
    )
    root.mkdir(parents=True, exist_ok=True)
    first, second, attempts = root / "first", root / "second", root / "attempts"

    def job(_):
        def answer(chunk):
            with attempts.open("a") as file:
                file.write(f"{chunk[0]['key']}\n")
            made = [{"key": row["key"], "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", "")} for row in chunk]
            if chunk[0]["key"] == 0:
                try:
                    first.touch(exist_ok=False)
                except FileExistsError:
                    second.touch()
                for _ in range(600):
                    if second.exists():
                        break
                    time.sleep(0.1)
            return made

        return answer

    asked = pa.table({"key": pa.array(range(32), pa.int64())})
    with answered(ctx, "cluster", asked, job, SCHEMA) as frame:
        print(json.dumps([row.asDict() for row in frame.orderBy("key").collect()]))
