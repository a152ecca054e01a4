"""Engines inside Spark's Python workers: one a worker, opened once, kept between partitions and jobs. Not a stage.

    frame = on_workers(ctx, keys, job, schema)        # job(rows) yields record batches; in it: `engine = engine_for(spec)`

An engine job takes a worker's whole machine: `scoring.workers` partitions, by default one, and all chunks in one job (an idle Python worker
is ended after a minute). A spec holds no secret and no open thing, so it travels to a worker as it is.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql.pandas.types import from_arrow_schema

from gr2 import errors
from gr2.config import Config
from gr2.context import Context
from gr2.errors import EngineError, ModelError
from gr2.prompts import Template
from scoring.engine import Engine
from scoring.evidence_engine import EvidenceEngine, Program
from spark_jobs.session import frame_of

_OPEN: dict[str, Engine] = {}  # of this process


@dataclass(frozen=True, eq=False)
class Spec:
    """What an engine is opened from. `name` identifies it: kind, model and hash, as tables call it."""

    kind: Literal["vllm", "openai", "evidence"]
    name: str
    path: str = ""
    program: Program | None = None
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
    elif spec.program is None or spec.template is None:
        raise EngineError("an evidence spec holds its program and template")
    else:
        engine = EvidenceEngine(spec.program, spec.template, spec.name, cfg.traces.ordered)
    _OPEN[spec.name] = engine
    return engine


def _vllm(spec: Spec, cfg: Config) -> Engine:
    from scoring.vllm_engine import VLLMEngine

    for name, engine in list(_OPEN.items()):
        if isinstance(engine, VLLMEngine):
            del _OPEN[name]
            try:
                engine.load_weights(spec.path, spec.name)
                return engine
            except ModelError:  # of another size or vocabulary
                engine.close()
    return VLLMEngine(spec.path, cfg.scoring, spec.name)


def on_workers(
    ctx: Context, keys: pa.Table, job: Callable[[list[dict[str, Any]]], Iterator[pa.RecordBatch]], schema: pa.Schema
) -> DataFrame:
    """Rows of `keys`, cut among `scoring.workers` partitions, each given whole to `job` in a Spark Python worker.

    The job runs when the frame is read, once for each time: publish it, do not count it first.
    """

    def run(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        rows = [row for batch in batches for row in batch.to_pylist()]
        if rows:
            yield from job(rows)

    frame = frame_of(ctx, keys)
    workers = ctx.cfg.scoring.workers
    frame = frame.coalesce(1) if workers == 1 else frame.repartition(workers)
    return frame.mapInArrow(run, from_arrow_schema(schema))


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
