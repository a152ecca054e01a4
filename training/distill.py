"""Stage `distill`: the model `fast`, which ranks from one prefill what its source ranked by thinking (METHOD 10).

Reads `distill_examples` (in the order of `ordinal`) and the model `distill.start`, from which `fast` starts.
Writes the model `fast`: a Hugging Face folder with metrics.jsonl and manifest.json. At the first answer position of the prompt without a
thought, it learns the source's label log-probabilities (soft labels) and its order (Plackett-Luce).
A rerun is harmless, as in the stage `sft`: all is seeded, and the model is published whole.

    gr2 stage distill --profile demo
"""

from typing import Any

import pyarrow as pa
import torch

from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import InputError
from scoring.model import encode_all, label_ids, load
from training.data import Batch, Example
from training.fitting import fit
from training.loop import learned_states
from training.losses import distill_loss
from training.sft import loader_of, wake
from training.stream import Draws

# One learned token an example, the first label of the source's order: its place is where the label log-probabilities are read. What the
# packed rows carry there is the example's place in the table, by which its order and soft labels are found.
PLACE = "place"


def run(cfg: Config, ctx: Context) -> Result:
    """Trains `fast`. Raises MissingInputError, InputError (no examples, or lists of unequal length)."""
    table = ctx.lake.read("distill_examples", ["prompt", "order", "label_logprobs"], order_by=["ordinal", "example_id"])
    if not table.num_rows:
        raise InputError("distill_examples is empty: no request of split `rerank` has its target in the list")
    base = ctx.model(cfg.distill.start)
    model, tokenizer = load(base.path, dropout=cfg.distill.dropout)
    wake(model, base.manifest.get("unread", []), cfg.seed)
    examples, taught = to_examples(tokenizer, table)
    inputs = {"tables": {"distill_examples": ctx.lake.content_version("distill_examples")}, "models": {base.name: base.hash}}
    loss_fn = taught.loss_fn(cfg.distill.label_weight, cfg.distill.order_weight)
    loader = loader_of(ctx, "fast", Draws([examples], 1, cfg.seed, list), len(examples), cfg.distill.train, cfg.seed)
    summary = fit(cfg, ctx, "distill", "fast", model, tokenizer, loader, cfg.distill.train, loss_fn, inputs)
    detail = {"steps": summary.steps, "loss": round(summary.last_loss, 4)}
    return Result(rows_in=table.num_rows, rows_out=summary.steps, tokens=summary.tokens, detail=detail)


class Taught:
    """What the source said of each example. Shapes: E examples, N labels of a list (padded), M examples of a batch, V vocabulary."""

    def __init__(self, ids_EN: torch.Tensor, logp_EN: torch.Tensor, counts_E: torch.Tensor) -> None:
        self.ids_EN, self.logp_EN, self.counts_E = ids_EN, logp_EN, counts_E

    def loss_fn(self, label_weight: float, order_weight: float) -> Any:
        """The distillation loss of one micro-batch, its share of the step."""

        def loss(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
            learned_BT = batch.learned_BT
            places_M = batch.extra[PLACE][learned_BT].round().long().cpu()
            hidden_MD, _ = learned_states(model, batch)
            student_MV = torch.log_softmax(model.get_output_embeddings()(hidden_MD).float(), dim=-1)
            total = student_MV.new_zeros(())
            right = 0.0
            for count in self.counts_E[places_M].unique().tolist():  # lists of one length at a time: mostly there is only one
                rows = (self.counts_E[places_M] == count).nonzero()[:, 0]
                ids_RN = self.ids_EN[places_M[rows], :count].to(student_MV.device)
                student_RN = student_MV[rows.to(student_MV.device)].gather(1, ids_RN)
                teacher_RN = self.logp_EN[places_M[rows], :count].to(student_MV.device)
                total = total + len(rows) * distill_loss(student_RN, teacher_RN, label_weight, order_weight)
                right += float((student_RN.argmax(1) == 0).sum())
            return total / batch.norm, {"same_first": right / batch.norm}

        return loss


def to_examples(tokenizer: Any, table: pa.Table) -> tuple[list[Example], Taught]:
    """Prompts as examples of one learned token each, and what was said of them. Raises InputError for lists that do not agree."""
    orders, logps = table["order"].to_pylist(), table["label_logprobs"].to_pylist()
    if any(len(order) != len(logp) or not order for order, logp in zip(orders, logps, strict=True)):
        raise InputError("distill_examples: order and label_logprobs differ in length: run `gr2 stage distill_examples` again")
    names = sorted({label for order in orders for label in order})
    id_of = dict(zip(names, label_ids(tokenizer, names), strict=True))
    widest = max(len(order) for order in orders)
    ids_EN = torch.tensor([[id_of[label] for label in order] + [0] * (widest - len(order)) for order in orders])
    logp_EN = torch.tensor([list(logp) + [0.0] * (widest - len(logp)) for logp in logps])
    prompts = encode_all(tokenizer, table["prompt"].to_pylist())
    examples = [
        Example(prompt, [([id_of[order[0]]], 1.0)], {PLACE: [float(place)]})
        for place, (prompt, order) in enumerate(zip(prompts, orders, strict=True))
    ]
    return examples, Taught(ids_EN, logp_EN, torch.tensor([len(order) for order in orders]))
