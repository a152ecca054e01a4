"""Log-probabilities of groups of rollouts, and the loss of one micro-batch of them. Shared by RL and on-policy distillation.

A group is read as one tree: the prompt once, then every answer to it, each seeing the prompt and itself only. Positions of all answers go
on from the prompt, so their log-probabilities equal those of the separate texts, at a fraction of the tokens.

Shapes: B groups (rows), T tokens of a row, M learned tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from gr2.config import RL
from scoring.model import autocast, hidden_states
from training import losses
from training.data import Batch
from training.loop import LossFn, state_logprobs
from training.rollouts import Rollout


@dataclass(frozen=True)
class Tree(Batch):
    """Groups as rows: segment 0 is the prompt, 1.. its answers, -1 filling; weights are 1 on the answers' tokens.

    `extra`: source (place whose output predicts the token), index (of the rollout), sampler (its log-probability), advantage.
    """

    @property
    def learned_BT(self) -> torch.Tensor:
        """The tokens of the answers."""
        return self.segment_ids_BT > 0

    def mask_B1TT(self) -> torch.Tensor:
        """True where a token may look: earlier in its own segment or in the prompt."""
        own_BTT = self.segment_ids_BT[:, :, None] == self.segment_ids_BT[:, None, :]
        prompt_BTT = (self.segment_ids_BT[:, :, None] > 0) & (self.segment_ids_BT[:, None, :] == 0)
        return (own_BTT | prompt_BTT).tril()[:, None]


def trees(rollouts: Sequence[Rollout], tokens_per_batch: int) -> list[Tree]:
    """The used rollouts as micro-batches of like length, at most `tokens_per_batch` tokens each (one group at least)."""
    groups: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        if rollout.used:
            groups.setdefault(rollout.prompt_id, []).append(index)
    rows = [_row(rollouts, members) for members in groups.values()]
    rows.sort(key=lambda row: len(row["input_ids"]), reverse=True)
    return [_tree(rows[start:end]) for start, end in _cuts([len(row["input_ids"]) for row in rows], tokens_per_batch)]


def _row(rollouts: Sequence[Rollout], members: Sequence[int]) -> dict[str, np.ndarray]:
    prompt = rollouts[members[0]].prompt_token_ids
    parts: dict[str, list[Any]] = {"input_ids": list(prompt), "position_ids": list(range(len(prompt)))}
    parts |= {"segment_ids": [0] * len(prompt), "source": [0] * len(prompt), "index": [-1] * len(prompt)}
    parts |= {"sampler": [0.0] * len(prompt), "advantage": [0.0] * len(prompt)}
    for segment, index in enumerate(members, 1):
        rollout = rollouts[index]
        start, count = len(parts["input_ids"]), len(rollout.token_ids)
        parts["input_ids"] += rollout.token_ids
        parts["position_ids"] += range(len(prompt), len(prompt) + count)
        parts["segment_ids"] += [segment] * count
        parts["source"] += [len(prompt) - 1, *range(start, start + count - 1)][:count]
        parts["index"] += [index] * count
        parts["sampler"] += rollout.logprobs
        parts["advantage"] += [rollout.advantage] * count
    return {name: np.array(values) for name, values in parts.items()}


def _cuts(lengths: Sequence[int], budget: int) -> Iterator[tuple[int, int]]:
    """Slices of descending lengths whose padded size stays within the budget."""
    start = 0
    while start < len(lengths):
        end = min(len(lengths), start + max(1, budget // lengths[start]))
        yield start, end
        start = end


def _tree(rows: Sequence[dict[str, np.ndarray]]) -> Tree:
    def filled(name: str, fill: float, kind: torch.dtype) -> torch.Tensor:
        table = torch.full((len(rows), len(rows[0]["input_ids"])), fill, dtype=kind)
        for place, row in enumerate(rows):
            table[place, : len(row[name])] = torch.from_numpy(row[name])
        return table

    segment_ids_BT = filled("segment_ids", -1, torch.long)
    weights_BT = (segment_ids_BT > 0).float()
    extra = {name: filled(name, 0, torch.long) for name in ("source", "index")}
    extra |= {name: filled(name, 0.0, torch.float32) for name in ("sampler", "advantage")}
    tokens = {"input_ids_BT": filled("input_ids", 0, torch.long), "position_ids_BT": filled("position_ids", 0, torch.long)}
    return Tree(**tokens, segment_ids_BT=segment_ids_BT, weights_BT=weights_BT, extra=extra, norm=float(weights_BT.sum()))


def tree_logprobs(model: Any, tree: Tree, temperature: float = 1.0) -> torch.Tensor:
    """logp_BT: log-probability of each answer token given its own answer so far and the prompt; 0 elsewhere."""
    hidden_BTD = hidden_states(
        model, input_ids=tree.input_ids_BT, position_ids=tree.position_ids_BT, attention_mask=tree.mask_B1TT(), use_cache=False
    ).last_hidden_state
    learned_BT = tree.learned_BT
    rows_M = learned_BT.nonzero()[:, 0]
    hidden_MD = hidden_BTD[rows_M, tree.extra["source"][learned_BT]]
    logps_M = state_logprobs(model, hidden_MD, tree.input_ids_BT[learned_BT], temperature)
    return torch.zeros_like(tree.weights_BT).masked_scatter(learned_BT, logps_M)


@torch.no_grad()
def add_logprobs(batches: Sequence[Tree], name: str, model: Any, temperature: float, bf16: bool) -> None:
    """Scores every answer token with a model that is not trained here, into `extra[name]`: the teacher, or the policy before its update."""
    model.eval()
    for tree in batches:
        with autocast(model, bf16):
            moved = cast(Tree, tree.to(model.device))
            tree.extra[name] = tree_logprobs(model, moved, temperature).cpu()


def policy_loss(
    settings: RL, rank_weight: float, opd: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None, ratios: "Ratios"
) -> LossFn:
    """The loss function of one micro-batch: DAPO over ranking advantages, plus the teacher's token advantages where `opd` makes them.

    The policy that sampled is `extra["old"]` where a step makes several updates; with one, it is the policy at hand.
    """

    def loss_fn(model: Any, tree: Tree) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        logp_BT = tree_logprobs(model, tree, settings.temperature)
        old_BT = tree.extra.get("old", logp_BT.detach())
        mask_BT, sampler_BT = tree.weights_BT, tree.extra["sampler"]
        correction_BT = losses.truncated_ratio(old_BT, sampler_BT, settings.truncate_ratio)
        advantages_BT = rank_weight * tree.extra["advantage"]
        floats: dict[str, float | torch.Tensor] = {}
        if opd is not None:
            taught_BT = opd(old_BT, tree.extra["teacher"])
            advantages_BT = advantages_BT + taught_BT
            floats["reverse_kl"] = ((old_BT - tree.extra["teacher"]) * mask_BT).sum() / tree.norm
        loss = losses.dapo_loss(
            logp_BT,
            old_BT,
            advantages_BT,
            mask_BT,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            correction_BT=correction_BT,
            tokens=tree.norm,
        )
        ratio_BT = torch.exp(old_BT - sampler_BT)
        ratios.add(tree, ratio_BT)
        floats["ratio"] = (ratio_BT * mask_BT).sum() / tree.norm
        floats["truncated"] = ((ratio_BT > settings.truncate_ratio) * mask_BT).sum() / tree.norm
        moved_BT = (torch.exp(logp_BT.detach() - old_BT) - 1.0) * advantages_BT.sign()
        floats["clipped"] = (
            ((moved_BT > settings.clip_high) | (moved_BT > settings.clip_low) & (advantages_BT < 0)) * mask_BT
        ).sum() / tree.norm
        return loss, floats

    return loss_fn


class Ratios:
    """Mean ratio of trainer to sampler probability of each rollout, gathered while the losses are computed."""

    def __init__(self) -> None:
        self.sums: dict[int, float] = {}
        self.counts: dict[int, int] = {}

    def add(self, tree: Tree, ratio_BT: torch.Tensor) -> None:
        """Takes in one micro-batch; a rollout's first update counts."""
        learned_BT = tree.learned_BT
        index_M, ratio_M = tree.extra["index"][learned_BT].cpu(), ratio_BT[learned_BT].detach().float().cpu()
        sums, counts = torch.bincount(index_M, ratio_M), torch.bincount(index_M)
        for index in index_M.unique().tolist():
            if index not in self.sums:
                self.sums[index], self.counts[index] = float(sums[index]), int(counts[index])

    def of(self, index: int) -> float | None:
        """The mean ratio of a rollout; None where it was not trained on."""
        return self.sums[index] / self.counts[index] if index in self.sums else None
