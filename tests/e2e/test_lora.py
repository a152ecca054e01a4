"""LoRA: only the adapter learns, a killed training goes on bit for bit, and what is exported is the merged, plain model."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gr2.config import Training, load
from gr2.errors import ConfigError, EnvironmentProblem
from gr2.sections import Lora
from scoring.model import build_model
from tests.e2e.loop_world import FAST, TINY, Stop, examples, loss_fn, plain_logits, run, same_weights, stop_after
from training import checkpoints
from training.data import batches, pack
from training.loop import Engine

pytestmark = pytest.mark.e2e
ADAPTER = Lora(rank=4, alpha=8)
SETTINGS = FAST.model_copy(update={"lora": ADAPTER, "max_steps": 20})


def copy_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@pytest.mark.parametrize("tables", [False, True])
def test_only_the_adapter_learns_and_the_export_is_the_merged_model(tokenizer: Any, tmp_path: Path, tables: bool) -> None:
    model = build_model(TINY.model_copy(update={"dropout": 0.0}), tokenizer, None, seed=7)
    base = copy_of(model.state_dict())
    engine = Engine(model, SETTINGS.model_copy(update={"lora": ADAPTER.model_copy(update={"tables": tables})}), 20, seed=3)
    stream = iter(batches(pack(examples(), 48), 192, seed=9))
    losses = [engine.backward_and_step(loss_fn, [next(stream)])["loss"] for _ in range(20)]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.1
    learned = copy_of(dict(model.named_parameters()))
    engine.close()

    moved = [n for n in base if n.endswith(("embed_tokens.weight", "lm_head.weight"))] if tables else []
    expected = {}
    for name, weight in base.items():
        stem = name.removesuffix(".weight")
        expected[name] = model.state_dict()[name] if name in moved else weight
        if any(stem.endswith(target) for target in ADAPTER.targets):
            assert torch.equal(learned[f"{stem}.base_layer.weight"], weight), "the base moved"
            delta = 2.0 * learned[f"{stem}.lora_B.default.weight"] @ learned[f"{stem}.lora_A.default.weight"]
            assert delta.abs().max() > 1e-4
            expected[name] = weight + delta
    assert all(not torch.equal(model.state_dict()[name], base[name]) for name in moved)
    assert expected.keys() == model.state_dict().keys()
    for name, weight in expected.items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-6, rtol=0)
    if not tables:
        logits = model(**tokenizer("some words", return_tensors="pt")).logits.detach().double()
        assert plain_logits(model, tokenizer, tmp_path) == pytest.approx(float(logits.sum()), abs=1e-3)


@pytest.mark.parametrize(("stage", "average"), [(1, 0.9), (3, 0.0)])
def test_a_stopped_adapter_goes_on_bit_for_bit(tokenizer: Any, tmp_path: Path, stage: int, average: float) -> None:
    from safetensors import safe_open

    settings = SETTINGS.model_copy(update={"zero_stage": stage, "average": average, "checkpoint_every": 4, "max_steps": 12})
    whole, curve = run(tokenizer, tmp_path / "whole", settings)
    home = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        run(tokenizer, tmp_path / "stopped", settings, loss=stop_after(7), checkpoint=home, fingerprint="a")
    stored = set(safe_open(home / "step-000004" / "state-00001.safetensors", "pt").keys())
    assert stored
    assert all("lora_" in name for name in stored), "the frozen base is not stored again"
    resumed, again = run(tokenizer, tmp_path / "resumed", settings, checkpoint=home, fingerprint="a")
    assert again == curve
    assert same_weights(resumed, whole)
    assert checkpoints.latest(home) == home / "step-000008"


def test_impossible_adapters_are_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets: .*absent_proj"):
        Engine(build_model(TINY, tokenizer, None, seed=7), Training(lora=Lora(targets=("absent_proj",))), 1)
    with pytest.raises(ConfigError, match="leave out processes, lora"):
        load("demo", ["rl.student.lora={rank: 8}"])
    with pytest.raises(ConfigError, match=r"lora\.tables"):
        load("demo", ["midtrain.teacher.lora={rank: 8}"])
    assert load("demo", ["midtrain.teacher.lora={rank: 8, tables: true}"]).midtrain.teacher.lora == Lora(rank=8, tables=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EnvironmentProblem, match="--extra lora"):
        Engine(build_model(TINY, tokenizer, None, seed=7), SETTINGS, 1)
