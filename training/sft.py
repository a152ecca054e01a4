"""Stage `sft`: supervised fine-tuning on accepted traces, in both sizes (METHOD 7; GR2, arXiv 2602.07774).

Reads `sft_examples` (in the order of `ordinal`) and the models `sft.start` (`midtrain`, or `fast`, which knows already which candidate
is better and has to learn to say why) and `midtrain-teacher`.
Writes the models `sft` and `sft-teacher`: Hugging Face folders with metrics.jsonl (a line a step) and manifest.json.
A rerun is harmless: rows, batches and dropout are seeded, a model is published whole by one rename, and equal weights keep their hash. A
killed run goes on from its last checkpoint, where `sft.*.checkpoint_every` asks for some.

The table is read in windows of at most sft.window_examples examples, over all processes (`training.stream`).

    gr2 stage sft --profile demo
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gr2.config import Config, Training
from gr2.context import Context, Result
from gr2.errors import InputError
from scoring.model import encode_all, graded_ids, load, token_tables
from training.data import Example, Rows, pack, rows_per_batch
from training.fitting import fit, supervised
from training.loop import planned_steps, rank, world
from training.stream import Draws, Epochs, Windows

STAGE = "sft"
ORDINAL_BITS = 31  # `gr2.draws.seed_of`
LENGTH = 2.0  # of a row drawn anew, relative to the median of the others


def run(cfg: Config, ctx: Context) -> Result:
    """Trains the student, then the teacher if any. Raises MissingInputError, InputError (no examples, or one longer than a row)."""
    result = Result()
    sizes = (("sft", cfg.sft.start, cfg.sft.student), ("sft-teacher", "midtrain-teacher", cfg.sft.teacher))
    for name, start, settings in sizes if cfg.models.teacher else sizes[:1]:
        table = windows(cfg, ctx, settings)
        result.rows_in = table.total
        base = ctx.model(start)
        model, tokenizer = load(base.path, dropout=cfg.sft.dropout)
        wake(model, tokenizer, base.manifest.get("unread", []), cfg.seed)
        inputs = {"tables": {"sft_examples": ctx.lake.content_version("sft_examples")}, "models": {start: base.hash}}
        encode = partial(to_examples, tokenizer, reasoning_weight=cfg.sft.reasoning_weight, answer_weight=cfg.sft.answer_weight)
        draws = Draws(table, table.lanes, cfg.seed, encode)
        loader = loader_of(ctx, name, draws, table.total, settings, cfg.seed)
        summary = fit(cfg, ctx, STAGE, name, model, tokenizer, loader, settings, supervised, inputs)
        result.tokens += summary.tokens
        result.rows_out += summary.steps
        result.detail[name] = {"steps": summary.steps, "loss": round(summary.last_loss, 4)}
    return result


@dataclass(frozen=True)
class Lesson:
    """One row of `sft_examples`."""

    prompt: str
    reasoning: str
    answer: str


def windows(cfg: Config, ctx: Context, settings: Training) -> Windows[Lesson]:
    """The examples in order of reading. Raises InputError if there is none."""
    lanes = rows_per_batch(settings.tokens_per_batch, settings.row_tokens, world())
    found = Windows(ctx.lake.dataset("sft_examples"), Lesson, ("ordinal", "example_id"), None, cfg.sft.window_examples, lanes, ORDINAL_BITS)
    if not found.total:
        raise InputError("sft_examples is empty: no trace was accepted; look at reasoning_traces, or raise traces.max_attempts")
    return found


@torch.no_grad()
def wake(model: Any, tokenizer: Any, unread: Sequence[int], seed: int) -> None:
    """Draws the rows of tokens that mid-training never read anew, twice as long as the others are: so they were learned fastest.

    A softmax pushes all tokens that never come away from every state: after mid-training from scratch, labels and evidence words stand at a
    cosine of 0.96 to each other, and a small model takes very long to tell them apart. Models with a base have no such tokens.
    A label with its grade starts as the sum of both: what is learned of one such token holds for its kin (docs/log.md).
    """
    if not unread:
        return
    graded = [(token, *parts) for token, parts in graded_ids(tokenizer).items() if token in unread]
    for table_VD in token_tables(model):
        rest_V = torch.ones(len(table_VD), dtype=torch.bool)
        rest_V[torch.tensor(unread)] = False
        length = LENGTH * table_VD[rest_V].float().norm(dim=1).median()
        drawn_UD = torch.randn(len(unread), table_VD.shape[1], generator=torch.Generator().manual_seed(seed))
        table_VD[torch.tensor(unread)] = (torch.nn.functional.normalize(drawn_UD, dim=1) * length).to(table_VD)
        for token, label, grade in graded:
            table_VD[token] = table_VD[label] + table_VD[grade]


def to_examples(tokenizer: Any, lessons: Sequence[Lesson], reasoning_weight: float, answer_weight: float) -> list[Example]:
    """Texts as training examples: the prompt is read, the thought and the answer (with the end token) are learned at their weights."""
    prompts, thoughts, answers = (encode_all(tokenizer, [getattr(x, part) for x in lessons]) for part in ("prompt", "reasoning", "answer"))
    return [
        Example(prompt, [(thought, reasoning_weight), ([*answer, tokenizer.eos_token_id], answer_weight)])
        for prompt, thought, answer in zip(prompts, thoughts, answers, strict=True)
    ]


def loader_of(ctx: Context, name: str, draws: Draws[Any, list[Example]], count: int, settings: Training, seed: int) -> Epochs:
    """Examples, packed anew each epoch, as endless batches; tells the token budget. Raises InputError for one longer than a row."""

    def make(number: int) -> Rows:
        return pack(draws[number], settings.row_tokens, seed + number)

    loader = Epochs(make, settings.tokens_per_batch, seed, rank=rank(), world=world(), lanes=draws.lanes, windows=len(draws.windows))
    steps = planned_steps(loader, settings)
    budget = steps * settings.accumulation * loader.rows_per_batch * settings.row_tokens
    ctx.log(f"{name}: {count} examples in {loader.count} rows ({loader.fill:.0%} full), {steps} steps, about {budget:,} tokens")
    return loader
