"""One training loop for every trainer, on DeepSpeed.

    total = planned_steps(loader, settings)
    summary = train(model, loader, loss_fn, settings, folder=draft, total_steps=total, ctx=ctx, checkpoint=folder, seed=13)

`loss_fn(model, batch) -> (loss, floats)` gives one micro-batch's **share** of the step's loss: its weighted sum over `batch.norm`.
Shares, and the floats, add up over micro-batches and ranks. Weights stay fp32; matrix products run in bf16 (settings.precision). For RL,
`Engine` is there without the loop: `engine.backward_and_step(loss_fn, micro_batches)`.

One process needs no launcher; several are started by torchrun. Shapes: B rows, T tokens, M learned tokens, D hidden size, V vocabulary.
"""

import atexit
import contextlib
import gc
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as computed_anew

from gr2 import PROJECT
from gr2.config import Training
from gr2.environment import set_defaults
from gr2.errors import ConfigError, ModelError
from scoring.model import autocast, hidden_states
from training import checkpoints, lora
from training.data import Batch, Loader
from training.optimizers import make_optimizer
from training.trackers import open_tracker

CHUNK = 4096  # learned tokens whose logits stand at once
LossFn = Callable[[Any, Any], tuple[torch.Tensor, dict[str, float | torch.Tensor]]]


@dataclass(frozen=True)
class Summary:
    """What a training came to. `tokens` counts what was read, filling excluded."""

    steps: int
    tokens: int
    seconds: float
    last_loss: float


def planned_steps(loader: Loader, settings: Training) -> int:
    """Optimizer steps: max_steps, or as many as the epochs give."""
    return settings.max_steps or loader.steps(settings.epochs, settings.accumulation)


def learning_rate(settings: Training, step: int, total: int) -> float:
    """Linear warm-up, then what `settings.schedule` says: a cosine or a line down to a tenth, or level. `step` counts from 0."""
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[settings.schedule]
    return settings.lr * (0.1 + 0.9 * left)


# -- log-probabilities ------------------------------------------------------------------------------------------------


def learned_states(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """`(hidden_MD, targets_M)`: the states that predict the learned tokens, and those tokens, row after row.

    The body runs without the head, which then runs only where a token is learned.
    """
    hidden_BTD = hidden_states(
        model, input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, attention_mask=batch.mask_B1TT(), use_cache=False
    ).last_hidden_state
    learned_BT = batch.learned_BT
    return hidden_BTD[:, :-1][learned_BT[:, 1:]], batch.input_ids_BT[learned_BT]


def state_logprobs(model: Any, hidden_MD: torch.Tensor, targets_M: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """logps_M of the targets. The logits of `CHUNK` of them at most stand at once: of several chunks each is computed anew going back."""
    head = model.get_output_embeddings()

    def logprobs(hidden_CD: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        logits_CV = head(hidden_CD).float()
        logits_CV = logits_CV if temperature == 1.0 else logits_CV / temperature  # else a copy of the largest tensor for nothing
        return -torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="none")

    return in_chunks(logprobs, _calls(head, len(targets_M)), hidden_MD, targets_M)


def in_chunks(function: Callable[..., torch.Tensor], count: int, *tables_M: torch.Tensor) -> torch.Tensor:
    """What `function` makes of the rows of some tables, in `count` chunks of CHUNK rows; with several each is computed anew going back."""
    if count == 1:
        return function(*tables_M)
    cuts = ([table_M[start : start + CHUNK] for table_M in tables_M] for start in range(0, count * CHUNK, CHUNK))
    return torch.cat([computed_anew(function, *cut, use_reentrant=False) for cut in cuts])


def chunks_of(rows: int) -> int:
    """Chunks that hold so many rows."""
    return max(1, math.ceil(rows / CHUNK))


def _calls(head: Any, learned: int) -> int:
    """Calls of the head: under ZeRO-3, where each gathers the weights from all ranks, as many on each rank as the longest needs."""
    count = chunks_of(learned)
    if not hasattr(head.weight, "ds_id") or world() == 1:
        return count
    most = torch.tensor(count, device=head.weight.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def token_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """logps_BT: log-probability of each learned token given those before it in its example; 0 where nothing is learned."""
    hidden_MD, targets_M = learned_states(model, batch)
    logps_M = state_logprobs(model, hidden_MD, targets_M, temperature)
    return torch.zeros_like(batch.weights_BT).masked_scatter(batch.learned_BT, logps_M)


# -- the engine -------------------------------------------------------------------------------------------------------


class _Shell(torch.nn.Module):
    """Lets a whole loss run inside DeepSpeed's forward, with bf16 matrix products."""

    def __init__(self, model: Any, bf16: bool) -> None:
        super().__init__()
        self.model, self.bf16 = model, bf16

    def forward(self, loss_fn: LossFn, batch: Any) -> Any:
        with autocast(self.model, self.bf16):
            return loss_fn(self.model, batch)


class Engine:
    """A model under DeepSpeed (ZeRO, clipping, AdamW or Muon with fp32 weights; LoRA if asked). `step` counts finished optimizer steps."""

    def __init__(self, model: Any, settings: Training, total_steps: int, seed: int = 0) -> None:
        self.model, self.settings, self.total_steps, self.seed, self.step = model, settings, total_steps, seed, 0
        start_processes()
        import deepspeed

        config = _deepspeed_config(settings)
        native = bool(config.get("bf16", {}).get("enabled"))
        if not native:
            model.float()  # many bases are stored in bf16
        self.tuner = lora.adapt(model, settings.lora, seed) if settings.lora else None
        shell = _Shell(model, settings.precision == "bf16" and not native)
        self.optimizer = make_optimizer(shell, settings)
        self.deepspeed = deepspeed.initialize(model=shell, optimizer=self.optimizer, config=config, dist_init_required=False)[0]
        checkpoints.make_state(self)
        self.average = Average(model, settings.average) if settings.average else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.deepspeed.device)

    def backward_and_step(self, loss_fn: LossFn, micro_batches: Sequence[Any]) -> dict[str, float]:
        """One optimizer step from this rank's micro-batches (as many on every rank).

        Returns loss, grad_norm, lr, tokens, and the loss function's floats, summed over micro-batches and ranks.
        """
        self.deepspeed.train()
        torch.manual_seed(_mix(self.seed, self.step, rank()))  # dropout depends on the step alone, so a resumed run repeats it
        lr = learning_rate(self.settings, self.step, self.total_steps)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        totals: dict[str, float] = {"loss": 0.0, "tokens": 0.0}
        for batch, last in zip(_with_norm(micro_batches), [*[False] * (len(micro_batches) - 1), True], strict=True):
            batch = batch.to(self.device) if isinstance(batch, Batch) else batch
            self.deepspeed.set_gradient_accumulation_boundary(last)
            loss, floats = self.deepspeed(loss_fn, batch)
            self.deepspeed.backward(loss * world(), scale_wrt_gas=False)  # gradients are averaged over ranks, shares add up
            tokens = batch.tokens if isinstance(batch, Batch) else 0
            for name, value in {"loss": loss, "tokens": tokens, **floats}.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach() if isinstance(value, torch.Tensor) else value)
        norm = self._norm() if self.deepspeed.optimizer is self.optimizer else None
        self.deepspeed.step()
        if self.average:
            self.average.update()
        self.step += 1
        totals = sum_over_ranks(totals)
        if not math.isfinite(totals["loss"]):
            raise ModelError(f"the loss is {totals['loss']} at step {self.step}: lower the learning rate or look at the data")
        found = float(norm if norm is not None else self.deepspeed.get_global_grad_norm() or 0.0)
        if not math.isfinite(found):  # else DeepSpeed leaves the step out without a word, or takes it
            raise ModelError(f"the gradient's norm is {found} at step {self.step}: lower the learning rate or look at the data")
        return {**totals, "grad_norm": found, "lr": lr}

    def _norm(self) -> torch.Tensor:
        """Norm of the averaged gradients before they are clipped, which DeepSpeed tells of optimizers of its own alone."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """Within it the model is what would be exported: in eval mode, with the averaged weights, if asked for."""
        self.model.eval()
        own = [(p, p.detach().clone()) for p in self.average.parameters] if self.average else []
        if self.average:
            self.average.copy_to(self.model)
        yield
        for parameter, weight in own:
            parameter.data.copy_(weight)

    def close(self) -> None:
        """Ends training: whole (averaged, if asked; merged) weights are left in `model`, in eval mode, and the engine's memory is freed."""
        weights = self._whole_weights()
        self.deepspeed.destroy()
        for parameter, weight in zip(self.model.parameters(), weights, strict=True):
            parameter.data, parameter.grad = weight, None
        if self.average:
            self.average.copy_to(self.model)
        if self.tuner is not None:
            self.tuner.merge_and_unload()
        self.model.eval()
        del self.deepspeed, self.optimizer
        gc.collect()

    def _whole_weights(self) -> list[torch.Tensor]:
        import deepspeed

        weights = []
        for parameter in self.model.parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.settings.zero_stage == 3):
                weights.append(parameter.data.detach().clone())
        return weights


class Average:
    """Exponentially averaged weights; the decay rises from 0.1 so that early weights are soon forgotten."""

    def __init__(self, model: Any, decay: float) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if any(hasattr(p, "ds_id") for p in self.parameters):
            raise ConfigError("averaged weights need zero_stage 2 or less: set average to 0")
        self.weights = [p.detach().float().clone() for p in self.parameters]
        self.decay, self.count = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.weights, [p.detach().float() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: Any) -> None:
        """Puts the averaged weights into the model."""
        for parameter, weight in zip([p for p in model.parameters() if p.requires_grad], self.weights, strict=True):
            parameter.data.copy_(weight)


def _deepspeed_config(settings: Training) -> dict[str, Any]:
    """The built-in configuration, under what the file named by `settings.deepspeed` says."""
    zero = {"stage": settings.zero_stage, "overlap_comm": False, "stage3_gather_16bit_weights_on_model_save": True}
    config: dict[str, Any] = {"zero_optimization": zero}
    if settings.deepspeed:
        path = PROJECT / "conf" / "deepspeed" / f"{Path(settings.deepspeed).stem}.json"
        if not path.exists():
            raise ConfigError(f"no DeepSpeed configuration {settings.deepspeed!r} in conf/deepspeed")
        config = json.loads(path.read_text())
        if config.get("zero_optimization", {}).get("stage", 0) != settings.zero_stage:
            raise ConfigError(f"conf/deepspeed/{path.name} has another ZeRO stage than zero_stage={settings.zero_stage}")
    return config | {
        "train_micro_batch_size_per_gpu": 1,  # rows are counted by the loader; the boundary of a step is set by hand
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


# -- processes --------------------------------------------------------------------------------------------------------


def start_processes() -> None:
    """Joins torchrun's processes, or makes this one a group of its own. Harmless when done before."""
    set_defaults()
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does: spares each new machine minutes of compiling
    if not dist.is_initialized():
        deepspeed.utils.groups._WORLD_GROUP = None  # of processes that ended: an engine of vLLM that closes here takes them with it
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if os.environ["WORLD_SIZE"] == "1":
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        atexit.register(_end_processes)


def _end_processes() -> None:
    """Ends gloo's threads before the interpreter ends: else a process may abort after its work is done.

    NCCL's group is left to the exit, as ending it could wait for a rank that failed.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def rank() -> int:
    """This process's place among torchrun's; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> torch.device:
    """Where this process trains: the device that DeepSpeed gives its engines."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over the processes, all of which must ask for the same names."""
    if world() == 1:
        return values
    if not torch.distributed.is_initialized():  # before there is an engine
        start_processes()
    names = sorted(values)
    sums = torch.tensor([values[name] for name in names], dtype=torch.float64)
    if torch.distributed.get_backend() == "nccl":
        sums = sums.cuda()
    torch.distributed.all_reduce(sums)
    return dict(zip(names, sums.tolist(), strict=True))


def _with_norm(micro_batches: Sequence[Any]) -> list[Any]:
    """Gives each batch the sum of weights of the whole step."""
    if not all(isinstance(batch, Batch) for batch in micro_batches):
        return list(micro_batches)
    norm = sum_over_ranks({"norm": sum(batch.norm for batch in micro_batches)})["norm"] or 1.0
    return [replace(batch, norm=norm) for batch in micro_batches]


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63)
    return mixed


# -- the loop ---------------------------------------------------------------------------------------------------------


def train(
    model: Any,
    steps: Iterable[Any],
    loss_fn: LossFn,
    settings: Training,
    *,
    folder: Path,
    total_steps: int,
    ctx: Any = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    validate: Callable[[Any], dict[str, float]] | None = None,
    validate_every: int = 0,
    fingerprint: str = "",
    label: str = "training",
) -> Summary:
    """Trains `model` in place and leaves it in eval mode with the weights to export (averaged ones if `settings.average`).

    `steps` gives micro-batches, `settings.accumulation` a step; with `state_dict`/`load_state_dict` it is resumable. `folder` gets
    `metrics.jsonl`, a line a step. With `checkpoint` (a folder) and `settings.checkpoint_every`, an interrupted training with the same
    `fingerprint` (what decides the result: settings and data) goes on where the last whole checkpoint stands: bit for bit at the same ZeRO
    stage and world size, within rounding at others. The last checkpoint stays until the model is published (`fitting.publishing`).
    `validate(model)` adds its floats, of the weights that would be exported, to the lines of its steps.
    """
    engine = Engine(model, settings, total_steps, seed)
    curve = folder / "metrics.jsonl"
    if rank() == 0:
        curve.write_text("")
    tokens, seconds = _resume(engine, steps, checkpoint, fingerprint, curve, ctx)
    tracker = open_tracker(ctx, f"{label}-{fingerprint}", engine.step, rank() == 0)
    stream, last = iter(steps), {"loss": math.nan}
    started = time.monotonic() - seconds
    for _ in _tracked(range(engine.step, total_steps), label, total_steps, ctx):
        last = engine.backward_and_step(loss_fn, list(itertools.islice(stream, settings.accumulation)))
        tokens += int(last["tokens"])
        if validate and (engine.step == total_steps or (validate_every and engine.step % validate_every == 0)):
            with engine.exported():
                last |= {f"valid_{name}": value for name, value in validate(model).items()}
        seconds = time.monotonic() - started
        if rank() == 0:
            line = {"step": engine.step, **last, "tokens": tokens, "seconds": round(seconds, 3)}
            with curve.open("a") as file:
                file.write(json.dumps(line) + "\n")
            tracker.log(line)
        due = settings.checkpoint_every and engine.step % settings.checkpoint_every == 0 and engine.step < total_steps
        if checkpoint and due:
            stand = steps.state_dict() if hasattr(steps, "state_dict") else {}
            _save(engine, checkpoint, {"fingerprint": fingerprint, "loader": stand, "tokens": tokens, "seconds": seconds}, curve, ctx)
    engine.close()
    tracker.close()
    return Summary(total_steps, tokens, time.monotonic() - started, float(last["loss"]))


def _save(engine: Engine, checkpoint: Path, state: dict[str, Any], curve: Path, ctx: Any) -> None:
    """A checkpoint; where the disk has no room for it, training goes on with the one before (several processes stop: they would wait)."""
    from safetensors import SafetensorError

    try:
        checkpoints.save(engine, checkpoint, state, curve)
    except (OSError, SafetensorError) as error:
        if world() > 1:
            raise
        checkpoints.discard(checkpoint)
        message = f"no checkpoint at step {engine.step} ({error}): the one before it stays"
        ctx.log(message) if ctx is not None else print(message, file=sys.stderr)


def _resume(engine: Engine, steps: Any, checkpoint: Path | None, fingerprint: str, curve: Path, ctx: Any) -> tuple[int, float]:
    """Puts engine, loader and curve where the last checkpoint stands, if there is one of this training."""
    found = checkpoints.load(engine, checkpoint, fingerprint, curve) if checkpoint else None
    if found is None:
        return 0, 0.0
    if hasattr(steps, "load_state_dict"):
        steps.load_state_dict(found["loader"])
    if ctx is not None:
        ctx.log(f"resumed at step {engine.step} of {engine.total_steps}")
    return int(found["tokens"]), float(found["seconds"])


def _tracked(numbers: range, label: str, total: int, ctx: Any) -> Iterator[int]:
    if ctx is not None and rank() == 0:
        return iter(ctx.track(numbers, label, total))
    return iter(numbers)
