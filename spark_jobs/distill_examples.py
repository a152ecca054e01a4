"""Stage `distill_examples`: what the best model makes of the re-ranker's own requests, to be imitated without thinking (METHOD 10).

Reads `candidates`, `candidate_features`, `items`, `semantic_ids` (splits `rerank` and `valid`, at most `distill.max_requests`: no label is
needed) and `distill.source`: `evidence`, the program that teaches the traces, or a model of an earlier build. Writes
`distill_examples` (one request and replica; key example_id).
A model thinks first, `distill.thoughts` times. Its order is the mean place over the answers it gives, its label probabilities the mean
of those at the first answer position, after each thought: one thought is all but sure of its leader, several tell how sure the source is.
Where no answer parses, it is asked in `score` mode instead: the row's `source_mode` says so. The program has trees here that go on from
its conditional logit (`scoring.boosted`), and tells its probabilities; who judges a user's lists was fitted on others'.
A rerun is harmless: draws are seeded and the table is replaced whole.

    gr2 stage distill_examples --profile demo
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

import schemas
from gr2.answers import parse
from gr2.config import Config
from gr2.context import Context, Result
from gr2.draws import seed_of
from gr2.prompts import ANSWER_OPEN, END_THINK, View
from schemas.base import INT, STRING, list_of
from schemas.program_lists import TAUGHT
from scoring.boosted import Boosted
from scoring.engine import Ask, Engine
from scoring.model import load_tokenizer
from spark_jobs.engine_pool import Rows, Spec, answered, engine_for, portable
from spark_jobs.program import boosted
from spark_jobs.prompting import render_texts, sample, views
from spark_jobs.publish import publish
from spark_jobs.session import frame_of, read

Shown = Sequence[tuple[dict[str, Any], View]]  # rows of `candidates`, each with a view of it
PROGRAM = "evidence"  # the source that is no model
SCHEMA = schemas.get("distill_examples").arrow()
CHUNK = 512  # prompts rendered at once
ROOM = 4  # tokens beyond thought and answer: the tags and the end
TINY = 1e-30  # a probability that has a logarithm
ASKED = pa.schema(
    [("example_id", STRING), ("request_id", STRING), ("think", STRING), ("prompt", STRING), ("labels", list_of(STRING)), ("ordinal", INT)]
)


def run(cfg: Config, ctx: Context) -> Result:
    """Asks the source, publishes its answers. Raises MissingInputError, EngineError, ModelError (a prompt too long)."""
    there = ctx.lake.read("candidates", ["request_id"], order_by=["request_id"], split=TAUGHT)["request_id"].to_pylist()
    chosen = sample(there, cfg.distill.max_requests, cfg.seed, "distill")
    stream = views(ctx, cfg, TAUGHT, chosen, tuple(range(cfg.distill.replicas)))
    lists = iter(lambda: list(islice(stream, CHUNK)), [])
    return _of_program(cfg, ctx, lists) if cfg.distill.source == PROGRAM else _of_model(cfg, ctx, lists)


def _of_model(cfg: Config, ctx: Context, lists: Iterator[Shown]) -> Result:
    source = ctx.model(cfg.distill.source)
    tokenizer = load_tokenizer(source.path)
    asked = pa.concat_tables([ASKED.empty_table(), *(asks(cfg, tokenizer, chunk) for chunk in lists)])
    ctx.log(f"distill_examples: {asked.num_rows} prompts for {source.id}")
    spec, remote = Spec("vllm", f"vllm:{source.id}", str(source.path)), portable(cfg, ctx)

    def job(_: Rows) -> Callable[[Rows], Rows]:
        return lambda chunk: imitated(engine_for(spec, remote), chunk, remote, source.id)

    salt = f"{source.id} {cfg.digest('seed', 'distill', 'prompt')}"
    with answered(ctx, "distill_examples", asked, job, SCHEMA, salt) as frame:
        rows = publish(ctx, "distill_examples", frame)
    scored = read(ctx, "distill_examples").where("source_mode = 'score'").count()
    return Result(rows_in=asked.num_rows, rows_out=rows, detail={"source": source.id, "did_not_parse": scored})


def _of_program(cfg: Config, ctx: Context, lists: Iterator[Shown]) -> Result:
    tokenizer = load_tokenizer(ctx.model(cfg.distill.start).path)
    judge, name = boosted(ctx)
    found = [pa.Table.from_pylist(judged(judge, name, chunk, cfg, tokenizer), schema=SCHEMA) for chunk in lists]
    rows = publish(ctx, "distill_examples", frame_of(ctx, pa.concat_tables([SCHEMA.empty_table(), *found])))
    return Result(rows_in=rows, rows_out=rows, detail={"source": name})


def judged(judge: Boosted, name: str, chunk: Shown, cfg: Config, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of `distill_examples` as the program's own probabilities have it: it needs no engine, and no thought."""
    made = []
    prompts = render_texts(tokenizer, [view for _, view in chunk], cfg, "score")
    logps = judge.log_probabilities([view.candidates for _, view in chunk], [row["user_id"] for row, _ in chunk])
    for (row, view), prompt, logp_N in zip(chunk, prompts, logps, strict=True):
        best_N = np.argsort(-logp_N, kind="stable")
        made.append(
            {
                **_named(cfg, row),
                "source_model": name,
                "source_mode": "program",
                "prompt": prompt,
                "order": [view.labels[n] for n in best_N],
                "label_logprobs": logp_N[best_N].tolist(),
            }
        )
    return made


def asks(cfg: Config, tokenizer: Any, chunk: Shown) -> pa.Table:
    """Each view in both forms: the prompt that asks for a thought, and the one whose next token is the first label."""
    shown = [view for _, view in chunk]
    think, score = (render_texts(tokenizer, shown, cfg, mode) for mode in ("think", "score"))
    rows = [
        {**_named(cfg, row), "think": thinking, "prompt": direct, "labels": list(view.shown_labels)}
        for (row, view), thinking, direct in zip(chunk, think, score, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=ASKED)


def _named(cfg: Config, row: dict[str, Any]) -> dict[str, Any]:
    example = f"{row['request_id']}#{row['replica']}"
    return {"example_id": example, "request_id": row["request_id"], "ordinal": seed_of("order", cfg.seed, example)}


def imitated(engine: Engine, rows: Sequence[dict[str, Any]], cfg: Config, name: str) -> list[dict[str, Any]]:
    """The rows of `distill_examples`. A row that the engine cannot score at all is left out. Shapes: C contexts, Y labels of the chunk."""
    told = [[(order, context) for order, context in drawn if order] for drawn in thoughts(engine, rows, cfg)]
    contexts = [[context for _, context in drawn] or [row["prompt"]] for row, drawn in zip(rows, told, strict=True)]
    labels = sorted({label for row in rows for label in row["labels"]})
    scores_CY = engine.label_logprobs([context for own in contexts for context in own], labels).astype(np.float64)
    ends = np.cumsum([len(own) for own in contexts])[:-1]
    made = []
    for row, drawn, own_CY in zip(rows, told, np.split(scores_CY, ends), strict=True):
        if not np.isfinite(own_CY).all():
            continue
        score_of = dict(zip(labels, np.log(np.exp(own_CY).mean(axis=0) + TINY).tolist(), strict=True))
        order = sorted(row["labels"], key=lambda label: (sum(own.index(label) for own, _ in drawn), -score_of[label], label))
        made.append(
            {
                "example_id": row["example_id"],
                "request_id": row["request_id"],
                "source_model": name,
                "source_mode": "think" if drawn else "score",
                "prompt": row["prompt"],
                "order": order,
                "label_logprobs": [score_of[label] for label in order],
                "ordinal": row["ordinal"],
            }
        )
    return made


def thoughts(engine: Engine, rows: Sequence[dict[str, Any]], cfg: Config) -> list[list[tuple[tuple[str, ...] | None, str]]]:
    """For each row its draws: (the answer's order, None where it does not parse; the prompt gone on with up to the first label)."""
    limit, count = cfg.prompt.max_thought_tokens + cfg.prompt.max_answer_tokens + ROOM, cfg.distill.thoughts
    asked = [(row, f"{row['example_id']}#{number}") for row in rows for number in range(count)]
    answers = engine.generate(
        [Ask(key, row["think"], limit, cfg.distill.temperature, seed_of("thought", cfg.seed, key)) for row, key in asked]
    )
    drawn = [
        (parse(answer.text, row["labels"], "think").order, row["think"] + answer.text.partition(END_THINK)[0] + END_THINK + ANSWER_OPEN)
        for (row, _), answer in zip(asked, answers, strict=True)
    ]
    return [drawn[start : start + count] for start in range(0, len(drawn), count)]
