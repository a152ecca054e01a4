"""The optimizer of a training: AdamW for all, or Muon for the matrices of the layers beside AdamW for the rest.

Muon (Jordan et al. 2024; `torch.optim.Muon`) replaces a matrix's averaged gradient by the nearest orthogonal one, so that all directions
move alike. Small models learn to read prompts in two thirds of the steps with it (docs/log.md). It is not for tables, of tokens or of
items, whose rows are read one at a time, nor for the head; and it needs whole matrices, which ZeRO splits: `zero_stage: 0`.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gr2.config import Training

BETA1, MOMENTUM = 0.9, 0.95
ADAMW_STATE, MUON_STATE = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` for `matrices` and `adamw` for what else is trained, as one optimizer: groups and state are theirs.

    Steps of a matrix are as long as AdamW's would be (Liu et al. 2025, equation 4), so one learning rate serves both.
    """

    def __init__(self, matrices: list[torch.Tensor], adamw: torch.optim.AdamW, settings: Training) -> None:
        muon = torch.optim.Muon(
            matrices, lr=settings.lr, weight_decay=settings.weight_decay, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
        )
        self.parts, self.own = (muon, adamw), {id(matrix) for matrix in matrices}
        super().__init__([group for part in self.parts for group in part.param_groups], adamw.defaults)
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        for part in self.parts:
            part.step()
        return None


def make_optimizer(module: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """As `settings.optimizer` says. Weight decay for matrices and tables, none for gains."""
    own = layer_matrices(module) if settings.optimizer == "muon" else []
    taken = {id(matrix) for matrix in own}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.lr, betas=(BETA1, settings.beta2), fused=settings.zero_stage < 3
    )
    return Muon(own, adamw, settings) if own else adamw


def layer_matrices(module: nn.Module) -> list[torch.Tensor]:
    """Trained weights of linear maps between states: all but those that share a table with an embedding or give logits."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    heads = {id(m.get_output_embeddings()) for m in module.modules() if isinstance(m, PreTrainedModel)}
    linear = [m.weight for m in module.modules() if isinstance(m, nn.Linear) and id(m) not in heads]
    return [weight for weight in linear if weight.requires_grad and id(weight) not in tables]


def state_of(optimizer: torch.optim.Optimizer, parameter: Any) -> tuple[str, ...]:
    """Names of what the optimizer keeps of a parameter, the count of steps aside."""
    return MUON_STATE if isinstance(optimizer, Muon) and id(parameter) in optimizer.own else ADAMW_STATE
