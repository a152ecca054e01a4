"""Our DAPO step against TRL's GRPOTrainer (loss_type="dapo") on the same rollouts: advantages, loss and gradients of the whole chain.

TRL is given the rollouts by its own `rollout_func`, so that advantages, old log-probabilities, correction ratios, normaliser and loss are
its own; ours come from `group_advantages`, `trees`, `add_logprobs` and `policy_loss`. What is mapped:

- TRL divides each micro-batch by the tokens of the whole generation batch (`num_items_in_batch`, over processes and accumulation); we
  divide by `norm`, the tokens of the step, which the loop sets. With one process and one generation a step these are one number.
- `epsilon`, `epsilon_high` are clip_low, clip_high; mode "token_truncate" with clip_max is truncate_ratio; scale_rewards is "group".
- Groups without variance: TRL keeps them (advantage 0) and counts their tokens, we draw others. Every group here has variance.
- Overlong answers are paid for in our reward, not in the loss, and so stand in the rewards that both are given.
"""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gr2.config import RL
from scoring.model import build_model, build_vocabulary
from tests.e2e import tiny
from training import losses
from training.policy import Ratios, add_logprobs, policy_loss, trees
from training.rollouts import Rollout

pytestmark = pytest.mark.e2e
PROMPTS, GROUP, MICRO, DRAWS, LONGEST = 3, 4, 2, 12, 14
OURS = RL(clip_low=0.2, clip_high=0.28, truncate_ratio=1.5, temperature=0.8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_vocabulary(["some words to read"] * 3, 300, [], tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def trainer(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer of the tiny model. Its sampler is `rollout_func`; vLLM is only said to be there, which switches the correction on."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer  # takes half a minute, which other tests need not wait for

    settings = GRPOConfig(
        str(tmp_path_factory.mktemp("trl")),
        loss_type="dapo",
        beta=0.0,
        epsilon=OURS.clip_low,
        epsilon_high=OURS.clip_high,
        scale_rewards="group",
        temperature=OURS.temperature,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=OURS.truncate_ratio,
        num_generations=GROUP,
        per_device_train_batch_size=PROMPTS * GROUP // MICRO,
        gradient_accumulation_steps=MICRO,
        max_completion_length=LONGEST,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
    )
    made = GRPOTrainer(
        model=build_model(tiny.SIZE, tokenizer, None, 1),
        reward_funcs=lambda completions, reward, **_: reward,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "x"}]),
        processing_class=tokenizer,
        rollout_func=lambda prompts, trainer: trainer.given,
    )
    made.use_vllm, made._last_loaded_step = True, made.state.global_step
    made.current_gradient_accumulation_steps = MICRO
    return made


def drawn(seed: int, words: int) -> list[Rollout]:
    """Groups with answers of different lengths, rewards that vary, and a sampler that is not quite the model."""
    rng = np.random.default_rng(seed)
    found = []
    for group in range(PROMPTS):
        prompt = tuple(int(t) for t in rng.integers(words, size=rng.integers(3, 9)))
        rewards = torch.from_numpy(rng.permutation(GROUP) + rng.normal(size=GROUP)).float()[None]
        advantages, kept = losses.group_advantages(rewards, scaled=True)
        assert kept.all()
        for sample in range(GROUP):
            tokens = tuple(int(t) for t in rng.integers(words, size=rng.integers(1, LONGEST + 1)))
            found.append(
                Rollout(
                    f"{group}/{sample}", "x", 1, f"p{group}", sample, "", "ok", float(rewards[0, sample]), 0.0, 0.0,
                    float(advantages[0, sample]), True, None, None, None, len(tokens), tokens, (), prompt,
                )
            )  # fmt: skip
    return found


def with_sampler(found: list[Rollout], model: Any, seed: int) -> list[Rollout]:
    """Each token's sampler log-probability: the model's own, jittered so that some ratios pass the cap."""
    rng = np.random.default_rng(seed)
    sampled = []
    for rollout in found:
        ids = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
        with torch.no_grad():
            logp_V = (model(ids).logits[0] / OURS.temperature).log_softmax(-1)
        place = len(rollout.prompt_token_ids)
        own = [float(logp_V[place - 1 + k, t]) for k, t in enumerate(rollout.token_ids)]
        sampled.append(replace(rollout, logprobs=tuple(own - 0.4 * rng.normal(size=len(own)))))
    return sampled


def moved(model: Any, seed: int) -> None:
    """Changes the weights as updates would, far enough for both sides of the clip to act."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.6 * (weight.abs().mean() + 0.02) * torch.randn(weight.shape, generator=generator)


def gradient(model: Any) -> torch.Tensor:
    """All gradients in one row, which are then forgotten."""
    row = torch.cat([w.grad.reshape(-1).double() for w in model.parameters()])
    model.zero_grad(set_to_none=True)
    return row


def of_ours(model: Any, found: list[Rollout], seed: int) -> tuple[float, torch.Tensor, float, float]:
    """Loss and gradient of one step, and the shares of tokens that were clipped and truncated."""
    batches = trees(found, 64)
    assert len(batches) > 1
    add_logprobs(batches, "old", model, OURS.temperature, bf16=False)
    moved(model, seed)
    norm = sum(batch.norm for batch in batches)
    loss_fn, total, clipped, truncated = policy_loss(OURS, 1.0, None, Ratios()), 0.0, 0.0, 0.0
    for batch in batches:
        loss, floats = loss_fn(model, replace(batch, norm=norm))
        loss.backward()
        total, clipped, truncated = total + float(loss.detach()), clipped + float(floats["clipped"]), truncated + float(floats["truncated"])
    return total, gradient(model), clipped, truncated


def of_trl(trainer: Any, found: list[Rollout], seed: int) -> tuple[float, torch.Tensor]:
    """The same of TRL: scored with the weights before they move, then one micro-batch after the other."""
    trainer.given = {
        "prompt_ids": [list(r.prompt_token_ids) for r in found],
        "completion_ids": [list(r.token_ids) for r in found],
        "logprobs": [list(r.logprobs) for r in found],
    }
    trainer._buffered_inputs, trainer._step = None, 0
    inputs = [{"prompt": r.prompt_id, "reward": r.reward} for r in found]
    trainer.model.train()
    total = 0.0
    first = trainer._prepare_inputs(inputs)
    moved(trainer.model, seed)
    for number in range(MICRO):
        trainer._step = number
        batch = first if number == 0 else trainer._prepare_inputs(inputs)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        total += float(loss.detach())
    return total, gradient(trainer.model)


def unbiased(residuals: list[float], floor: float) -> bool:
    """Whether the mean is no further from 0 than chance puts it (four standard errors), or than rounding does."""
    spread = np.std(residuals, ddof=1) / np.sqrt(len(residuals))
    return abs(np.mean(residuals)) <= max(4 * spread, floor)


def test_a_dapo_step_equals_that_of_trl(trainer: Any, tokenizer: Any) -> None:
    start = build_model(tiny.SIZE, tokenizer, None, 1)
    residuals: dict[str, list[float]] = {"loss": [], "along": [], "off": []}
    clipped, truncated = [], []
    for seed in range(DRAWS):
        ours = copy.deepcopy(start)
        trainer.model.load_state_dict(start.state_dict())
        found = with_sampler(drawn(seed, len(tokenizer)), start, seed)
        loss, grad, *shares = of_ours(ours, found, seed)
        theirs, wanted = of_trl(trainer, found, seed)
        scale = wanted.norm()
        residuals["loss"].append(loss - theirs)
        residuals["along"].append(float((grad - wanted) @ wanted / scale**2))  # a factor between them shows here
        residuals["off"].append(float((grad - wanted).norm() / scale))
        clipped.append(shares[0])
        truncated.append(shares[1])
    assert min(clipped) > 0.02, "the clip was not tried"
    assert min(truncated) > 0.02, "nor the cap"
    assert max(map(abs, residuals["loss"])) < 1e-6
    assert max(residuals["off"]) < 1e-5
    assert unbiased(residuals["loss"], 1e-8)
    assert unbiased(residuals["along"], 1e-8)
