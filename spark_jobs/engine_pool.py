"""Engines inside Spark's Python workers: one a worker, opened once, kept between partitions and jobs. Not a stage.

    with answered(ctx, "rerank_scores", asked, job, schema) as frame:        # in the job: `engine = engine_for(spec, cfg)`
        publish(ctx, "rerank_scores", frame)

An engine job takes a worker's whole machine: `scoring.workers` partitions, by default one, and all chunks in one job (an idle Python worker
is ended after a minute). A spec holds no secret and no open thing, so it travels to a worker as it is.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from py4j.protocol import Py4JError
from pyspark import TaskContext
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import from_arrow_schema

from gr2 import errors
from gr2.config import Config
from gr2.context import Context
from gr2.errors import EngineError, ModelError
from gr2.prompts import Template
from scoring.boosted import Boosted
from scoring.engine import Engine
from scoring.evidence_engine import EvidenceEngine
from spark_jobs.session import frame_of

Rows = list[dict[str, Any]]
Job = Callable[[Rows], Callable[[Rows], Rows]]
PATH, WORKER = "chunk_path", "chunk_worker"
_OPEN: dict[str, Engine] = {}  # of this process, as are the next two
_STARTED: list[str] = []  # names of the engines that were started
_PROCESS = uuid.uuid4().hex


@dataclass(frozen=True, eq=False)
class Spec:
    """What an engine is opened from. `name` identifies it: kind, model and hash, as tables call it."""

    kind: Literal["vllm", "openai", "evidence"]
    name: str
    path: str = ""
    judge: Boosted | None = None
    template: Template | None = None


def engine_for(spec: Spec, cfg: Config) -> Engine:
    """The engine of a spec, opened at most once in this process.

    There is never more than one vLLM engine: where another model of the same architecture is asked for, its weights are pushed into the
    open one; else that one is closed first. Raises EngineError, ModelError, ConfigError.
    """
    if found := _OPEN.get(spec.name):
        return found
    if spec.kind == "vllm":
        engine: Engine = _vllm(spec, cfg)
    elif spec.kind == "openai":
        from scoring.openai_engine import OpenAIEngine

        engine = OpenAIEngine(cfg.traces)
    elif spec.judge is None or spec.template is None:
        raise EngineError("an evidence spec holds its judge and template")
    else:
        engine = EvidenceEngine(spec.judge.program, spec.template, cfg.traces.ordered, spec.judge)
    _OPEN[spec.name] = engine
    return engine


def _vllm(spec: Spec, cfg: Config) -> Engine:
    from scoring.vllm_engine import VLLMEngine

    for name, engine in list(_OPEN.items()):
        if isinstance(engine, VLLMEngine):
            del _OPEN[name]
            try:
                engine.load_weights(spec.path)
                return engine
            except ModelError:  # of another size or vocabulary
                engine.close()
    _STARTED.append(spec.name)
    return VLLMEngine(spec.path, cfg.scoring)


@contextlib.contextmanager
def answered(ctx: Context, name: str, asked: pa.Table, job: Job, schema: pa.Schema, salt: str = "") -> Iterator[DataFrame]:
    """What `job` makes of the rows of `asked`: `scoring.chunk` rows at a time, each chunk kept as soon as it is answered.

    `job(all rows of a worker)` gives the function that answers one chunk of them. A chunk becomes `work/<name>/<hash>.parquet` by one
    rename; the hash is that of its rows and of `salt` (what else decides the answers). So after a kill at most the chunk that each worker
    was at is asked again, two attempts at one task write the same files, and what is published holds every row once. On leaving without
    an error these chunks are removed, and no others: another night may be at work beside. Raises GR2Errors of workers as themselves.
    """
    folder = ctx.work(name)
    size = ctx.cfg.scoring.chunk
    chunks = [asked.slice(start, size) for start in range(0, asked.num_rows, size)]
    paths = [folder / f"{_content(chunk, salt)}.parquet" for chunk in chunks]
    open_ = [place for place, path in enumerate(paths) if not path.exists()]
    if len(open_) < len(chunks):
        ctx.log(f"{name}: {len(chunks) - len(open_)} of {len(chunks)} chunks were answered by a run that did not end")
    if open_:
        workers = min(ctx.cfg.scoring.workers, len(open_))
        marked = [
            chunks[place]
            .append_column(PATH, pa.array([str(paths[place])] * chunks[place].num_rows))
            .append_column(WORKER, pa.array([turn % workers] * chunks[place].num_rows, pa.int32()))
            for turn, place in enumerate(open_)
        ]
        frame = frame_of(ctx, pa.concat_tables(marked)).repartitionById(workers, WORKER)
        with worker_errors():
            told = frame.mapInArrow(_keeping(job, schema), "process string, starts int").collect()
        starts = sum(dict(sorted(told)).values())  # of each process the last word
        ctx.log(f"{name}: {len(open_)} chunks answered by {workers} worker{'s' * (workers > 1)}, engines started: {starts}")
    yield ctx.spark.read.schema(from_arrow_schema(schema)).parquet(*map(str, paths)) if paths else frame_of(ctx, schema.empty_table())
    own = {path.stem for path in paths}
    for path in list(folder.iterdir()):  # with what a killed worker had begun to write
        if path.name.removeprefix(".").partition(".")[0] in own:
            path.unlink(missing_ok=True)


def _content(chunk: pa.Table, salt: str) -> str:
    return hashlib.sha256(json.dumps([salt, chunk.to_pylist()], sort_keys=True).encode()).hexdigest()[:24]


def _keeping(job: Job, schema: pa.Schema) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Runs in a Python worker: its chunks one after the other, in the order in which they were asked."""

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        rows = [row for batch in batches for row in batch.to_pylist()]
        if not rows:
            return
        _take_machine()
        answer = job(rows)
        for path, chunk in itertools.groupby(rows, key=lambda row: row[PATH]):
            if not Path(path).exists():  # an earlier attempt at this task may have got so far
                table = pa.Table.from_pylist(answer(list(chunk)), schema=schema)
                draft = Path(path).with_name(f".{Path(path).name}-{uuid.uuid4().hex[:8]}")
                pq.write_table(table, draft)
                draft.replace(path)
            yield _starts()

    return run


def _starts() -> pa.RecordBatch:
    """This process, and how many engines it has started. (A function of the module: what a job closes over is a copy.)"""
    return pa.RecordBatch.from_pydict({"process": [_PROCESS], "starts": pa.array([len(_STARTED)], pa.int32())})


def _take_machine() -> None:
    """Of the GPUs those that Spark gave this task: two tasks share none. All cores, where Spark tells its Python workers to use one.

    The variable alone is not enough: OpenMP reads it once, and in a worker that ranked with LightGBM before it has been read.
    """
    context = TaskContext.get()
    if context and (gpus := context.resources().get("gpu")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus.addresses)
    cores = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(cores)
    import torch

    torch.set_num_threads(cores)


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Raises a GR2Error of a worker as itself, not as the Spark failure that it comes wrapped in."""
    try:
        yield
    except (PySparkException, Py4JError) as error:
        found = re.search(r"gr2\.errors\.(\w+): (.+)", str(error))
        kind = getattr(errors, found[1], None) if found else None
        if found is None or not (isinstance(kind, type) and issubclass(kind, errors.GR2Error)):
            raise
        raise kind(f"{found[2].strip()}; nothing was published") from None


def portable(cfg: Config, ctx: Context) -> Config:
    """The configuration for a worker, which may run in another folder: its root is absolute."""
    return cfg.model_copy(update={"paths": cfg.paths.model_copy(update={"root": ctx.root.resolve()})})
