"""Stage `rl`: DAPO with verifiable rewards (METHOD 8; DAPO, arXiv 2503.14476), the teacher's size first, then the student's.

Reads `rl_prompts` and the models `sft-teacher`, `sft` (with rl.start = midtrain those before SFT). Writes the models `rl-teacher` and `rl`,
and each step's rollouts as `work/rollouts/<run>/step-*.arrow`, which the stage `rollouts` publishes; `run` is the model's name and its
fingerprint, a hash of inputs, settings and code.

A step: groups are sampled by an engine that holds the current weights, judged, stored, then trained on token in, token out. The checkpoint
that ranks held-out `valid` prompts best is exported; the model it started from is one of the candidates, so RL never exports worse than SFT
there.
A rerun is harmless, and a kill loses nothing but the step at hand: training repeats from the stored rollouts, bit for bit, and only steps
without any are sampled. Sampling itself repeats as far as the engine does: on one machine with the same batches.

    gr2 stage rl --profile demo
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gr2 import artifacts
from gr2.config import Config, Training
from gr2.context import Context, Result
from gr2.errors import ModelError
from scoring.engine import Answer, Ask
from scoring.model import load, save
from scoring.vllm_engine import VLLMEngine
from training import rollouts as samples
from training.fitting import manifest_of
from training.loop import Engine
from training.losses import opd_advantages
from training.policy import Ratios, add_logprobs, policy_loss, trees
from training.rollouts import Deck, Rollout, Task
from training.trackers import open_tracker

PATIENCE = 3  # steps in a row without anything to learn from, after which a training ends


def run(cfg: Config, ctx: Context) -> Result:
    """Trains both sizes, or the student alone where there is no teacher. Raises MissingInputError, InputError (no prompts), EngineError."""
    result = Result(rows_in=ctx.lake.read("rl_prompts", ["prompt_id"]).num_rows)
    start = cfg.rl.start
    plans = (("rl-teacher", f"{start}-teacher", cfg.rl.teacher), ("rl", start, cfg.rl.student))
    for name, base, settings in plans if cfg.models.teacher else plans[1:]:
        optimise(cfg, ctx, Plan(name, ctx.model(base), settings), result)
    return result


@dataclass(frozen=True)
class Plan:
    """One training: the model it makes, where it starts, and how the ranking and the teacher's advantages weigh."""

    name: str
    start: artifacts.Artifact
    settings: Training
    rank_weight: float = 1.0
    teacher: artifacts.Artifact | None = None  # scores each token the student writes (on-policy distillation)

    @property
    def stage(self) -> str:
        """The stage whose training it is."""
        return "opd" if self.teacher else "rl"


def optimise(cfg: Config, ctx: Context, plan: Plan, result: Result) -> None:
    """Samples, trains, validates, and publishes the best model under the plan's name. `result` is told what it came to."""
    model, tokenizer = load(plan.start.path)
    drawn = max(1, plan.settings.max_steps) * cfg.rl.prompts_per_step * (1 + cfg.rl.max_refills)
    tasks, held_out = samples.read_tasks(ctx, "rerank", drawn), samples.read_tasks(ctx, "valid", cfg.rl.validate_requests)
    inputs = {
        "tables": {"rl_prompts": ctx.lake.content_version("rl_prompts")},
        "models": {a.name: a.hash for a in (plan.start, plan.teacher) if a},
    }
    manifest = manifest_of(cfg, plan.stage, plan.name, plan.settings, {**inputs, "rank_weight": plan.rank_weight})
    run_id = f"{plan.name}-{manifest['fingerprint']}"
    size = f"{plan.settings.max_steps} steps of {cfg.rl.prompts_per_step} x {cfg.rl.group} answers"
    budget = plan.settings.max_steps * cfg.rl.prompts_per_step * cfg.rl.group * samples.limit_of(cfg.prompt, cfg.rl.mode)
    ctx.log(f"{run_id}: {len(tasks)} prompts, {size}, at most {budget:,} tokens to sample before refills")
    teacher = None
    if plan.teacher:
        teacher, spoken = load(plan.teacher.path)
        check_vocabularies(tokenizer, spoken, plan)
    with artifacts.publish_folder(ctx.root, plan.name, manifest) as folder:
        policy = Policy(cfg, ctx, plan, run_id, model, teacher, folder / "metrics.jsonl")
        policy.train(Deck(tasks, cfg.seed), held_out)
        save(model, tokenizer, folder)
        before, after = policy.valid[0], policy.valid[policy.best_step]
        manifest |= {"best_step": policy.best_step, "valid": {"before": before, "after": after}}
    ctx.log(f"{run_id}: best at step {policy.best_step}: {_shown(after)}; started from {_shown(before)}")
    result.rows_out += policy.rollouts
    result.tokens += policy.tokens
    result.detail[plan.name] = {"run": run_id, "best_step": policy.best_step, "before": before, "after": after}


def check_vocabularies(student: Any, teacher: Any, plan: Plan) -> None:
    """Raises ModelError unless both models speak the same tokens: the teacher scores the student's own ids."""
    if student.get_vocab() != teacher.get_vocab():
        pair = f"{plan.start.id} and {plan.teacher.id if plan.teacher else 'its teacher'}"
        raise ModelError(f"{plan.name}: {pair} have different vocabularies: train both from one tokenizer")


class Policy:
    """A policy in training: the trainer's engine, the sampler that follows it, and what they came to so far."""

    def __init__(self, cfg: Config, ctx: Context, plan: Plan, run_id: str, model: Any, teacher: Any, curve: Path) -> None:
        self.cfg, self.ctx, self.plan, self.run_id, self.model = cfg, ctx, plan, run_id, model
        self.curve, self.folder, self.tracker = curve, ctx.work("rollouts", run_id), open_tracker(ctx, run_id, 0)
        self.steps = max(1, plan.settings.max_steps)
        self.engine = Engine(model, plan.settings, self.steps * cfg.rl.updates, cfg.seed)
        self.teacher = teacher.to(self.engine.device) if teacher is not None else None
        self.sampler = Sampler(cfg, plan.start, self.engine)
        self.limit = samples.limit_of(cfg.prompt, cfg.rl.mode)
        opd = partial(opd_advantages, beta=cfg.opd.beta, clip=cfg.opd.clip) if teacher is not None else None
        self.loss_for = partial(policy_loss, cfg.rl, plan.rank_weight, opd)
        self.valid: dict[int, dict[str, float]] = {}
        self.best_step, self.rollouts, self.tokens, self.started = 0, 0, 0, time.monotonic()

    def train(self, deck: Deck[Task], held_out: Sequence[Task]) -> None:
        """All steps; leaves the best weights in the model."""
        self.curve.write_text("")
        best, idle = self._validated(0, held_out, {}), 0
        for step in self.ctx.track(range(1, self.steps + 1), self.run_id, self.steps):
            found, seconds = self._rollouts(step, deck)
            line = {"step": step, **samples.figures(found, self.limit), "sampling_seconds": seconds, **self._update(step, found)}
            self.rollouts += len(found)
            if step % self.cfg.rl.validate_every == 0 or step == self.steps:
                best = self._validated(step, held_out, best)
                line |= {f"valid_{name}": value for name, value in self.valid[step].items()}
            self._log(line)
            idle = idle + 1 if line["dropped"] >= 1.0 else 0
            if idle >= PATIENCE:
                self.ctx.log(
                    f"{self.run_id}: stopped: no group of the last {idle} steps had variance; look at what {self.plan.start.id} writes"
                )
                break
        self.tracker.close()
        self.engine.close()
        self.sampler.close()  # last: vLLM ends the process group that both are in
        self.model.load_state_dict(best, strict=False)  # a tied head is stored once

    def _rollouts(self, step: int, deck: Deck[Task]) -> tuple[list[Rollout], float]:
        """The step's rollouts: stored ones are taken up, else sampled and stored before anything is learned from them."""
        path = self.folder / f"step-{step:05d}.arrow"
        started = time.monotonic()
        if path.exists():
            found = samples.load(path)
            deck.taken += len(found) // self.cfg.rl.group
            return found, 0.0
        found = samples.collect(self.sampler, deck, self.cfg, step, self.run_id, need_variance=self.teacher is None)
        samples.store(found, path)
        return samples.load(path), time.monotonic() - started

    def _update(self, step: int, found: list[Rollout]) -> dict[str, float]:
        """Optimizer steps from the rollouts; writes the trainer's ratios back to their file. What is told is the mean of all updates."""
        started, ratios = time.monotonic(), Ratios()
        settings = self.plan.settings
        bf16 = settings.precision == "bf16"
        updates = [batches for part in parts(found, self.cfg.rl.updates) if (batches := trees(part, settings.tokens_per_batch))]
        for batches in updates:  # all of them before the first update: it is against the policy that sampled that ratios are clipped
            if self.teacher is not None:
                add_logprobs(batches, "teacher", self.teacher, self.cfg.rl.temperature, bf16)
            if self.cfg.rl.updates > 1:
                add_logprobs(batches, "old", self.model, self.cfg.rl.temperature, bf16)
        lines = [self.engine.backward_and_step(self.loss_for(ratios), batches) for batches in updates]
        self.tokens += int(sum(line.pop("tokens") for line in lines))
        totals = {name: sum(line[name] for line in lines) / len(lines) for name in lines[0]} if lines else {"loss": 0.0}
        if lines:
            self.sampler.stale = True
            samples.store([replace(r, ratio=ratios.of(i)) for i, r in enumerate(found)], self.folder / f"step-{step:05d}.arrow")
        return {**totals, "tokens": self.tokens, "training_seconds": round(time.monotonic() - started, 3)}

    def _validated(self, step: int, held_out: Sequence[Task], best: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Validates (or reads what was stored) and returns the weights of the best step so far."""
        path = self.folder / f"valid-{step:05d}.json"
        if path.exists():
            self.valid[step] = json.loads(path.read_text())
        else:
            self.valid[step] = samples.validate(self.sampler, held_out, self.cfg)
            artifacts.write_whole(path, json.dumps(self.valid[step]))
        if step and _quality(self.valid[step]) <= _quality(self.valid[self.best_step]):
            return best
        self.best_step = step
        with whole(self.engine):
            return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def _log(self, line: dict[str, Any]) -> None:
        line |= {"seconds": round(time.monotonic() - self.started, 3), "alarms": samples.alarms(line)}
        with self.curve.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.tracker.log(line)
        told: dict[str, float] = {k: line[k] for k in ("reward", "invalid", "identity", "dropped", "length") if k in line}
        alarm = f"; ALARM: {', '.join(line['alarms'])}" if line["alarms"] else ""
        self.ctx.log(f"{self.run_id} step {line['step']}: {_shown(told)}{alarm}")


class Sampler:
    """vLLM in this process, started when first asked, holding the trainer's current weights whenever it answers."""

    def __init__(self, cfg: Config, start: artifacts.Artifact, trainer: Engine) -> None:
        self.cfg, self.start, self.trainer = cfg, start, trainer
        self.engine: VLLMEngine | None = None
        self.stale = False

    def generate(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answers of the current policy."""
        if self.engine is None:
            longest = self.cfg.prompt.max_prompt_tokens + samples.limit_of(self.cfg.prompt, self.cfg.rl.mode) + 8
            self.engine = VLLMEngine(self.start.path, self.cfg.scoring, longest)
        if self.stale:
            with whole(self.trainer):
                self.engine.push_weights(self.trainer.model)
            self.stale = False
        return self.engine.generate(asks)

    def close(self) -> None:
        """Ends the engine, if it was ever started."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None


@contextlib.contextmanager
def whole(trainer: Engine) -> Iterator[None]:
    """Within it the model holds its weights whole, also where ZeRO stage 3 keeps them in parts."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters()), enabled=trainer.settings.zero_stage == 3):
        yield


def parts(found: Sequence[Rollout], updates: int) -> list[list[Rollout]]:
    """The rollouts once per update, with all but that update's groups marked unused (so that places in the list stay)."""
    groups = {prompt: place for place, prompt in enumerate(dict.fromkeys(r.prompt_id for r in found if r.used))}
    return [[replace(r, used=r.used and groups[r.prompt_id] % updates == k) for r in found] for k in range(updates)]


def _quality(valid: dict[str, float]) -> tuple[float, float]:
    """What picks a checkpoint."""
    return valid["ndcg3"], valid["recall1"]


def _shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
