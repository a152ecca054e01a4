"""Models and other folders that stages write: content-hashed, published by one rename and one pointer, never half there.

root/models/<name>/<hash>/...      the files (safetensors, JSON, Arrow) and manifest.json
root/models/<name>/current.json    {"hash": ...}, replaced atomically
"""

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr2.errors import MissingInputError, ModelError

BESIDE = ("manifest.json", "metrics.jsonl")  # how the content came about: no part of it
ALLOWED = {".safetensors", ".json", ".jsonl", ".txt", ".yaml", ".arrow", ".parquet", ".jinja", ".model"}


@dataclass(frozen=True)
class Artifact:
    """A published folder. `id` is name@hash: what tables call `model_id`."""

    name: str
    hash: str
    path: Path
    manifest: dict[str, Any]

    @property
    def id(self) -> str:
        """Name and content hash."""
        return f"{self.name}@{self.hash}"


def content_hash(folder: Path) -> str:
    """First 12 hex digits of the SHA-256 over names and bytes of all files but the manifest and the curves."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in BESIDE):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def write_whole(path: Path, text: str) -> None:
    """Writes a small file whole or not at all: beside its place, then renamed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_text(text)
    os.replace(temporary, path)


@contextlib.contextmanager
def publish_folder(root: Path, name: str, manifest: dict[str, Any]) -> Iterator[Path]:
    """Yields an empty folder to fill; on a clean exit it becomes the current version of `name`, else it is removed.

    `manifest` may be filled while the folder is; it must be JSON. Raises ModelError for a file type that is not allowed.
    """
    home = root / "models" / name
    draft = home / f".draft-{uuid.uuid4().hex[:8]}"
    draft.mkdir(parents=True)
    try:
        yield draft
        bad = sorted(p.name for p in draft.rglob("*") if p.is_file() and p.suffix not in ALLOWED)
        if bad:
            raise ModelError(f"model {name!r} would hold files of a refused type: {', '.join(bad)}")
        digest = content_hash(draft)
        (draft / "manifest.json").write_text(json.dumps({"name": name, "hash": digest, **manifest}, indent=1, sort_keys=True, default=str))
        final = home / digest
        if final.exists():  # equal content: keep the folder that readers may hold open, with the story of the latest training
            for told in BESIDE:
                if (draft / told).exists():
                    os.replace(draft / told, final / told)
        else:
            draft.rename(final)
        write_whole(home / "current.json", json.dumps({"hash": digest}))
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def resolve(root: Path, name: str, digest: str | None = None) -> Artifact:
    """The current (or the pinned) version of a model. Raises MissingInputError naming the stage that makes it."""
    home = root / "models" / name
    pointer = home / "current.json"
    if digest is None:
        if not pointer.exists():
            raise MissingInputError(f"model {name!r} does not exist under {root}: run `gr2 stage {_maker(name)}` first")
        digest = str(json.loads(pointer.read_text())["hash"])
    manifest = home / digest / "manifest.json"
    if not manifest.exists():
        raise MissingInputError(f"model {name}@{digest} is pinned but its folder is gone: run `gr2 stage {_maker(name)}` again")
    return Artifact(name, digest, home / digest, json.loads(manifest.read_text()))


def _maker(name: str) -> str:
    return str(importlib.import_module("gr2.pipeline").builder_of(name))  # which reads this module


def names(root: Path) -> list[str]:
    """Models that have a current version."""
    return sorted(p.parent.name for p in (root / "models").glob("*/current.json"))
