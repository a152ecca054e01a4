"""Checkpoints of a training: whole or not there, verified before they are read, removed when the training is done.

    <home>/step-000200/        engine/ (DeepSpeed's own files), average.safetensors, metrics.jsonl, state.json, manifest.json
    <home>/latest.json         {"folder": ...}, replaced atomically once the folder is complete

A kill while saving, or a full disk, leaves the last good checkpoint in its place. DeepSpeed's files are pickled: they are the one exception
to "only safetensors", so they are read only from under a folder that this installation wrote, after every file's SHA-256 agrees with the
manifest.
"""

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gr2.errors import ModelError


def save(engine: Any, home: Path, state: dict[str, Any], curve: Path) -> Path | None:
    """Writes a checkpoint (all ranks call this) and makes it the latest; older ones are removed. Returns its folder on rank 0."""
    final = home / f"step-{engine.step:06d}"
    draft = home / f".draft-{final.name}"
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed here
        draft.mkdir(parents=True)
    dist.barrier()
    engine.deepspeed.save_checkpoint(str(draft), tag="engine", save_latest=False)
    dist.barrier()
    if dist.get_rank() != 0:
        return None
    if engine.average:
        _save_average(engine.average, draft / "average.safetensors")
    shutil.copyfile(curve, draft / "metrics.jsonl")
    stand = {"step": engine.step, "world": dist.get_world_size(), "zero_stage": engine.settings.zero_stage, **state}
    (draft / "state.json").write_text(json.dumps(stand, indent=1))
    (draft / "manifest.json").write_text(json.dumps(_digests(draft), indent=1, sort_keys=True))
    _to_disk(draft)
    if final.exists():  # never the last good one of this training, which stands at an earlier step
        shutil.rmtree(final)
    draft.rename(final)
    pointer = home / f".latest-{uuid.uuid4().hex[:8]}"
    pointer.write_text(json.dumps({"folder": final.name}))
    os.replace(pointer, home / "latest.json")
    for old in [p for p in home.iterdir() if p.is_dir() and p != final and p.name.startswith(("step-", ".draft-"))]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def discard(home: Path) -> None:
    """Removes what a save that failed left behind."""
    for draft in home.glob(".*"):
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)


def load(engine: Any, home: Path, fingerprint: str, curve: Path) -> dict[str, Any] | None:
    """Restores the latest checkpoint of the same training and returns its state; None where there is none.

    Raises ModelError where a file differs from the manifest, or where the ZeRO stage or the number of processes has changed.
    """
    folder = latest(home)
    if folder is None:
        return None
    verify(folder)
    state = dict(json.loads((folder / "state.json").read_text()))
    if state["fingerprint"] != fingerprint:
        return None
    if (state["world"], state["zero_stage"]) != (dist.get_world_size(), engine.settings.zero_stage):
        raise ModelError(f"{folder} was written by {state['world']} processes at ZeRO stage {state['zero_stage']}: resume so, or remove it")
    found, _ = engine.deepspeed.load_checkpoint(str(folder), tag="engine")
    if found is None:
        raise ModelError(f"DeepSpeed could not read {folder}: remove it to start again")
    if engine.average:
        _load_average(engine.average, folder / "average.safetensors", int(state["step"]))
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
    """Removes all checkpoints of a finished training (rank 0)."""
    if dist.get_rank() == 0 and home.exists():
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


def _save_average(average: Any, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({str(i): weight.contiguous() for i, weight in enumerate(average.weights)}, path)


def _load_average(average: Any, path: Path, step: int) -> None:
    from safetensors.torch import load_file

    stored = load_file(path)
    average.weights = [stored[str(i)].to(weight.device) for i, weight in enumerate(average.weights)]
    average.count = step
