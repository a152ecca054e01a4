"""What supervised trainers share: from a stream of batches to a published model, and the manifest that says what decided it.

summary = fit(cfg, ctx, "sft", "sft-teacher", model, tokenizer, loader, settings, supervised, {"tables": {...}, "models": {...}})
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gr2 import artifacts, pipeline
from gr2.config import Config, Model, Section, Training
from gr2.context import Context
from gr2.errors import MissingInputError
from scoring.model import save
from training import checkpoints
from training.data import Batch, Loader
from training.loop import LossFn, Summary, planned_steps, rank, token_logprobs, train, world
from training.losses import sft_loss


def supervised(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
    """The weighted token loss of one micro-batch (its share of the step)."""
    return sft_loss(token_logprobs(model, batch), batch.weights_BT * batch.learned_BT, batch.norm), {}


def fit(
    cfg: Config,
    ctx: Context,
    stage: str,
    name: str,
    model: Any,
    tokenizer: Any,
    loader: Loader,
    settings: Training,
    loss_fn: LossFn,
    inputs: dict[str, Any],
    *,
    write: Callable[[Any, Path], None] | None = None,
    notes: dict[str, Any] | None = None,
    validate: Callable[[Any], dict[str, float]] | None = None,
) -> Summary:
    """Trains with the shared loop and publishes the model `name` of a stage. `notes`: more for the manifest. `write`: how a model that is
    no language model becomes files.

    A model that was published from the very same inputs, settings and code is kept, so a stage that was killed between two of its models
    goes on with the second; `model` is then left as it came.
    """
    manifest = manifest_of(cfg, stage, name, settings, inputs)
    if kept := _published(ctx, name, manifest["fingerprint"]):
        ctx.log(f"{name}: trained before from the same inputs, settings and code: kept")
        return kept
    checkpoint = ctx.work(name, "checkpoint")
    with publishing(ctx, name, manifest, checkpoint) as folder:
        summary = train(
            model,
            loader,
            loss_fn,
            settings,
            folder=folder,
            total_steps=planned_steps(loader, settings),
            ctx=ctx,
            checkpoint=checkpoint,
            seed=cfg.seed,
            validate=validate,
            fingerprint=manifest["fingerprint"],
            label=name,
        )
        manifest |= {"steps": summary.steps, "tokens": summary.tokens, "seconds": round(summary.seconds, 1), **(notes or {})}
        manifest["loss"] = round(summary.last_loss, 4)
        if rank() == 0:
            write(model, folder) if write else save(model, tokenizer, folder)
    rate = summary.tokens / max(summary.seconds, 1e-9)
    ctx.log(
        f"{name}: loss {summary.last_loss:.4f}, {summary.steps} steps, {summary.tokens:,} tokens in {summary.seconds:.0f} s ({rate:,.0f}/s)"
    )
    return summary


def _published(ctx: Context, name: str, wanted: str) -> Summary | None:
    """What the current model of that name came to, if it has this fingerprint."""
    try:
        manifest = artifacts.resolve(ctx.root, name).manifest
    except MissingInputError:
        return None
    if manifest.get("fingerprint") != wanted:
        return None
    return Summary(manifest["steps"], manifest["tokens"], manifest["seconds"], manifest["loss"])


def manifest_of(cfg: Config, stage: str, name: str, settings: Training, inputs: dict[str, Any]) -> dict[str, Any]:
    """What decided a model: its inputs by version and hash, the seed, the settings; `fingerprint` is the hash of all that does.

    A checkpoint, or a published model, of another fingerprint is not taken up. How it is run (ZeRO stage, processes) does not count.
    """
    decides = {"name": name, "inputs": inputs, **pipeline.settings_of(pipeline.get(stage), _alone(cfg, name, settings.what()))}
    return {
        "inputs": inputs,
        "seed": cfg.seed,
        "training": settings.model_dump(mode="json"),
        "config": cfg.digest(),
        "profile": cfg.profile,
        "fingerprint": hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12],
    }


def _alone(cfg: Config, model: str, settings: Training) -> Config:
    """The configuration as one model's training sees it: settings and size of its siblings do not count."""
    changed = {
        name: section.model_copy(update={key: settings for key, value in section if isinstance(value, Training)})
        for name, section in cfg
        if isinstance(section, Section)
    }
    sibling = "student" if model.endswith("teacher") else "teacher"
    return cfg.model_copy(update={**changed, "models": cfg.models.model_copy(update={sibling: Model()})})


@contextlib.contextmanager
def publishing(ctx: Context, name: str, manifest: dict[str, Any], checkpoint: Path | None = None) -> Iterator[Path]:
    """The folder that becomes the model `name` on the first process; a folder of no consequence on the others.

    All leave together: what comes next may read the model. Until then its training's `checkpoint` stays: a model that could not be
    published, as on a full disk, is not trained from the first step again.
    """
    if rank() == 0:
        with artifacts.publish_folder(ctx.root, name, manifest) as folder:
            yield folder
        if checkpoint:
            checkpoints.clear(checkpoint)
    else:
        yield ctx.work("ranks", str(rank()))
    if world() > 1:
        torch.distributed.barrier()
