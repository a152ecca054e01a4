"""Profiles: one YAML file under `conf/` becomes one frozen `Config`. Unknown keys are refused with the nearest valid name.

    cfg = load("demo", ["paths.root=/tmp/x", "rl.steps=4"])

Every value has a default here, so a profile states only what it changes. A section belongs to one stage, or to the few
that share it, and its hash is part of what decides whether that stage is up to date.
"""

import difflib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from gr2 import PROJECT
from gr2.errors import ConfigError
from gr2.sections import FEWEST_DRILLED, Files, Name, Place, Positive, Sasrec, Section, Share, Training

Modes = tuple[Literal["think", "direct", "score"], ...]
Baseline = Literal["random", "popularity", "transition", "lambdamart", "program", "oracle"]
COMPRESSORS = ("latents", "brief")  # not models of their own: what `rl` answers to a compressed context (METHOD 9)


class Paths(Section):
    """`root` holds everything that a run writes: tables, models, reports, logs. Nothing is written elsewhere, but for tables in `lake`."""

    root: Path = Path("var/demo")
    lake: Place = ""  # where tables and their staging lie, if not under root: a URL that every node reaches


class Data(Section):
    """Where raw data come from and how they are cut into the re-ranker's splits (DESIGN section 4)."""

    # jsonl: day=YYYY-MM-DD/{events,items}.jsonl.gz, as simulated. amazon2014: prepared sequences. amazon_reviews: the lab's own files of
    # 2014, 2018 or 2023. open_bandit: impressions with propensities. files: any other, by `events` and `items` below
    source: Literal["simulator", "jsonl", "amazon2014", "amazon_reviews", "open_bandit", "files"] = "simulator"
    path: Path | None = None  # folder of raw files; the environment variable GR2_DATA is the fallback
    events: Files = Files()  # with `files`, takes the place of what the source says of its events
    items: Files = Files()  # the same for its items
    protocol: Literal["leave_one_out", "time"] = "time"
    same_day_order: Literal["as_published", "shuffled"] = "as_published"
    windows: tuple[Share, Share, Share] = (0.55, 0.75, 0.85)  # time protocol: ends of pre-ranker, re-ranker and picking windows
    period: Literal["day", "month", "year"] = "day"  # partition grain of `events` and what follows it
    max_history: Positive = 50  # items that a `histories` row keeps
    session_gap_minutes: Positive = 30
    max_requests_per_user: Positive = 1  # time protocol: targets a user gives to one split
    max_quarantine_share: Share = 0.05  # more refused rows than this fail the gate


class Simulator(Section):
    """A marketplace with known relevance (`gr2/simulate.py`)."""

    users: Positive = 1200
    items: Positive = 400
    new_items_per_day: int = Field(2, ge=0)
    days: Positive = 28
    start: str = Field("2026-01-01", pattern=r"^\d{4}-\d{2}-\d{2}$")
    requests_per_user_day: float = Field(0.6, gt=0)
    slate: int = Field(10, gt=0, le=28)  # a purchase from a lower slot could fall after midnight
    columns: Positive = 1  # 1: slots in a row; more: a grid of rows and columns
    position_decay: Share = 0.75  # P(look at slot k) relative to slot k - 1; in a grid, of a row to the one above
    late_share: Share = 0.02
    duplicate_share: Share = 0.01
    malformed_share: Share = 0.005


class Spark(Section):
    """The session. `local[2]` and small driver by default; a cluster needs `master` and a table root that all nodes see."""

    master: str = "local[2]"
    driver_memory: str = "1536m"
    shuffle_partitions: Positive = 2
    extra: dict[str, str] = {}


class Evidence(Section):
    """Directed item pairs and item statistics, decayed and anchored at the end of what they were fitted on."""

    window: Positive = 5  # a pair links an item with the next ones within this many steps of the same history
    half_life_days: float = Field(365.0, gt=0)
    max_pairs_per_item: Positive = 100
    min_count: Positive = 1


class Embeddings(Section):
    """Item vectors: text (TF-IDF of words and characters, SVD) beside collaborative (SVD of item pairs)."""

    text_dim: Positive = 96
    collaborative_dim: int = Field(64, ge=0)
    encoder: str | None = None  # a Hugging Face encoder instead of TF-IDF: its folder (an id only if it is in the cache)
    collaborative_weight: float = Field(1.5, ge=0)
    frozen: bool = False  # true: keep the projection and the tokenizer fitted before under equal settings; nights only add items


class Tokenizer(Section):
    """Semantic-ID tokenizer (METHOD 2)."""

    builder: Literal["rqvae", "rqkmeans"] = "rqvae"
    levels: Positive = 4
    codes: Positive = 256
    collisions: Literal["nearest_free", "random", "random_last_levels"] = "nearest_free"
    random_levels: Positive = 1
    dim: Positive = 16  # width of the quantised space: narrower is more unique, wider keeps more of the vectors
    hidden: Positive = 256
    steps: Positive = 1500
    batch: Positive = 256
    lr: float = 1e-3
    ema: float = Field(0.97, ge=0.0, lt=1.0)  # 0: codebooks learn by gradient
    kmeans_init: bool = True
    commitment: float = 0.25
    diversity: float = Field(0.0, ge=0)
    contrastive: float = Field(0.0, ge=0)
    reset_after: int = Field(0, ge=0)  # batches without use before a code is reset; 0: never
    min_uniqueness: Share = 0.9  # gate on the learned codes, before any separation


class Model(Section):
    """One size of language model: `base`, the folder of a Hugging Face causal LM (or its id, if cached), or a small Qwen3 from scratch."""

    base: str | None = None
    hidden: Positive = 192
    layers: Positive = 4
    heads: Positive = 6
    kv_heads: Positive = 6
    mlp: Positive = 512
    dropout: Share = 0.1


class Models(Section):
    """Teacher and student, and the vocabulary they share when built from scratch."""

    vocabulary: Positive = 1536  # byte-level BPE, before labels and SID tokens are added
    student: Model = Model()
    teacher: Model | None = Model(hidden=256, layers=6, heads=8, kv_heads=8, mlp=704)  # null: no teacher, no OPD


class Midtrain(Section):
    """The mix of METHOD 3: `history`, the sequence task, and shares of others. `refit` learns from all but the last two splits."""

    student: Training = Training(epochs=15, lr=2e-3, row_tokens=128, tokens_per_batch=2048, weight_decay=0.1, average=0.95)
    teacher: Training = Training(epochs=4, lr=1.5e-3, row_tokens=128, tokens_per_batch=2048, weight_decay=0.1, average=0.95)
    refit: Training = Training(epochs=2, lr=5e-4, row_tokens=128, tokens_per_batch=2048, weight_decay=0.1, average=0.95)
    titles: float = Field(0.05, ge=0)  # examples over users
    persona: float = Field(0.05, ge=0)
    captions: float = Field(0.2, ge=0)  # examples over items
    lookup: float = Field(0.2, ge=0)
    title_words: Positive = 8  # words of a title that a text task says
    history_items: Positive = 24  # longest window; a longer history is cut into windows that overlap by half
    item_dropout: Share = 0.1  # share of items left out of a history, drawn anew each epoch
    item_weight: float = Field(0.5, ge=0)  # of the loss on whole items beside tokens; 0: none (catalogues that a softmax cannot hold)
    own_vectors: bool = True  # of single items beside their tokens' rows, in the item loss of the student (not with LoRA)
    refit_from: Literal["midtrain", "start"] = "midtrain"  # the refit goes on from the student, or starts as it started
    window_examples: Positive = 250_000  # texts in memory at once, over all processes; a table of more is read in windows of a drawn order
    held_out: Positive = 512  # users whose items in the rerank split, which fit `train` does not hold, give the held-out loss


class Candidates(Section):
    """Pre-ranking: exact constrained beams of the mid-trained model, or the lists of an impression log."""

    source: Literal["beam", "log"] = "beam"
    n: Positive = 10
    depth: Positive = 20  # of the lists that teach the evidence program: more of them hold their target; at most as many as the beam finds
    beam: Positive = 20
    item_weight: float = Field(1.0, ge=0)  # of log p(item) beside log p(tokens) in the beams' order; wants midtrain.item_weight
    pair_share: float = Field(0.4, ge=0, lt=1)  # of counts of what followed what in the mixture with the network; 0: the network alone
    pair_back: float = Field(0.3, ge=0)  # what a pair counts the other way round
    pair_decay: Share = 0.5  # of an item's vote with each step back in the history
    debias: Literal["none", "position"] = "none"  # of logged lists: clicks over the probability that their slot was looked at
    max_weight: float = Field(10.0, ge=1.0)  # that a click may get
    batch: Positive = 256
    max_requests: int = Field(0, ge=0)  # per split, seeded sample; 0: all. The full-ranking figures use every request kept
    max_rerank: int = Field(0, ge=0)  # the same for the split rerank alone, whose lists only train; 0: as max_requests
    max_valid: int = Field(0, ge=0)  # the same for the split valid, whose lists choose, and teach the program; 0: as max_requests


class Prompt(Section):
    """What the re-ranker reads (METHOD 5)."""

    template: Name = "rerank_v3"  # a file in conf/prompts
    history_items: Positive = 6
    evidence: bool = True
    shuffled: bool = True  # slots of the candidates; false shows them in the incoming order, to see what a policy makes of that
    max_prompt_tokens: Positive = 350
    max_thought_tokens: Positive = 48
    max_answer_tokens: Positive = 40


class Distill(Section):
    """Reasoning distillation to the `score` mode (METHOD 10)."""

    train: Training = Training(epochs=2, lr=5e-4)
    source: Name = "evidence"  # the program that teaches the traces; or a model that an earlier build made, such as rl
    start: Literal["midtrain", "sft", "rl"] = "midtrain"  # the others are an earlier build's, too
    dropout: Share = 0.0
    replicas: Positive = 2
    thoughts: Positive = 1  # drawn for a prompt, and averaged; several at temperature 0 are one
    temperature: float = Field(0.0, ge=0)
    max_requests: int = Field(400, ge=0)  # seeded sample of splits rerank and valid; 0: all
    places: Positive = 5  # of the source's order that are learned, each after those before it


class Traces(Section):
    """Teacher samples (METHOD 6)."""

    teacher: Literal["evidence", "vllm", "openai"] = "evidence"
    model: str = ""  # vllm: path or id; openai: model name
    url: str = ""
    template: str = ""  # what the teacher reads (a file in conf/prompts); empty: prompt.template
    mode: Literal["rejection", "targeted", "both"] = "both"
    accept_rank: Positive = 1
    max_attempts: Positive = 8
    accepted_per_request: Positive = 1  # rejection goes on, under other shuffles, until so many are accepted
    temperature: float = Field(0.4, ge=0)  # of the evidence program; language models want about 0.7
    ordered: int = Field(1, ge=1, le=3)  # the evidence program puts so many in order, and names them; the others stay
    max_tokens: Positive = 128  # thought and answer; language models that reason at length need more
    max_requests: int = Field(0, ge=0)  # seeded sample of those whose target is in the list; 0: all
    no_target_requests: int = Field(100, ge=0)  # seeded sample of those whose target is not
    concurrency: Positive = 8
    requests_per_minute: int = Field(0, ge=0)  # to a service, retries included; 0: no limit
    timeout_seconds: float = Field(60.0, gt=0)
    retries: int = Field(3, ge=0)
    price_prompt: float = Field(0.0, ge=0)  # of a million tokens, in the service's currency
    price_completion: float = Field(0.0, ge=0)


class SFT(Section):
    """Supervised fine-tuning on accepted traces: reasoning weighs less than the answer (METHOD 7)."""

    student: Training = Training(epochs=2, lr=8e-4)
    teacher: Training = Training(epochs=2, lr=6e-4)
    start: Literal["midtrain", "fast"] = "midtrain"  # of the student; fast knows which candidate is better, and learns to say why
    reasoning_weight: float = Field(0.3, ge=0)
    answer_weight: float = Field(1.0, gt=0)
    modes: dict[Literal["think", "direct"], Share] = {"think": 0.6, "direct": 0.4}  # share of traces taught so; 1 and 1: each in both
    traces: Literal["rejection", "targeted", "both"] = "rejection"
    max_traces: int = Field(0, ge=0)  # seeded sample of what is taught; 0: all
    no_target: bool = False  # also what the teacher wrote of lists without their target: nothing proves it, but small models need texts
    dropout: Share = 0.0  # that of mid-training keeps a small model from copying exactly
    drills: int = Field(0, ge=0)  # made-up lists beside the traces (gr2.drills), for models without a base
    window_examples: Positive = 250_000  # examples in memory at once, as in midtrain


class RL(Section):
    """DAPO with verifiable rewards (METHOD 8)."""

    student: Training = Training(lr=1e-4, warmup=0.1, max_steps=20)
    teacher: Training = Training(lr=1e-4, warmup=0.1, max_steps=12)
    start: Literal["sft", "midtrain"] = "sft"  # midtrain: RL without SFT, to see what SFT is for
    prompts_per_step: Positive = 16
    group: Positive = 8
    temperature: float = Field(1.0, gt=0)
    clip_low: float = 0.2
    clip_high: float = 0.28
    truncate_ratio: float = 2.0  # trainer over sampler probability, truncated (importance correction)
    reward: Literal["gr2", "normalised", "auc", "ndcg"] = "normalised"
    conditional: bool = True
    scaled: bool = False  # advantages over their group's standard deviation; a model that is often wrong then learns to copy (docs/log.md)
    alpha: float = 0.2
    invalid: float = -1.5
    overlong_tokens: int = Field(8, ge=0)  # soft punishment of length begins so many tokens before the limit (DAPO); 0: none
    overlong_weight: Share = 0.4  # at the limit; small enough that an invalid answer still earns least
    replicas: Positive = 2  # shuffles of each training request
    redraw_share: Share = 0.5  # prompts whose incoming order is re-drawn so that the target's rank is uniform
    max_refills: int = Field(2, ge=0)  # further draws of a step, for groups that were dropped
    updates: Positive = 1  # optimizer steps from the rollouts of one step; beyond 1 the clip does its work
    validate_every: Positive = 5
    validate_requests: Positive = 128
    mode: Literal["think", "direct"] = "think"


class OPD(Section):
    """On-policy distillation from the RL-trained teacher (METHOD 7)."""

    train: Training = Training(lr=2e-4, warmup=0.1, max_steps=10)
    beta: float = Field(1.0, gt=0)
    clip: tuple[float, float] = (-30.0, 5.0)
    rl_weight: float = Field(1.0, ge=0)  # of the ranking advantage in `opd+rl`


class Latents(Section):
    """The context compressor (METHOD 9): items in learned vectors (`latents`), and a context without the words it can spare (`brief`)."""

    train: Training = Training(lr=2e-3, max_steps=60)
    vectors: Positive = 1  # learned vectors an item
    text_tokens: Positive = 32  # of an item's text that the compressor reads, beside its semantic ID
    validate_requests: Positive = 64  # held-out prompts on which both are measured
    brief: Training = Training(lr=0.1, max_steps=80, tokens_per_batch=32768, weight_decay=0.0)  # batch: of all drafts, at full length
    group: int = Field(8, ge=2)  # drafts of a prompt
    alpha: float = Field(0.2, ge=0.0, lt=1.0)  # of tokens saved in a draft's reward; the rest is the share of N@3 kept


class Scoring(Section):
    """Batch re-scoring (`rerank_scores`)."""

    # `latents: [score]`, `brief: [score]`: also what `rl` answers to compressed contexts
    models: dict[Name, Modes] = {"sft": ("think",), "rl": ("think", "score"), "opd": ("think",), "opd+rl": ("think",), "fast": ("score",)}
    live: dict[Name, Annotated[Modes, Field(min_length=1)]] = Field({"rl": ("score",)}, min_length=1)  # what answers for a night's lists
    splits: tuple[Literal["valid", "test"], ...] = ("test",)
    replicas: Positive = 1
    shuffles: Positive = 1  # of a list, over which the mode score adds up: steadier orders, as many prompts
    audit_replicas: Positive = 3  # permuted replicas on a sample, for the position audit
    audit_requests: Positive = 64
    miss_sample: int = Field(100, ge=0)  # scored requests whose target is not in the list (all of those with it are scored)
    chunk: Positive = 256
    workers: Positive = 1  # engines at once, one a Spark worker that has all cores of its machine
    kv_cache_gib: Positive = 1
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    structured: bool = False  # think and direct may write nothing but a thought and a list of labels, of which one may still come twice
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)  # GPUs only, as is the next
    tensor_parallel: Positive = 1  # GPUs over which one engine spreads a model


class Evaluation(Section):
    """Slices, intervals, audits (DESIGN section 4)."""

    bootstrap: Positive = 1000
    baselines: tuple[Baseline, ...] = ("random", "popularity", "transition", "lambdamart", "oracle")
    min_tau: float = Field(-1.0, ge=-1.0, le=1.0)  # position audit: replicas must agree at least so well
    max_copy_rate: Share = 1.0
    max_invalid_rate: Share = 1.0


class Release(Section):
    """What new models must show before they are promoted over those that are out (`validation/gate.py`)."""

    gate: bool = True
    metric: Literal["recall@1", "recall@3", "recall@5", "ndcg@3", "ndcg@5", "ndcg@10", "mrr"] = "ndcg@3"
    min_gain: float = 0.0  # of the mean over requests
    min_requests: Positive = 50  # that both systems answered
    requests: Positive = 400  # seeded sample of the validation requests, scored for this


class Drift(Section):
    """Stability indices of a night, held against the days before (`drift`)."""

    reference_days: Positive = 28
    retrain_at: float = Field(0.25, gt=0)  # more calls for retraining
    fail_at: float = Field(float("inf"), gt=0)  # more fails the night


class Maintenance(Section):
    """Joining small files, removing old ones."""

    keep_days: float = Field(7.0, ge=0)  # versions so young stay readable, pinned or not
    small_files: Positive = 16  # files of one partition; more are joined
    keep_releases: int = Field(30, ge=0)  # superseded releases that stay live, whose files are thus kept; older ones are retired


class Config(Section):
    """One profile, complete."""

    profile: Name = "demo"
    seed: int = 13
    tracker: Literal["none", "tensorboard", "mlflow"] = "none"  # mirrors the metrics.jsonl of every language model
    paths: Paths = Paths()
    data: Data = Data()
    simulator: Simulator = Simulator()
    spark: Spark = Spark()
    evidence: Evidence = Evidence()
    embeddings: Embeddings = Embeddings()
    tokenizer: Tokenizer = Tokenizer()
    models: Models = Models()
    midtrain: Midtrain = Midtrain()
    sasrec: Sasrec = Sasrec()
    candidates: Candidates = Candidates()
    prompt: Prompt = Prompt()
    distill: Distill = Distill()
    traces: Traces = Traces()
    sft: SFT = SFT()
    rl: RL = RL()
    opd: OPD = OPD()
    latents: Latents = Latents()
    scoring: Scoring = Scoring()
    evaluation: Evaluation = Evaluation()
    release: Release = Release()
    drift: Drift = Drift()
    maintenance: Maintenance = Maintenance()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.candidates.beam < self.candidates.n:
            raise ValueError(f"candidates.beam ({self.candidates.beam}) must be at least candidates.n ({self.candidates.n})")
        if self.candidates.n > 20:
            raise ValueError("candidates.n must be at most 20: there are 20 labels")
        if list(self.data.windows) != sorted(self.data.windows):
            raise ValueError(f"data.windows must not fall: each ends where the next one begins: {list(self.data.windows)}")
        if unknown := {self.prompt.template, self.traces.template or self.prompt.template}.difference(templates()):
            raise ValueError(f"no prompt template {min(unknown)!r} in conf/prompts{_nearest(min(unknown), templates())}")
        if self.sft.drills and self.candidates.n < FEWEST_DRILLED:
            raise ValueError(f"sft.drills: a drill has at least {FEWEST_DRILLED} candidates, more than candidates.n ({self.candidates.n})")
        if self.scoring.structured and self.prompt.max_answer_tokens < (needed := 2 * self.candidates.n + 1):
            raise ValueError(f"scoring.structured: prompt.max_answer_tokens must be at least {needed} for that many labels")
        if self.data.source == "files" and not self.data.events.files:
            raise ValueError("data.source is files: say which in data.events.files, such as ['clicks/*.parquet']")
        if any(t.processes > 1 or t.checkpoint_every or t.lora for t in (self.rl.student, self.rl.teacher, self.opd.train)):
            raise ValueError(
                "rl and opd train whole weights in one process, and go on from their rollouts: leave out processes, lora, checkpoint_every"
            )
        if any(t.lora and not t.lora.tables for t in (self.midtrain.student, self.midtrain.teacher, self.midtrain.refit)):
            raise ValueError("midtrain teaches the rows of semantic IDs: with lora, set lora.tables to true")
        if self.sasrec.train.lora or self.sasrec.train.zero_stage == 3:
            raise ValueError("sasrec reads its table of items whole, and trains all of it: leave out lora and ZeRO stage 3")
        if self.latents.brief.processes > 1 or self.latents.brief.checkpoint_every or self.latents.brief.lora:
            raise ValueError("latents.brief trains in one process and starts again: leave out processes, lora and checkpoint_every")
        if self.latents.train.processes > 1:
            raise ValueError("latents.train: all processes would read the same batches; it trains in one: leave out processes")
        if bad := [name for name in COMPRESSORS for asked in (self.scoring.models, self.scoring.live) if "think" in asked.get(name, ())]:
            raise ValueError(f"scoring: {bad[0]} is trained on prompts that ask for no thought: take direct or score")
        if self.scoring.structured and "latents" in {*self.scoring.models, *self.scoring.live}:
            raise ValueError("scoring: vLLM gives its tokenizer a token for vectors, which grammars refuse: take structured or latents")
        model, modes = next(iter(self.scoring.live.items()))
        if self.release.gate and "valid" in self.scoring.splits and modes[0] not in self.scoring.models.get(model, ()):
            raise ValueError(f"scoring.splits has valid: so scoring.models must have {model}: [{modes[0]}], which release.gate compares")
        return self

    def digest(self, *sections: str) -> str:
        """SHA-256 of the named sections (all without names), without what changes no content: paths, and how often training is saved.

        Raw files count by name and size (`gr2.pipeline.fingerprint`), wherever they lie.
        """
        told = self.model_dump_json(exclude={"paths": True, "data": {"path"}})
        data = json.loads(told, object_hook=lambda section: {k: v for k, v in section.items() if k != "checkpoint_every"})
        chosen = {k: data[k] for k in sections} if sections else data
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def profiles() -> list[str]:
    """Names of the profiles under conf/."""
    return sorted(p.stem for p in (PROJECT / "conf").glob("*.yaml"))


def templates() -> list[str]:
    """Names of the prompt templates under conf/prompts."""
    return sorted(p.stem for p in (PROJECT / "conf" / "prompts").glob("*.yaml"))


def load(profile: str, overrides: list[str] | None = None) -> Config:
    """Reads `conf/<profile>.yaml`, applies `key.path=value` overrides (values are YAML) and validates.

    Raises ConfigError for an unknown profile or key (naming the nearest valid one) and for a bad value.
    """
    if profile not in profiles():
        raise ConfigError(f"no profile {profile!r} in conf/{_nearest(profile, profiles())}")
    raw = yaml.safe_load((PROJECT / "conf" / f"{profile}.yaml").read_text()) or {}
    raw["profile"] = profile
    for item in overrides or []:
        key, sep, value = item.partition("=")
        if not sep or not re.fullmatch(r"[a-z_]+(\.[a-z0-9_+-]+)*", key):
            raise ConfigError(f"--set {item!r}: write key=value, such as rl.prompts_per_step=8")
        try:
            _put(raw, key.split("."), yaml.safe_load(value), key)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {key}: the value is no plain YAML: {str(error).splitlines()[0]}") from None
    if (raw.get("data") or {}).get("path") is None and os.environ.get("GR2_DATA"):
        _put(raw, ["data", "path"], os.environ["GR2_DATA"], "data.path")
    return _validated(raw)


def _put(tree: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    """Sets one value. Sections on the way are copied: the file may name one twice (`*alias`), and only this place is to change."""
    for part in path[:-1]:
        below = tree.get(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"--set {key}: {part!r} is a value, not a section")
        tree[part] = tree = dict(below)
    tree[path[-1]] = value


def _validated(raw: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            where = ".".join(str(part) for part in e["loc"])
            hint = _nearest(str(e["loc"][-1]), _siblings(e["loc"])) if e["type"] == "extra_forbidden" else ""
            lines.append(f"{where or 'profile'}: {'unknown key' if hint or e['type'] == 'extra_forbidden' else e['msg']}{hint}")
        raise ConfigError("; ".join(lines)) from None


def _siblings(loc: tuple[int | str, ...]) -> list[str]:
    """Valid keys beside the one that was refused."""
    section: Any = Config
    for part in loc[:-1]:
        field = section.model_fields.get(str(part)) if isinstance(section, type) and issubclass(section, BaseModel) else None
        section = field.annotation if field else None
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _nearest(name: str, valid: list[str]) -> str:
    if close := difflib.get_close_matches(name, valid, n=1, cutoff=0.4):
        return f": did you mean {close[0]!r}?"
    return f"; there are: {', '.join(valid)}" if valid else ""
