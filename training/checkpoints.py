"""Checkpoints of a training: whole or not there, verified before they are read, removed when the model is published.

    <home>/step-000200/        state-00001.safetensors..., metrics.jsonl, state.json, manifest.json
    <home>/latest.json         {"folder": ...}, replaced atomically once the folder is complete

What is stored is the optimizer's state by parameter (fp32 weight, moments, the averaged weight), whole, so a training goes on at another
ZeRO stage or with another number of processes: bit for bit at the same ones, within rounding at others. No DeepSpeed file, no pickle. A
kill while saving, or a full disk, leaves the last good checkpoint in its place.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gr2.artifacts import write_whole
from gr2.errors import ModelError
from training.optimizers import ADAMW_STATE, state_of

SHARD = 2**31  # bytes after which a file of tensors is closed: what the first process holds at once
WEIGHT, AVERAGE = "weight", "average"


def save(engine: Any, home: Path, state: dict[str, Any], curve: Path) -> None:
    """Writes a checkpoint (all ranks call this) and makes it the latest; older ones are removed."""
    final = home / f"step-{engine.step:06d}"
    draft = home / f".draft-{final.name}"
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed here
        draft.mkdir(parents=True)
    dist.barrier()
    _write(_tensors(engine), draft if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return
    shutil.copyfile(curve, draft / "metrics.jsonl")
    (draft / "state.json").write_text(json.dumps({"step": engine.step, **state}, indent=1))
    (draft / "manifest.json").write_text(json.dumps(_digests(draft), indent=1, sort_keys=True))
    _to_disk(draft)
    if final.exists():  # never the last good one of this training, which stands at an earlier step
        shutil.rmtree(final)
    draft.rename(final)
    write_whole(home / "latest.json", json.dumps({"folder": final.name}))
    for old in [p for p in home.iterdir() if p.is_dir() and p != final and p.name.startswith(("step-", ".draft-"))]:
        shutil.rmtree(old, ignore_errors=True)


def discard(home: Path) -> None:
    """Removes what a save that failed left behind."""
    for draft in home.glob(".*"):
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)


def load(engine: Any, home: Path, fingerprint: str, curve: Path) -> dict[str, Any] | None:
    """Restores the latest checkpoint of the same training and returns its state; None where there is none.

    It may come from another ZeRO stage and number of processes. Raises ModelError where a file differs from the manifest, or where it
    holds other tensors than this training has.
    """
    folder = latest(home)
    if folder is None:
        return None
    verify(folder)
    state = dict(json.loads((folder / "state.json").read_text()))
    if state["fingerprint"] != fingerprint:
        return None
    _restore(engine, folder, int(state["step"]))
    if dist.get_rank() == 0:
        shutil.copyfile(folder / "metrics.jsonl", curve)
    engine.step = int(state["step"])
    return state


def latest(home: Path) -> Path | None:
    """Folder of the last whole checkpoint."""
    pointer = home / "latest.json"
    if not pointer.exists():
        return None
    folder = (home / json.loads(pointer.read_text())["folder"]).resolve()
    if folder.parent != home.resolve():
        raise ModelError(f"{pointer} points outside its folder")
    return folder if folder.is_dir() else None


def verify(folder: Path) -> None:
    """Raises ModelError unless the folder holds exactly the files of its manifest, with their SHA-256."""
    manifest = folder / "manifest.json"
    wanted = json.loads(manifest.read_text()) if manifest.exists() else {}
    found = _digests(folder)
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if not wanted or wrong:
        raise ModelError(
            f"checkpoint {folder} differs from its manifest ({', '.join(wrong[:5]) or 'no manifest'}): remove it to start again"
        )


def clear(home: Path) -> None:
    """Removes all checkpoints of a training whose model is published (the first process calls this)."""
    if home.exists():
        (home / "latest.json").unlink(missing_ok=True)
        for old in [p for p in home.iterdir() if p.is_dir() and p.name.startswith(("step-", ".draft-"))]:
            shutil.rmtree(old, ignore_errors=True)


def _to_disk(folder: Path) -> None:
    """What the pointer will name survives a loss of power, too."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / "manifest.json"):
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


# -- tensors, whole and by name ---------------------------------------------------------------------------------------


def _trained(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every trained parameter once, in the model's order, which is that of the averaged weights. Frozen ones are the start's."""
    return ((name, parameter) for name, parameter in engine.model.named_parameters() if parameter.requires_grad)


def _tensors(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """`(parameter/kind, fp32 tensor)`, gathered one after the other: all ranks walk through together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    averaged = iter(engine.average.weights if engine.average else [])
    for name, parameter in _trained(engine):
        if engine.settings.zero_stage:
            yield f"{name}/{WEIGHT}", safe_get_full_fp32_param(parameter)
            yield from ((f"{name}/{kind}", safe_get_full_optimizer_state(parameter, kind)) for kind in ADAMW_STATE)
        else:
            yield f"{name}/{WEIGHT}", parameter.data
            yield from ((f"{name}/{kind}", engine.optimizer.state[parameter][kind]) for kind in state_of(engine.optimizer, parameter))
        if engine.average:
            yield f"{name}/{AVERAGE}", next(averaged)


def _write(tensors: Iterator[tuple[str, torch.Tensor]], draft: Path | None) -> None:
    """Writes tensors as files of about SHARD bytes; without a folder they are only walked through."""
    from safetensors.torch import save_file

    shard: dict[str, torch.Tensor] = {}
    size, number = 0, 0
    for name, tensor in tensors:
        if draft is None:
            continue
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        if size >= SHARD:
            number += 1
            save_file(shard, draft / f"state-{number:05d}.safetensors")
            shard, size = {}, 0
    if draft is not None and shard:
        save_file(shard, draft / f"state-{number + 1:05d}.safetensors")


def _restore(engine: Any, folder: Path, step: int) -> None:
    """Puts weights, the optimizer's state and averages where the checkpoint stands, each rank its own part."""
    from safetensors import safe_open

    files = [safe_open(path, "pt") for path in sorted(folder.glob("state-*.safetensors"))]
    place = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no dictionary
    kinds = {name: (WEIGHT, *state_of(engine.optimizer, parameter)) for name, parameter in _trained(engine)}
    wanted = {f"{name}/{kind}" for name, own in kinds.items() for kind in (*own, *([AVERAGE] if engine.average else []))}
    if other := sorted(wanted ^ place.keys()):
        raise ModelError(f"checkpoint {folder} is not of this model ({other[0]}): remove it to start again")
    averages = []
    for name, parameter in _trained(engine):
        for kind in kinds[name]:
            _put(engine, parameter, kind, place[f"{name}/{kind}"].get_tensor(f"{name}/{kind}").to(engine.device))
        if engine.average:
            averages.append(place[f"{name}/{AVERAGE}"].get_tensor(f"{name}/{AVERAGE}").to(engine.device))
    for state in engine.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)
    if engine.average:
        engine.average.weights, engine.average.count = averages, step


def make_state(engine: Any) -> None:
    """Gives the optimizer its state before the first step, as zeros.

    DeepSpeed links the state to parameters once, at the first group's first step, when that of the other groups is not there yet.
    """
    stage, zero, optimizer = engine.settings.zero_stage, engine.deepspeed.optimizer, engine.optimizer
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    for part in zero.fp32_partitioned_groups_flat if stage == 3 else groups:
        count = {"step": torch.zeros((), device=part.device if optimizer.defaults["fused"] else "cpu")}
        kinds = state_of(optimizer, part)
        optimizer.state[part] = (count if kinds == ADAMW_STATE else {}) | {kind: torch.zeros_like(part) for kind in kinds}
    if stage in (1, 2):
        zero._lazy_init_hp_params_optimizer_state()


def _put(engine: Any, parameter: Any, kind: str, value: torch.Tensor) -> None:
    """Sets this rank's part of a parameter's weight or moment from the whole."""
    import deepspeed
    from deepspeed import utils

    stage = engine.settings.zero_stage
    if kind == WEIGHT:
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=stage == 3):
            parameter.data.copy_(value)
    if stage == 3:
        own = parameter.ds_tensor.numel()
        filled = torch.nn.functional.pad(value.flatten(), (0, own * dist.get_world_size() - value.numel()))
        part = filled.narrow(0, own * dist.get_rank(), own)
        utils.safe_set_local_fp32_param(parameter, part) if kind == WEIGHT else utils.safe_set_local_optimizer_state(parameter, part, kind)
    elif stage:
        utils.safe_set_full_fp32_param(parameter, value) if kind == WEIGHT else utils.safe_set_full_optimizer_state(parameter, value, kind)
    elif kind != WEIGHT:
        engine.optimizer.state[parameter][kind].copy_(value)
