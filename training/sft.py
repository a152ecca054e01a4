"""Stage `sft`: supervised fine-tuning on accepted traces, in both sizes (METHOD 7; GR2, arXiv 2602.07774).

Reads `sft_examples` (in the order of `ordinal`) and the models `midtrain`, `midtrain-teacher`.
Writes the models `sft` and `sft-teacher`: Hugging Face folders with metrics.jsonl (a line a step) and manifest.json.
A rerun is harmless: rows, batches and dropout are seeded, a model is published whole by one rename, and equal weights keep their hash. A
killed run goes on from its last checkpoint, where `sft.*.checkpoint_every` asks for some.

    gr2 stage sft --profile demo
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from gr2.config import Config, Training
from gr2.context import Context, Result
from gr2.errors import InputError
from scoring.model import encode_all, load, token_tables
from training.data import Example, Loader, batches, pack
from training.fitting import fit, supervised
from training.loop import planned_steps, rank, world

STAGE = "sft"
LENGTH = 2.0  # of a row drawn anew, relative to the median of the others


def run(cfg: Config, ctx: Context) -> Result:
    """Trains the student, then the teacher. Raises MissingInputError, InputError (no examples, or one longer than a row)."""
    table = ctx.lake.read("sft_examples", ["prompt", "reasoning", "answer"], order_by=["ordinal"])
    if not table.num_rows:
        raise InputError("sft_examples is empty: no trace was accepted; look at reasoning_traces, or raise traces.max_attempts")
    result = Result(rows_in=table.num_rows)
    sizes = (("sft", "midtrain", cfg.sft.student), ("sft-teacher", "midtrain-teacher", cfg.sft.teacher))
    for name, start, settings in sizes:
        base = ctx.model(start, "midtrain")
        model, tokenizer = load(base.path, dropout=cfg.sft.dropout)
        wake(model, base.manifest.get("unread", []), cfg.seed)
        examples = to_examples(tokenizer, table, cfg.sft.reasoning_weight, cfg.sft.answer_weight)
        inputs = {"tables": {"sft_examples": ctx.lake.content_version("sft_examples")}, "models": {start: base.hash}}
        loader = loader_of(cfg, ctx, name, examples, settings)
        summary = fit(cfg, ctx, STAGE, name, model, tokenizer, loader, settings, supervised, inputs)
        result.tokens += summary.tokens
        result.rows_out += summary.steps
        result.detail[name] = {"steps": summary.steps, "loss": round(summary.last_loss, 4)}
    return result


@torch.no_grad()
def wake(model: Any, unread: Sequence[int], seed: int) -> None:
    """Draws the rows of tokens that mid-training never read anew, twice as long as the others are: so they were learned fastest.

    A softmax pushes all tokens that never come away from every state: after mid-training from scratch, labels and evidence words stand at a
    cosine of 0.96 to each other, and a small model takes very long to tell them apart. Models with a base have no such tokens.
    """
    for table_VD in token_tables(model) if len(unread) else ():
        rest_V = torch.ones(len(table_VD), dtype=torch.bool)
        rest_V[torch.tensor(unread)] = False
        length = LENGTH * table_VD[rest_V].float().norm(dim=1).median()
        drawn_UD = torch.randn(len(unread), table_VD.shape[1], generator=torch.Generator().manual_seed(seed))
        table_VD[torch.tensor(unread)] = (torch.nn.functional.normalize(drawn_UD, dim=1) * length).to(table_VD)


def to_examples(tokenizer: Any, table: pa.Table, reasoning_weight: float, answer_weight: float) -> list[Example]:
    """Texts as training examples: the prompt is read, the thought and the answer (with the end token) are learned at their weights."""
    prompts, thoughts, answers = (encode_all(tokenizer, table[column].to_pylist()) for column in ("prompt", "reasoning", "answer"))
    return [
        Example(prompt, [(thought, reasoning_weight), ([*answer, tokenizer.eos_token_id], answer_weight)])
        for prompt, thought, answer in zip(prompts, thoughts, answers, strict=True)
    ]


def loader_of(cfg: Config, ctx: Context, name: str, examples: Sequence[Example], settings: Training) -> Loader:
    """Examples, packed, as an endless stream of batches; tells the token budget. Raises InputError for one longer than a row."""
    rows = pack(examples, settings.row_tokens, cfg.seed)
    loader = batches(rows, settings.tokens_per_batch, cfg.seed, rank(), world())
    steps = planned_steps(loader, settings)
    budget = steps * settings.accumulation * loader.rows_per_batch * settings.row_tokens
    ctx.log(f"{name}: {len(examples)} examples in {len(rows)} rows ({rows.fill:.0%} full), {steps} steps, about {budget:,} tokens")
    return loader
