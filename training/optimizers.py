"""The optimizer of a training: AdamW for all, or Muon for the matrices of the layers beside AdamW for the rest.

Muon (Jordan et al. 2024) replaces a matrix's averaged gradient by the nearest orthogonal one, so that all directions move alike. Small
models learn to read prompts in two thirds of the steps with it (docs/log.md). It is not for tables, of tokens or of items, whose rows are
read one at a time, nor for the head; and it needs whole matrices, which ZeRO splits: `zero_stage: 0`.

The steps are those of `torch.optim.Muon`, to which a test compares them, but for one thing: that multiplies in bf16 on any machine, and a
processor without units for it would spend nine tenths of a training there.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gr2.config import Training
from scoring.model import multiplies_bf16

BETA1, MOMENTUM = 0.9, 0.95
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # of a quintic that is steep at zero (Jordan et al. 2024)
ADAMW_STATE, MUON_STATE = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)


def orthogonal(matrix_RC: torch.Tensor) -> torch.Tensor:
    """About the nearest orthogonal matrix, singular values between .7 and 1.2, by Newton and Schulz's iteration (Jordan et al. 2024)."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix_RC.T if len(matrix_RC) > matrix_RC.shape[1] else matrix_RC
    found = wide.bfloat16() if multiplies_bf16(matrix_RC.device.type) else wide
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if wide is not matrix_RC else found


class Matrices(torch.optim.Optimizer):
    """Muon's steps with Nesterov's momentum, as long as AdamW's would be (Liu et al. 2025, equation 4): one learning rate serves both."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in (p for p in group["params"] if p.grad is not None):
                state = self.state[matrix]
                mean = state.setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
                mean.lerp_(matrix.grad, 1 - MOMENTUM)
                step = orthogonal(matrix.grad.lerp(mean, MOMENTUM))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(step, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))
        return None


class Muon(torch.optim.Optimizer):
    """Muon for `matrices` and `adamw` for what else is trained, as one optimizer: groups and state are theirs."""

    def __init__(self, matrices: list[torch.Tensor], adamw: torch.optim.AdamW, settings: Training) -> None:
        muon = Matrices(matrices, {"lr": settings.lr, "weight_decay": settings.weight_decay})
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
