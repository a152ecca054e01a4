"""Stage `sft_examples`: accepted traces as training texts, and drills beside them (METHOD 7).

Reads    `reasoning_traces` (today's teacher), `candidates`, `candidate_features`, `items`, `semantic_ids` (split rerank); the vocabulary
         of `midtrain`.
Writes   `sft_examples`: one training text; key example_id = hash of sample and mode. Replaced whole.
Rerun    every choice is a hash of the sample's id, so equal traces give equal examples.

An accepted trace becomes a `think` example, a `direct` one (same order, empty thought), or both: `sft.modes` are shares of the traces. A
trace whose request shows another list today, or whose thought exceeds the student's budget, is left out and counted. With `sft.no_target`
what the teacher wrote of lists without their target is taught too, marked as such: it is true of its evidence, but nothing proves its
choice. `sft.drills` made-up lists (`gr2.drills`) teach models from scratch to read; they name no request.

    gr2 stage sft_examples --profile demo
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gr2.answers import parse
from gr2.config import Config
from gr2.context import Context, Result
from gr2.draws import seed_of, share_of
from gr2.drills import drill
from gr2.errors import AuditError
from gr2.prompts import EMPTY_THOUGHT, View, format_answer, format_thought, render
from scoring.model import encode_all, load_tokenizer
from spark_jobs.prompting import Requests, catalogue, render_texts, sample, template_of
from spark_jobs.publish import publish_rows
from spark_jobs.reasoning_traces import hash_of, most_relevant, teacher

CHUNK = 512
COLUMNS = ["sample_id", "request_id", "mode", "attempt", "prompt_hash", "text", "verdict"]


def run(cfg: Config, ctx: Context) -> Result:
    """Renders the accepted traces and publishes. Raises AuditError where there is none, MissingInputError."""
    wanted = ["rejection", "targeted"] if cfg.sft.traces == "both" else [cfg.sft.traces]
    name = teacher(cfg, ctx).name
    verdicts = ["accepted", *(["no_target"] if cfg.sft.no_target else [])]
    traces = ctx.lake.read("reasoning_traces", COLUMNS, order_by=["request_id", "sample_id"], teacher=name, verdict=verdicts, mode=wanted)
    traces = taken(traces, cfg.sft.max_traces, cfg.seed)
    left_out: Counter[str] = Counter()
    tokenizer = load_tokenizer(ctx.model("midtrain").path)
    rows = list(examples(ctx, cfg, tokenizer, traces.to_pylist(), left_out))
    if not rows:
        raise AuditError(
            f"no usable trace of {name} in mode {cfg.sft.traces}: {traces.num_rows} accepted, left out {dict(left_out)}; "
            "look at reasoning_traces, raise traces.max_attempts, or check traces.mode against sft.traces"
        )
    rows += drills(ctx, cfg, tokenizer)
    count = publish_rows(ctx, "sft_examples", rows)
    taught_as = Counter("drill" if r["source"] == "drill" else r["mode"] for r in rows)
    unproven = sum(r["source"] == "no_target" for r in rows)
    detail = {**{f"left_out_{k}": v for k, v in left_out.items()}, **taught_as, **({"unproven": unproven} if unproven else {})}
    ctx.log(f"sft_examples: {count} from {traces.num_rows} traces of {name}: {detail}")
    return Result(rows_in=traces.num_rows, rows_out=count, detail=detail)


def taken(traces: pa.Table, most: int, seed: int) -> pa.Table:
    """A seeded sample of traces, in their order; all where `most` is 0."""
    chosen = sample(traces["sample_id"].to_pylist(), most, seed, "traces taught")
    return traces.filter(pc.is_in(traces["sample_id"], value_set=pa.array(chosen, traces.schema.field("sample_id").type)))


def examples(ctx: Context, cfg: Config, tokenizer: Any, traces: list[dict[str, Any]], left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Rows of `sft_examples`; what cannot be used is counted by reason in `left_out`."""
    usable = list(_usable(ctx, cfg, traces, left_out))
    for start in range(0, len(usable), CHUNK):
        chunk = usable[start : start + CHUNK]
        lengths = encode_all(tokenizer, [thought for _, _, thought, _ in chunk])
        for mode in ("think", "direct"):
            picked = []
            for entry, ids in zip(chunk, lengths, strict=True):
                if not taught(entry[0]["sample_id"], mode, cfg):
                    continue
                if mode == "think" and len(ids) > cfg.prompt.max_thought_tokens:
                    left_out["long_thought"] += 1
                    continue
                picked.append(entry)
            texts = render_texts(tokenizer, [view for _, view, _, _ in picked], cfg, mode, filled=False)
            for (trace, _, thought, order), prompt in zip(picked, texts, strict=True):
                proven = trace["mode"] if trace["verdict"] == "accepted" else "no_target"
                source = {"sample_id": trace["sample_id"], "request_id": trace["request_id"], "source": proven}
                yield {**source, **_example(cfg, trace["sample_id"], mode, prompt, thought, order)}


def drills(ctx: Context, cfg: Config, tokenizer: Any) -> list[dict[str, Any]]:
    """Made-up lists over today's catalogue; those whose thought exceeds the budget are left out."""
    if not cfg.sft.drills:
        return []
    items, template = catalogue(ctx), template_of(cfg.prompt)
    limits = {"history": cfg.prompt.history_items, "most": cfg.candidates.n, "ordered": cfg.traces.ordered}
    made = [drill(items, template, f"{cfg.seed}:{number}", **limits) for number in range(cfg.sft.drills)]
    prompts = render_texts(tokenizer, [view for view, _, _ in made], cfg, "think", filled=False)
    rows = []
    for (view, thought, order), prompt, ids in zip(made, prompts, encode_all(tokenizer, [t for _, t, _ in made]), strict=True):
        if len(ids) <= cfg.prompt.max_thought_tokens:
            named = {"sample_id": view.request_id, "request_id": view.request_id, "source": "drill"}
            rows.append({**named, **_example(cfg, view.request_id, "think", prompt, thought, order)})
    return rows


def _example(cfg: Config, sample: str, mode: str, prompt: str, thought: str, order: Sequence[str]) -> dict[str, Any]:
    """What is taught, and its place among the others: a hash of sample and mode."""
    example = hashlib.sha256(f"{sample}\0{mode}".encode()).hexdigest()[:24]
    return {
        "example_id": example,
        "mode": mode,
        "prompt": prompt,
        "reasoning": format_thought(thought) if mode == "think" else EMPTY_THOUGHT,
        "answer": format_answer(order),
        "ordinal": seed_of("order", cfg.seed, example),
    }


def taught(sample_id: str, mode: str, cfg: Config) -> bool:
    """Whether a trace is taught in a mode. Shares are cut from both ends of one draw: 0.6 and 0.4 part them, 1 and 1 use all twice."""
    draw = share_of("mode", cfg.seed, sample_id)
    share = dict(cfg.sft.modes).get(mode, 0.0)  # type: ignore[call-overload]
    return draw < share if mode == "think" else draw >= 1.0 - share


def _usable(
    ctx: Context, cfg: Config, traces: list[dict[str, Any]], left_out: Counter[str]
) -> Iterator[tuple[dict[str, Any], View, str, tuple[str, ...]]]:
    """(trace, its view, thought, labels in order) of traces whose prompt is the one that today's tables give."""
    requests = Requests(ctx, cfg, "rerank", {t["request_id"] for t in traces})
    place_of = {request: place for place, request in enumerate(requests.ids)}
    template = template_of(cfg.prompt, cfg.traces.template)
    for trace in traces:
        place = place_of.get(trace["request_id"])
        if place is None:
            left_out["request_gone"] += 1
            continue
        row = requests.rows_of(place)
        view = requests.view(place, row, trace["attempt"])
        target = most_relevant(row["candidate_ids"], row["grades"]) if trace["mode"] == "targeted" else None
        if hash_of(render(view, template, "think", target), template) != trace["prompt_hash"]:
            left_out["list_changed"] += 1
            continue
        parsed = parse(trace["text"], view.labels, "think")
        if parsed.order is None:
            raise AuditError(
                f"accepted sample {trace['sample_id']} does not parse: {parsed.status}; delete it and run reasoning_traces again"
            )
        yield trace, view, parsed.thought, parsed.order
