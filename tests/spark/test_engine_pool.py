"""Answers are kept chunk by chunk: killed anywhere, nothing is lost but the chunks under way, and nothing comes twice."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from killed_chunks import CHUNK, ROWS, SCHEMA, asked, context, job_of

from gr2 import PROJECT
from gr2.errors import EngineError
from spark_jobs.engine_pool import answered

pytestmark = pytest.mark.spark


def begun(root: Path) -> Counter[int]:
    """How often each chunk was begun."""
    return Counter(int(line) // CHUNK for line in (root / "begun").read_text().split())


def test_an_engine_has_all_cores_of_its_machine(tmp_path):
    ctx = context(str(tmp_path))

    def ranks(batches):
        import lightgbm  # noqa: F401 - its OpenMP, which is torch's too, reads the variable that Spark set: one thread

        yield from batches

    ctx.spark.range(1000, numPartitions=4).mapInArrow(ranks, "id long").collect()

    def threads(_):
        import torch

        return lambda chunk: [{"key": row["key"], "square": torch.get_num_threads()} for row in chunk]

    with answered(ctx, "squares", asked(), threads, SCHEMA) as frame:
        assert {row.square for row in frame.collect()} == {len(os.sched_getaffinity(0))}, "Spark gives its Python workers one"


@pytest.mark.parametrize("deadly", [1, 5])
def test_a_killed_job_asks_again_only_what_was_under_way(tmp_path, deadly):
    words = [sys.executable, str(Path(__file__).with_name("killed_chunks.py")), str(tmp_path), str(deadly)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), str(Path(__file__).parent)])}
    # setsid: the driver leads a group of its own, in which its JVM and workers are
    done = subprocess.run(words, cwd=PROJECT, env=environment, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == -9, done.stderr[-2000:]
    ctx = context(str(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in ctx.work("squares").glob("*.parquet")}
    assert deadly - 2 <= len(before) < ROWS // CHUNK, "what had been answered is there"
    other = ctx.work("squares") / "of-another-night.parquet"
    other.touch()
    for name in before:
        (ctx.work("squares") / f".{name}-half").touch()  # of a worker that was killed while it wrote
    with answered(ctx, "squares", asked(), job_of(tmp_path / "begun", 0, 0), SCHEMA) as frame:
        assert sorted(map(tuple, frame.collect())) == [(key, key**2) for key in range(ROWS)]
        assert before.items() <= {path.name: path.stat().st_mtime_ns for path in ctx.work("squares").glob("*.parquet")}.items()
    assert sum(begun(tmp_path).values()) <= ROWS // CHUNK + 2, "each of two workers repeats one chunk at most"
    assert list(ctx.work("squares").iterdir()) == [other], "what is published is not kept, and nobody else's is touched"


def test_an_error_of_a_worker_comes_as_itself_and_other_questions_are_others(tmp_path):
    ctx = context(str(tmp_path))
    (tmp_path / "begun").touch()

    squares, first = job_of(tmp_path / "begun", 0, 0)([]), 2 * CHUNK

    def failing(_):
        def answer(chunk):
            if chunk[0]["key"] >= first:
                raise EngineError("the third chunk cannot be answered")
            return squares(chunk)

        return answer

    with pytest.raises(EngineError, match="the third chunk cannot be answered"), answered(ctx, "squares", asked(), failing, SCHEMA):
        pass
    whole = job_of(tmp_path / "begun", 0, 0)
    with pytest.raises(KeyError), answered(ctx, "squares", asked(), whole, SCHEMA):  # a publish that fails loses no answer
        raise KeyError
    assert max(begun(tmp_path).values()) == 1
    with answered(ctx, "squares", asked(), whole, SCHEMA), answered(ctx, "squares", asked(), whole, SCHEMA, salt="another model"):
        pass
    assert set(begun(tmp_path).values()) == {2}
