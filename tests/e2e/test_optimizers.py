"""Steps are those of a plain torch loop: rates, Muon, clipping, norms; and packing changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.training import one_a_row
from gr2.config import Training
from scoring.model import build_model
from tests.e2e.loop_world import FAST, TINY, examples, loss_fn
from training import optimizers
from training.data import batches, pack, to_batch
from training.loop import Engine, learning_rate

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(("schedule", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.11), ("constant", 1.0, 1.0)])
def test_learning_rate_warms_up_and_falls_to_a_tenth_or_stays(schedule: Any, middle: float, end: float) -> None:
    settings = Training(lr=1.0, warmup=0.1, schedule=schedule)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[55] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(end, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[20] - rates[30] == pytest.approx(rates[60] - rates[70])) == (schedule != "cosine")


@pytest.mark.parametrize("bf16", [True, False])
def test_muon_is_that_of_torch(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    monkeypatch.setattr(optimizers, "multiplies_bf16", lambda kind: bf16)
    torch.manual_seed(3)
    theirs = [torch.randn(shape, requires_grad=True) for shape in ((32, 32), (64, 32), (32, 64))]
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=optimizers.MOMENTUM, adjust_lr_fn="match_rms_adamw")
    own = optimizers.Matrices(ours, {"lr": 0.01, "weight_decay": 0.1})
    for _ in range(5):
        for p, q in zip(theirs, ours, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        reference.step()
        own.step()
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(q, p, **({"rtol": 0, "atol": 0} if bf16 else {"rtol": 1e-3, "atol": 2e-3}))


def without_bias(differences: list[float], scale: float) -> bool:
    """Whether differences are small, and of no one sign: their mean is within four standard errors of zero."""
    error = float(np.std(differences)) / len(differences) ** 0.5
    return max(map(abs, differences)) < scale and abs(float(np.mean(differences))) <= 4 * error + 1e-12


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loop_is_a_plain_torch_loop(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    monkeypatch.setattr(optimizers, "multiplies_bf16", lambda kind: False)  # whose rounding would drown what is looked for
    stage = 0 if optimizer == "muon" else 1
    settings = FAST.model_copy(update={"max_steps": 24, "weight_decay": 0.1, "zero_stage": stage, "optimizer": optimizer})
    shape = TINY.model_copy(update={"dropout": 0.0})
    engine = Engine(build_model(shape, tokenizer, None, seed=7), settings, 24)
    model = build_model(shape, tokenizer, None, seed=7).train()
    own = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2] if optimizer == "muon" else []
    assert len(own) == (2 * 7 if optimizer == "muon" else 0)
    muon = optimizers.Matrices(own, {"lr": 1.0, "weight_decay": 0.1}) if own else None
    rest = [p for p in model.parameters() if not any(p is o for o in own)]
    matrices, gains = ([p for p in rest if (p.ndim > 1) == wide] for wide in (True, False))
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}], betas=(0.9, 0.95))
    both = [o for o in (muon, adamw) if o]
    stream, losses, norms = iter(batches(pack(examples(), 48), 192, seed=9)), [], []
    for step in range(24):
        batch = next(stream)
        line = engine.backward_and_step(loss_fn, [batch])
        for group in [group for each in both for group in each.param_groups]:
            group["lr"] = learning_rate(settings, step, 24)
        loss = loss_fn(model, batch)[0]
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)) - line["grad_norm"])
        for each in both:
            each.step()
            each.zero_grad()
        losses.append(float(loss.detach()) - line["loss"])
    assert without_bias(losses, 1e-3)
    assert without_bias(norms, 1e-2)
    assert line["grad_norm"] > 0


def test_packed_rows_train_like_padded_ones(tokenizer: Any) -> None:
    """Eight examples a step: in a few full rows, or in one row each."""
    shape, settings = TINY.model_copy(update={"dropout": 0.0}), FAST.model_copy(update={"max_steps": 20})
    engines = [Engine(build_model(shape, tokenizer, None, seed=7), settings, 20) for _ in range(2)]
    known, differences = examples(160), []
    for step in range(20):
        part = known[8 * step : 8 * step + 8]
        apart, together = one_a_row(part, 48), pack(part, 48)
        assert len(together) < len(apart) == 8
        packed, alone = (e.backward_and_step(loss_fn, [to_batch(r, slice(None))]) for e, r in zip(engines, (together, apart), strict=True))
        differences.append(packed["loss"] - alone["loss"])
    assert without_bias(differences, 1e-3)
