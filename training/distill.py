"""Stage `distill`: the model `fast`, which ranks from one prefill what its source ranked by thinking (METHOD 10).

Reads `distill_examples` (in the order of `ordinal`) and the model `distill.start`, from which `fast` starts.
Writes the model `fast`: a Hugging Face folder with metrics.jsonl and manifest.json. Where the answer to a prompt without a thought begins,
it learns with what probability the source would choose each label; and, after the first labels of the source's order, each of the rest.
A rerun is harmless, as in the stage `sft`: all is seeded, and the model is published whole.

    gr2 stage distill --profile demo
"""

from typing import Any

import pyarrow as pa
import torch

from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import InputError
from gr2.prompts import ANSWER_SEPARATOR
from scoring.model import encode_all, label_ids, load
from training.data import Batch, Example
from training.fitting import fit
from training.loop import learned_states
from training.losses import soft_label_loss
from training.sft import loader_of, wake
from training.stream import Draws

# What packed rows carry at a learned token: the example's place in the table, by which its order and soft labels are found, and how many
# labels of the order stand before the token.
EXAMPLE, BEFORE = "example", "before"
NEVER = -1e4  # a log-probability whose probability is 0


def run(cfg: Config, ctx: Context) -> Result:
    """Trains `fast`. Raises MissingInputError, InputError (no examples, or lists of unequal length)."""
    table = ctx.lake.read("distill_examples", ["prompt", "order", "label_logprobs"], order_by=["ordinal", "example_id"])
    if not table.num_rows:
        raise InputError("distill_examples is empty: no request of split rerank or valid has a list")
    base = ctx.model(cfg.distill.start)
    model, tokenizer = load(base.path, dropout=cfg.distill.dropout)
    wake(model, tokenizer, base.manifest.get("unread", []), cfg.seed)
    examples, taught = to_examples(tokenizer, table, cfg.distill.places)
    inputs = {"tables": {"distill_examples": ctx.lake.content_version("distill_examples")}, "models": {base.name: base.hash}}
    loader = loader_of(ctx, "fast", Draws([examples], 1, cfg.seed, list), len(examples), cfg.distill.train, cfg.seed)
    summary = fit(cfg, ctx, "distill", "fast", model, tokenizer, loader, cfg.distill.train, taught.loss, inputs)
    detail = {"steps": summary.steps, "loss": round(summary.last_loss, 4)}
    return Result(rows_in=table.num_rows, rows_out=summary.steps, tokens=summary.tokens, detail=detail)


class Taught:
    """What the source said of each example. Shapes: E examples, N labels of the longest list, M learned tokens of a batch, V vocabulary."""

    def __init__(self, ids_EN: torch.Tensor, logp_EN: torch.Tensor) -> None:
        self.ids_EN, self.logp_EN = ids_EN, logp_EN  # best label first; beyond a list's end any label, NEVER said

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        """The distillation loss of one micro-batch, its share of the step."""
        learned_BT = batch.learned_BT
        example_M, before_M = (batch.extra[name][learned_BT].round().long() for name in (EXAMPLE, BEFORE))
        hidden_MD, _ = learned_states(model, batch)
        ids_MN, logp_MN = (table_EN.to(hidden_MD.device)[example_M] for table_EN in (self.ids_EN, self.logp_EN))
        placed_MN = torch.arange(ids_MN.shape[1], device=hidden_MD.device) < before_M[:, None]
        teacher_MN = logp_MN.masked_fill(placed_MN, NEVER)
        student_MN = torch.log_softmax(model.get_output_embeddings()(hidden_MD).float(), dim=-1).gather(1, ids_MN)
        total = (batch.weights_BT[learned_BT] * soft_label_loss(student_MN, teacher_MN)).sum()
        first_M = student_MN.masked_fill(teacher_MN <= NEVER, -torch.inf).argmax(dim=1)  # 0 at the first place alone: then it is placed
        return total / batch.norm, {"same_first": float((first_M == 0).sum()) / batch.norm}


def to_examples(tokenizer: Any, table: pa.Table, places: int) -> tuple[list[Example], Taught]:
    """Prompts, each with the first `places` labels of its order to be learned, and what was said of them.

    The weights of a list's places fall as 1, 1/2, 1/3, ... and add up to 1. Raises InputError for orders and log-probabilities that do not
    agree.
    """
    orders, logps = table["order"].to_pylist(), table["label_logprobs"].to_pylist()
    if any(len(order) != len(logp) or not order for order, logp in zip(orders, logps, strict=True)):
        raise InputError("distill_examples: order and label_logprobs differ in length: run `gr2 stage distill_examples` again")
    names = sorted({label for order in orders for label in order})
    id_of = dict(zip(names, label_ids(tokenizer, names), strict=True))
    answers = [[id_of[label] for label in order] for order in orders]
    widest = max(map(len, answers))
    ids_EN = torch.tensor([ids + ids[:1] * (widest - len(ids)) for ids in answers])
    logp_EN = torch.tensor([logp + [NEVER] * (widest - len(logp)) for logp in logps])
    separator = encode_all(tokenizer, [ANSWER_SEPARATOR])[0]
    prompts = encode_all(tokenizer, table["prompt"].to_pylist())
    examples = []
    for number, (prompt, ids) in enumerate(zip(prompts, answers, strict=True)):
        count = max(1, min(places, len(ids) - 1))  # the last label is what is left
        whole = sum(1 / place for place in range(1, count + 1))
        parts = [((separator, 0.0), ([ids[n]], 1 / (n + 1) / whole)) for n in range(count)]
        segments = [segment for part in parts for segment in part][1:]  # the first label follows the prompt at once
        before = [float(n) for n in range(count) for _ in [*separator, ids[n]]][len(separator) :]
        examples.append(Example(prompt, segments, {EXAMPLE: [float(number)] * len(before), BEFORE: before}))
    return examples, Taught(ids_EN, logp_EN)
