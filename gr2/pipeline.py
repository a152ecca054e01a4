"""The stages in order, by name. A stage's module is loaded when it runs; only the CLI runs stages."""

import ast
import contextlib
import hashlib
import importlib
import json
import os
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gr2 import PROJECT, artifacts, lineage
from gr2.config import Config, Training
from gr2.context import Context, Result
from gr2.errors import ConfigError, MissingInputError
from gr2.prompts import load_template

ROOMS = ("gr2", "schemas", "validation", "scoring", "training", "spark_jobs")
GATHER = ("events", "items", "interactions", "impressions", "evidence", "item_embeddings")  # bring up to date what nights share
TELL = ("release", "report", "maintenance")


@dataclass(frozen=True)
class Stage:
    """One step: its module, what it reads and writes, and the configuration sections that change what it makes."""

    name: str
    module: str
    sections: tuple[str, ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()  # models read
    makes: tuple[str, ...] = ()  # models written
    flows: tuple[str, ...] = ("build",)  # build: everything, without --date; night: what a day adds, with --date
    bears_run: bool = False  # its rows bear the id of the run, in which every setting counts

    @property
    def gpu(self) -> bool:
        """Whether it trains, or asks a model: a scheduler has as many slots for it as there are GPUs."""
        return self.trains or self.name in ("candidates", "reasoning_traces", "distill_examples", "item_latents", "rerank_scores")

    @property
    def drafted(self) -> tuple[str, ...]:
        """Tables of others that a build reads at the draft's versions; none where it takes up what nights brought, or tells of all."""
        return () if self.name in (*GATHER, *TELL) else tuple(t for t in self.reads if t not in self.writes)

    @property
    def trains(self) -> bool:
        """Whether it is a trainer: its own process, no JVM, torchrun if several."""
        return self.module.startswith("training.")


BOTH = ("build", "night")
STAGES = (
    Stage("events", "spark_jobs.events", ("data", "simulator"), (), ("events", "quarantine"), flows=BOTH),
    Stage("items", "spark_jobs.items", ("data", "simulator"), ("events",), ("items", "quarantine"), flows=BOTH),
    Stage("interactions", "spark_jobs.interactions", ("data",), ("events", "items"), ("interactions", "histories"), flows=BOTH),
    Stage("impressions", "spark_jobs.impressions", ("data",), ("events",), ("impressions",), flows=BOTH),
    Stage("evidence", "spark_jobs.evidence", ("evidence",), ("interactions",), ("pair_days", "item_pairs", "item_stats"), flows=BOTH),
    Stage(
        "item_embeddings",
        "spark_jobs.item_embeddings",
        ("embeddings",),
        ("items", "item_pairs"),
        ("item_embeddings",),
        (),
        ("embedder",),
        BOTH,
    ),
    Stage("tokenizer", "training.tokenizer", ("tokenizer", "embeddings"), ("item_embeddings", "item_pairs"), (), (), ("tokenizer",), BOTH),
    Stage(
        "semantic_ids",
        "spark_jobs.semantic_ids",
        ("tokenizer",),
        ("item_embeddings", "item_pairs"),
        ("semantic_ids",),
        ("tokenizer",),
        flows=BOTH,
    ),
    Stage(
        "midtrain_examples",
        "spark_jobs.midtrain_examples",
        ("midtrain", "data"),
        ("interactions", "items", "semantic_ids"),
        ("midtrain_examples",),
        ("tokenizer",),
    ),
    Stage(
        "midtrain",
        "training.midtrain",
        ("midtrain", "models", "prompt", "tokenizer"),
        ("midtrain_examples", "items", "semantic_ids"),
        (),
        ("tokenizer",),
        ("midtrain", "midtrain-refit", "midtrain-teacher"),
    ),
    Stage("sasrec", "training.sasrec", ("sasrec",), ("interactions",), (), (), ("sasrec", "sasrec-refit")),
    Stage(
        "candidates",
        "spark_jobs.candidates",
        ("candidates", "sasrec", "data", "evidence"),
        ("interactions", "histories", "impressions", "semantic_ids", "pair_days", "item_pairs", "item_stats", "items", "item_embeddings"),
        ("candidates", "candidate_features", "program_lists"),
        ("midtrain", "midtrain-refit", "sasrec", "sasrec-refit"),
        flows=BOTH,
    ),
    Stage(
        "distill_examples",
        "spark_jobs.distill_examples",
        ("distill", "prompt", "scoring"),
        ("candidates", "candidate_features", "program_lists", "items", "semantic_ids"),
        ("distill_examples",),
        ("midtrain",),
    ),
    Stage("distill", "training.distill", ("distill", "models"), ("distill_examples",), (), ("midtrain",), ("fast",)),
    Stage(
        "reasoning_traces",
        "spark_jobs.reasoning_traces",
        ("traces", "prompt"),
        ("candidates", "candidate_features", "program_lists", "items", "semantic_ids"),
        ("reasoning_traces",),
        ("midtrain",),
    ),
    Stage(
        "sft_examples",
        "spark_jobs.sft_examples",
        ("sft", "prompt", "traces"),
        ("reasoning_traces", "candidates", "candidate_features", "program_lists", "items", "semantic_ids"),
        ("sft_examples",),
        ("midtrain",),
    ),
    Stage(
        "sft", "training.sft", ("sft", "models"), ("sft_examples",), (), ("midtrain", "fast", "midtrain-teacher"), ("sft", "sft-teacher")
    ),
    Stage(
        "rl_prompts",
        "spark_jobs.rl_prompts",
        ("rl", "prompt"),
        ("candidates", "candidate_features", "items", "semantic_ids"),
        ("rl_prompts",),
        ("midtrain",),
    ),
    Stage("rl", "training.rl", ("rl", "models", "prompt"), ("rl_prompts",), (), ("sft", "sft-teacher"), ("rl-teacher", "rl")),
    Stage("opd", "training.opd", ("opd", "rl", "models", "prompt"), ("rl_prompts",), (), ("sft", "rl-teacher"), ("opd", "opd+rl")),
    Stage("rollouts", "spark_jobs.rollouts", ("rl", "opd"), ("rl_prompts",), ("rollouts",), ("rl-teacher", "rl", "opd", "opd+rl")),
    Stage(
        "latents",
        "training.latents",
        ("latents", "models", "prompt"),
        ("items", "semantic_ids", "rl_prompts"),
        (),
        ("rl", "tokenizer"),
        ("latents", "brief"),
    ),
    Stage("item_latents", "spark_jobs.item_latents", ("latents",), ("items",), ("item_latents",), ("latents",)),
    Stage(
        "rerank_scores",
        "spark_jobs.rerank_scores",
        ("scoring", "prompt", "release"),
        ("candidates", "candidate_features", "items", "semantic_ids", "item_latents"),
        ("rerank_scores",),
        ("sft", "rl", "opd", "opd+rl", "fast", "latents", "brief"),
        flows=BOTH,
    ),
    Stage(
        "baselines",
        "spark_jobs.baselines",
        ("evaluation", "distill"),
        ("candidates", "candidate_features", "program_lists"),
        ("baselines",),
    ),
    Stage(
        "evaluation",
        "spark_jobs.evaluation",
        ("evaluation", "scoring"),
        ("candidates", "rerank_scores", "baselines"),
        ("metrics", "audits"),
        bears_run=True,
    ),
    Stage(
        "drift",
        "spark_jobs.drift",
        ("drift", "scoring"),
        ("events", "interactions", "semantic_ids", "rerank_scores"),
        ("audits",),
        flows=("night",),
        bears_run=True,
    ),
    Stage(
        "release",
        "spark_jobs.release",
        ("maintenance", "release"),
        ("metrics", "audits", "rerank_scores"),
        ("releases", "stage_runs"),
        flows=BOTH,
        bears_run=True,
    ),
    Stage("report", "spark_jobs.report", (), ("metrics", "audits", "releases", "stage_runs"), ()),
    Stage("maintenance", "spark_jobs.maintenance", ("maintenance",), ("releases",), (), flows=BOTH),
)


def get(name: str) -> Stage:
    """One stage. Raises ConfigError with the nearest names for an unknown one."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise ConfigError(f"no stage {name!r}; there are: {', '.join(s.name for s in STAGES)}")


def builder_of(name: str) -> str:
    """The stage that makes a table or a model, for messages."""
    return next((s.name for s in STAGES if name in (*s.writes, *s.makes)), "?")


def flow(name: str) -> list[Stage]:
    """The stages of a flow, in order: `build` makes everything, `night` brings the tables up to date and re-scores."""
    return [s for s in STAGES if name in s.flows]


def between(first: str | None, last: str | None, name: str = "build") -> list[Stage]:
    """The stages of a flow from one name to another, both included. Raises ConfigError for one that the flow does not have."""
    stages = flow(name)
    for bound in (first, last):
        if bound and get(bound) not in stages:
            raise ConfigError(f"stage {bound} is not part of a {name}; its stages: {', '.join(s.name for s in stages)}")
    start = stages.index(get(first)) if first else 0
    end = stages.index(get(last)) if last else len(stages) - 1
    if start > end:
        raise ConfigError(f"--from {first} comes after --to {last}")
    return stages[start : end + 1]


def fingerprint(stage: Stage, cfg: Config, ctx: Context) -> str:
    """Hash of all that decides what a stage makes: its settings, its code and everything that code imports, its inputs."""
    with ctx.drafted(stage.drafted):
        tables = {t: ctx.lake.content_version(t) if ctx.lake.exists(t) else None for t in stage.reads}
    parts: dict[str, Any] = {
        **settings_of(stage, cfg),
        "date": str(ctx.date),
        "tables": tables,
        "models": {m: _current(ctx, m) for m in (*stage.uses, *earlier(stage, cfg))},
    }
    if "simulator" in stage.sections:  # it reads raw files
        parts["raw"] = _raw_listing(ctx)
    if stage.bears_run:
        parts["run"] = ctx.run_id
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def earlier(stage: Stage, cfg: Config) -> set[str]:
    """Models that a stage is told to read and that stages after it make: an earlier build's."""
    told: dict[str, set[str]] = {"distill_examples": {cfg.distill.source, cfg.distill.start}, "distill": {cfg.distill.start}}
    return told.get(stage.name, set()) - {"evidence", "midtrain"}


def settings_of(stage: Stage, cfg: Config) -> dict[str, str]:
    """Hashes of what decides a stage beside its inputs: its settings, its code and everything that code imports, its prompt templates."""
    contracts = (f"schemas.{table}" for table in stage.writes)  # loaded by name
    parts = {"config": cfg.digest("profile", "seed", *stage.sections), "code": code_hash(stage.module, *contracts)}
    if "prompt" in stage.sections:
        parts["template"] = load_template(cfg.prompt.template).digest
    if "traces" in stage.sections and cfg.traces.template:
        parts["teacher's template"] = load_template(cfg.traces.template).digest
    return parts


def up_to_date(stage: Stage, ctx: Context, print_: str) -> bool:
    """Whether the last good run of this stage had the same fingerprint and what it made is still there."""
    record = read_record(ctx, stage.name)
    tables = all(ctx.lake.exists(t) for t in stage.writes if t != "quarantine")
    models = all(_current(ctx, m) for m in record.get("models", stage.makes))  # those of a stage that is turned off were never there
    return bool(record) and record["fingerprint"] == print_ and tables and models


def processes(stage: Stage, cfg: Config) -> int:
    """How many processes a trainer asks for: the most that any of its sections' trainings names."""
    sections = [getattr(cfg, name) for name in stage.sections]
    trainings = [value for section in sections for _, value in section if isinstance(value, Training)]
    return max((t.processes for t in trainings), default=1)


def execute(stage: Stage, cfg: Config, ctx: Context, print_: str) -> Result:
    """Runs a stage in this process and writes its record (the first process, where torchrun started several). GR2Errors pass through."""
    started = time.monotonic()
    alone = contextlib.nullcontext() if stage.trains else ctx.sole_writer()  # trainers write no tables
    with alone, ctx.drafted(stage.drafted), lineage.told(stage.name, ctx, stage.reads, stage.writes):
        result: Result = importlib.import_module(stage.module).run(cfg, ctx)
    if os.environ.get("RANK", "0") != "0":
        return result
    made = {model: digest for model in stage.makes if (digest := _current(ctx, model))}
    write_record(
        ctx,
        stage.name,
        {
            "stage": stage.name,
            "run_id": ctx.run_id,
            "status": "ok",
            "fingerprint": print_,
            "seconds": time.monotonic() - started,
            "peak_mib": _peak_mib(),
            "models": sorted(made),
            **asdict(result),
        },
    )
    for model, digest in () if ctx.date else made.items():  # a night keeps the models of the promoted release
        ctx.pin("models", model, digest)
    return result


def read_record(ctx: Context, stage: str) -> dict[str, Any]:
    """The last good run of a stage, or nothing."""
    path = ctx.runs / f"{stage}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(ctx: Context, stage: str, record: dict[str, Any]) -> None:
    """Keeps a stage's last good run; written whole, then renamed."""
    path = ctx.runs / f"{stage}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_whole(path, json.dumps(record, indent=1, sort_keys=True, default=str))


@cache
def code_hash(*modules: str) -> str:
    """Hash of modules' source and of every module of this project that they import, transitively, read as text."""
    seen: dict[str, str] = {}
    queue = list(modules)
    while queue:
        name = queue.pop()
        path = _source(name)
        if name in seen or path is None:
            continue
        text = path.read_text()
        seen[name] = text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                queue += [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                queue += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
    # how stages are run; settings count by value, not by their code
    ignored = {f"gr2.{name}" for name in ("pipeline", "context", "cli", "config", "sections")}
    return hashlib.sha256("".join(f"{k}\0{v}" for k, v in sorted(seen.items()) if k not in ignored).encode()).hexdigest()[:16]


def _source(module: str) -> Path | None:
    if module.split(".")[0] not in ROOMS:
        return None
    base = PROJECT.joinpath(*module.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return path if path.exists() else None


def _current(ctx: Context, model: str) -> str | None:
    try:
        return ctx.model(model).hash
    except MissingInputError:
        return None


def _raw_listing(ctx: Context) -> list[list[Any]]:
    """Raw files by name and size. Simulated ones follow from the configuration."""
    if ctx.cfg.data.source == "simulator":
        return []
    return [[str(p.relative_to(ctx.raw_path())), p.stat().st_size] for p in sorted(ctx.raw_path().rglob("*")) if p.is_file()]


def _peak_mib() -> float:
    import resource

    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(own, children) / 1024
