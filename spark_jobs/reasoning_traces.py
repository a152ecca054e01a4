"""Stage `reasoning_traces`: a teacher's reasoned orders of the re-ranker's training lists, every sample kept with its verdict (METHOD 6).

Reads    `candidates` and `candidate_features` (split rerank only), `items`, `semantic_ids`; the vocabulary of `midtrain`; the teacher.
Writes   `reasoning_traces`: one sample; key sample_id = hash of request, teacher, mode, attempt and prompt. Insert only.
         `work/audits/reasoning_traces.json`: acceptance, chance, cost, leaks, as rows for `audits`.
Rerun    a sample's seed and shuffle are hashes of request and attempt, and the teacher's name holds a hash of what decides its draws and
         their verdicts, so the same samples come again and are already there. (Where a service ignores seeds, the first wording stays.)

In rejection the teacher sees what the student will see, under another shuffle at each attempt, until `traces.accepted_per_request` samples
put the target at `traces.accept_rank` or better, or `traces.max_attempts` are spent. In the targeted mode it is told the target and asked
once. A request whose list lacks the target keeps one sample.

    gr2 stage reasoning_traces --profile demo
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

import schemas
from gr2 import artifacts
from gr2.answers import parse
from gr2.config import Config
from gr2.context import Context, Result
from gr2.draws import seed_of
from gr2.errors import ConfigError, EngineError, MissingInputError
from gr2.prompts import Template, View, prompt_hash, render
from scoring.engine import Answer, Ask, Engine
from scoring.model import encode_all, load_tokenizer, prompt_text
from spark_jobs.engine_pool import Rows, Spec, answered, engine_for, portable
from spark_jobs.program import boosted
from spark_jobs.prompting import Requests, sample, template_of
from spark_jobs.publish import publish
from validation.leaks import DIGEST, leak_of
from validation.traces import findings

SCHEMA = schemas.get("reasoning_traces").arrow()
SamplingMode = Literal["rejection", "targeted"]
# settings of `traces` that change what a teacher draws, or how it is judged: a row that is there is never judged again
DRAWN_BY = ("temperature", "max_tokens", "template", "ordered", "accept_rank")


def run(cfg: Config, ctx: Context) -> Result:
    """Picks requests, samples on the workers, publishes, reports. Raises EngineError, ConfigError, MissingInputError, AuditError."""
    spec = teacher(cfg, ctx)
    ids = chosen(cfg, ctx)
    keys = pa.table({"request_id": pa.array(ids, pa.string())})
    remote = portable(cfg, ctx)
    tokenizer = str(ctx.model("midtrain").path)

    def job(rows: Rows) -> Callable[[Rows], Rows]:
        requests = Requests(Context(remote), remote, "rerank", [row["request_id"] for row in rows])
        sampler = Sampler(remote, engine_for(spec, remote), spec.name, load_tokenizer(tokenizer), requests)
        return lambda chunk: sampler.samples([row["request_id"] for row in chunk])

    salt = f"{spec.name} {cfg.digest('traces', 'prompt')} {ctx.lake.content_version('candidates')}"
    with answered(ctx, "reasoning_traces", keys, job, SCHEMA, salt) as frame:
        added = publish(ctx, "reasoning_traces", frame)
    drawn = ctx.lake.read("reasoning_traces", order_by=["sample_id"], teacher=spec.name)
    listed = ctx.lake.read("candidates", ["request_id", "candidate_ids"], order_by=["request_id"], split="rerank")
    sizes = dict(zip(listed["request_id"].to_pylist(), map(len, listed["candidate_ids"].to_pylist()), strict=True))
    found = findings(drawn.to_pylist(), sizes, cfg.traces.accept_rank)
    (ctx.work("audits") / "reasoning_traces.json").write_text(json.dumps(found, indent=1))
    verdicts = dict(sorted(Counter(drawn["verdict"].to_pylist()).items()))
    if set(verdicts) == {"failed"}:
        raise EngineError(f"{spec.name} failed on every request, such as: {drawn['reason'][0]}")
    ctx.log(f"reasoning_traces by {spec.name}: {drawn.num_rows} samples of {len(ids)} requests: {verdicts}")
    tokens = sum(drawn["prompt_tokens"].to_pylist()) + sum(drawn["completion_tokens"].to_pylist())
    return Result(rows_in=len(ids), rows_out=added, tokens=tokens, detail={"teacher": spec.name, **verdicts})


def chosen(cfg: Config, ctx: Context) -> list[str]:
    """Requests to sample: those with something relevant in the list, and some of the others. Raises MissingInputError for none."""
    table = ctx.lake.read("candidates", ["request_id", "grades"], order_by=["request_id"], split="rerank")
    with_target: list[str] = []
    without: list[str] = []
    for request, grades in zip(table["request_id"].to_pylist(), table["grades"].to_pylist(), strict=True):
        (with_target if any(grades) else without).append(request)
    if not with_target:
        raise MissingInputError(
            "no list of split rerank holds its target: nothing to learn from; raise candidates.n or train midtrain longer"
        )
    return sample(with_target, cfg.traces.max_requests, cfg.seed, "traces") + (
        sample(without, cfg.traces.no_target_requests, cfg.seed, "no_target") if cfg.traces.no_target_requests else []
    )


# -- the teacher ------------------------------------------------------------------------------------------------------


def teacher(cfg: Config, ctx: Context) -> Spec:
    """The profile's teacher. Its name ends in a hash of what decides its draws and their verdicts.

    That is settings, seed, patterns of leaks, and the model or what the program was fitted on.
    """
    template = template_of(cfg.prompt, cfg.traces.template)
    settings = [
        cfg.seed,
        cfg.traces.model_dump(mode="json", include=set(DRAWN_BY)),
        cfg.prompt.model_dump(mode="json"),
        template.digest,
        DIGEST,
    ]
    if cfg.traces.teacher == "evidence":
        judge, name = boosted(ctx)
        return Spec("evidence", f"{name.partition('@')[0]}@{_digest(settings, name)}", judge=judge, template=template)
    if not cfg.traces.model:
        raise ConfigError(f"traces.teacher is {cfg.traces.teacher}: name its model in traces.model")
    if cfg.traces.teacher == "openai":
        return Spec("openai", f"openai:{cfg.traces.model}@{_digest(settings, cfg.traces.url)}")
    path, identity = cfg.traces.model, cfg.traces.model
    if (ctx.root / "models" / path / "current.json").exists():  # a model of this root by name
        found = artifacts.resolve(ctx.root, path)
        path, identity = str(found.path), found.id
    return Spec("vllm", f"vllm:{cfg.traces.model}@{_digest(settings, identity)}", path=path)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


# -- sampling, on a worker --------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One request while it is sampled."""

    place: int
    row: dict[str, Any]
    target: str | None  # the most relevant candidate
    accepted: int = 0
    closed: bool = False


class Sampler:
    """Asks a teacher in rounds of attempts and judges what comes back. Deterministic but for the engine and the clock."""

    def __init__(self, cfg: Config, engine: Engine, teacher: str, tokenizer: Any, requests: Requests) -> None:
        self.cfg, self.engine, self.teacher, self.requests = cfg, engine, teacher, requests
        self.place_of = {request: place for place, request in enumerate(requests.ids)}
        self.template = template_of(cfg.prompt, cfg.traces.template)
        self.tokenizer = tokenizer  # the student's: counts the tokens of a program's texts
        self.own = getattr(engine, "tokenizer", None) or tokenizer  # the teacher's: applies its chat template

    def samples(self, request_ids: list[str]) -> list[dict[str, Any]]:
        """Rows of `reasoning_traces` of some of the requests."""
        cases = []
        for place in map(self.place_of.__getitem__, request_ids):
            row = self.requests.rows_of(place)
            cases.append(Case(place, row, most_relevant(row["candidate_ids"], row["grades"])))
        rows: list[dict[str, Any]] = []
        if self.cfg.traces.mode != "targeted":
            for attempt in range(1, self.cfg.traces.max_attempts + 1):
                rows += self._round([c for c in cases if not c.closed], attempt, "rejection")
        if self.cfg.traces.mode != "rejection":
            rows += self._round([c for c in cases if c.target], 1, "targeted")
        return rows

    def _round(self, cases: list[Case], attempt: int, mode: SamplingMode) -> list[dict[str, Any]]:
        """One attempt at each open request."""
        shown = [self.requests.view(case.place, case.row, attempt) for case in cases]
        asks = [self._ask(case, view, attempt, mode) for case, view in zip(cases, shown, strict=True)]
        answers = self.engine.generate(asks) if asks else []
        rows = [
            self._row(case, view, ask, answer, attempt, mode) for case, view, ask, answer in zip(cases, shown, asks, answers, strict=True)
        ]
        self._count_tokens(rows, asks)
        if mode == "rejection":
            for case, row in zip(cases, rows, strict=True):
                case.accepted += row["verdict"] == "accepted"
                case.closed = row["verdict"] == "no_target" or case.accepted >= self.cfg.traces.accepted_per_request
        return rows

    def _ask(self, case: Case, view: View, attempt: int, mode: SamplingMode) -> Ask:
        target = case.target if mode == "targeted" else None
        messages = render(view, self.template, "think", target)
        request = case.row["request_id"]
        return Ask(
            key=request,
            prompt=prompt_text(self.own, messages),
            max_tokens=self.cfg.traces.max_tokens,
            temperature=self.cfg.traces.temperature,
            seed=seed_of(self.cfg.seed, request, mode, attempt),
            view=view,
            target=target,
            user=case.row["user_id"],
            messages=tuple(messages),
        )

    def _row(self, case: Case, view: View, ask: Ask, answer: Answer, attempt: int, mode: SamplingMode) -> dict[str, Any]:
        verdict, reason, order = judge(answer, view, case.row["grades"], self.cfg.traces.accept_rank)
        grades = dict(zip(case.row["candidate_ids"], case.row["grades"], strict=True))
        prompt = hash_of(ask.messages, self.template)
        identity = [ask.key, self.teacher, mode, str(attempt), prompt]
        if verdict == "failed":
            identity.append(reason)  # so that a later run, with the engine well again, can add the sample
        return {
            "sample_id": hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24],
            "request_id": ask.key,
            "teacher": self.teacher,
            "mode": mode,
            "attempt": attempt,
            "seed": ask.seed,
            "prompt_name": self.template.name,
            "prompt_hash": prompt,
            "labels": list(view.labels),
            "shown": list(view.shown),
            "text": answer.text,
            "answer": order,
            "verdict": verdict,
            "reason": reason,
            "target_rank": rank_of(order, grades) if order else None,
            "incoming_rank": rank_of(case.row["candidate_ids"], grades),
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "cost": answer.cost,
            "seconds": answer.seconds,
        }

    def _count_tokens(self, rows: list[dict[str, Any]], asks: list[Ask]) -> None:
        """A program reads and writes no tokens: its texts are counted in the student's vocabulary."""
        if any(row["completion_tokens"] for row in rows):
            return
        counts = (encode_all(self.tokenizer, texts) for texts in ([a.prompt for a in asks], [r["text"] for r in rows]))
        for row, prompt, text in zip(rows, *counts, strict=True):
            row["prompt_tokens"], row["completion_tokens"] = len(prompt), len(text)


# -- judging ----------------------------------------------------------------------------------------------------------


def judge(answer: Answer, view: View, grades: list[int], accept_rank: int) -> tuple[str, str, list[str] | None]:
    """(verdict, reason, order of item ids or None) of one sample. `grades`: relevance of the candidates in incoming order."""
    if answer.error:
        return "failed", answer.error, None
    parsed = parse(answer.text, view.labels, "think")
    if parsed.order is None:
        return "refused", parsed.status, None
    order = [view.item_of(label) for label in parsed.order]
    if leak := leak_of(parsed.thought):
        return "refused", f"leak:{leak}", order
    rank = rank_of(order, dict(zip((c.item_id for c in view.candidates), grades, strict=True)))
    if rank is None:
        return "no_target", "", order
    return ("accepted", "", order) if rank <= accept_rank else ("refused", f"rank_{rank}", order)


def rank_of(order: list[str], grades: dict[str, int]) -> int | None:
    """Place, from 1, of the first of the most relevant items; None where nothing is relevant."""
    top = max(grades.values())
    return next(place for place, item in enumerate(order, 1) if grades[item] == top) if top > 0 else None


def most_relevant(items: list[str], grades: list[int]) -> str | None:
    """The item that a targeted prompt names: the first of the most relevant ones."""
    return items[grades.index(max(grades))] if any(grades) else None


def hash_of(messages: Any, template: Template) -> str:
    """Hash of a prompt as messages: the same whatever chat template a teacher's vocabulary brings."""
    return prompt_hash(template, "\n".join(str(m["content"]) for m in messages))
