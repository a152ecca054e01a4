"""The machine: variables that must stand before heavy imports, and the checks of `gr2 doctor`."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gr2 import PROJECT

CACHE = PROJECT / ".cache"
JARS = CACHE / "jars"
NEEDED_GIB = 10


@dataclass(frozen=True)
class Check:
    """One line of `gr2 doctor`."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def delta_jars() -> list[Path]:
    """The jars that `make setup` fetched."""
    return sorted(JARS.glob("*.jar"))


def class_path() -> str:
    """Them, as a JVM wants it."""
    return ":".join(str(jar) for jar in delta_jars())


def yarn_jars() -> str:
    """Spark's own jars for YARN, whose nodes all have this environment: nothing is uploaded. pyspark is found, not imported."""
    found = find_spec("pyspark")
    return f"local:{Path(str(found and found.origin)).parent}/jars/*"


def set_defaults() -> None:
    """Environment variables that libraries read when they are imported. What the user set is kept."""
    cores = os.cpu_count() or 1
    defaults = {
        "OMP_WAIT_POLICY": "PASSIVE",  # busy-waiting threads make generation ten times slower on shared cores
        "OMP_NUM_THREADS": str(cores),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # weights load in a blink
        "PYTHONWARNINGS": "ignore::FutureWarning",  # of libraries about each other, in every child
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "DO_NOT_TRACK": "1",
        "GX_ANALYTICS_ENABLED": "false",
        "TORCH_EXTENSIONS_DIR": str(CACHE / "torch_extensions"),
        "MPLBACKEND": "Agg",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not Path("/dev/nvidia0").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def checks(root: Path) -> list[Check]:
    """What the pipeline needs from the machine, each with what to do where it is missing."""
    return [_python(), _java(), _compiler(), _disk(root), _jars()]


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("Python", (3, 11) <= sys.version_info[:2] < (3, 13), version, "install Python 3.11 or 3.12")


def _java() -> Check:
    java = Path(os.environ["JAVA_HOME"]) / "bin" / "java" if os.environ.get("JAVA_HOME") else shutil.which("java")
    remedy = "install Java 17 (Debian and Ubuntu: apt-get install openjdk-17-jre-headless), or set JAVA_HOME to it"
    if not java or not Path(java).exists():
        return Check("Java", False, "none", remedy)
    text = subprocess.run([str(java), "-version"], capture_output=True, text=True, check=False).stderr
    match = re.search(r'version "(\d+)', text)
    major = int(match.group(1)) if match else 0
    return Check("Java", major >= 17, text.splitlines()[0] if text else "unknown", remedy)


def _compiler() -> Check:
    path = shutil.which("g++") or ""
    return Check("g++", bool(path), path or "none", "install a C++ compiler (Debian and Ubuntu: apt-get install g++)")


def _disk(root: Path) -> Check:
    place = next(p for p in [root, *root.resolve().parents] if p.exists())
    free = shutil.disk_usage(place).free / 2**30
    return Check("disk", free >= 2, f"{free:.0f} GiB free at {place}", f"free some space: set-up and a run need about {NEEDED_GIB} GiB")


def _jars() -> Check:
    count = len(delta_jars())
    return Check("Delta jars", count >= 7, f"{count} in {JARS.relative_to(PROJECT)}", "run `make setup`")
