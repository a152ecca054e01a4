"""What benchmarks share: stages of a profile in a process of their own, and how a figure with its interval is written."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gr2.metrics import bootstrap_mean
from schemas.lake import Lake

DRAWS, SEED = 2000, 13


def gr2(profile: str, root: Path, words: Sequence[str], settings: Iterable[str], module: str = "gr2") -> None:
    """One `gr2` command under a root. Raises CalledProcessError where it fails."""
    chosen = [f"paths.root={root}", *settings]
    subprocess.run([sys.executable, "-m", module, *words, "--profile", profile, *(w for s in chosen for w in ("--set", s))], check=True)


def told(values: Sequence[float] | np.ndarray, signed: bool = False, users: Sequence[str] | None = None) -> str:
    """Mean with its 95 % bootstrap interval, over whole users where they are named: what one user did is alike."""
    form = "{:+.4f} [{:+.4f}, {:+.4f}]" if signed else "{:.4f} [{:.4f}, {:.4f}]"
    return form.format(*bootstrap_mean(np.asarray(values), DRAWS, SEED, users_B=users))


def header(name: str, *roots: Path) -> str:
    """What was run, where, on which commit, from which versions of which tables: the first lines above every table."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    chip = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    units = any(line.startswith("flags") and ("avx512_bf16" in line or "amx_bf16" in line) for line in lines)
    machine = f"{os.cpu_count()} cores of {chip}, {'with' if units else 'without'} bf16 units"
    return f"\n{name}: commit {commit or 'unknown'}, {machine}\n" + "".join(map(versions, roots))


def versions(root: Path) -> str:
    """A line for a root: its tables, each with the version that is read."""
    lake = Lake(root)
    tables = sorted(folder.name for folder in (root / "tables").glob("*") if folder.is_dir())
    return f"{root.name}: " + ", ".join(f"{table} v{lake.version(table)}" for table in tables) + "\n"
