"""What a stage is given beside its configuration (`Context`), and what it gives back (`Result`)."""

import contextlib
import datetime as dt
import fcntl
import importlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gr2 import artifacts
from gr2.errors import ConfigError, InputError

if TYPE_CHECKING:
    from gr2.config import Config


@dataclass
class Result:
    """Counts of one stage run; they become a row of `stage_runs`."""

    rows_in: int = 0
    rows_out: int = 0
    quarantined: int = 0
    duplicates: int = 0
    tokens: int = 0
    detail: dict[str, Any] = field(default_factory=dict)


class Context:
    """Paths, the day, pins, the lake, the Spark session: opened when first used."""

    def __init__(self, cfg: "Config", date: dt.date | None = None) -> None:
        self.cfg = cfg
        self.date = date
        self.root = cfg.paths.root if cfg.paths.root.is_absolute() else Path.cwd() / cfg.paths.root
        self.pins: dict[str, dict[str, Any]] = self._read_draft()
        self._pinning = threading.Lock()  # a stage may publish two tables side by side

    # -- identity -------------------------------------------------------------------------------------------------

    @property
    def day(self) -> dt.date:
        """The processed day: --date, else the simulator's last day, else today."""
        if self.date:
            return self.date
        if self.cfg.data.source == "simulator":
            return dt.date.fromisoformat(self.cfg.simulator.start) + dt.timedelta(days=self.cfg.simulator.days - 1)
        return dt.datetime.now(dt.UTC).date()

    @property
    def run_id(self) -> str:
        """Equal inputs give an equal id, so that a rerun replaces its rows."""
        return f"{self.cfg.profile}-{self.date or 'all'}-{self.cfg.digest()[:8]}"

    # -- places ---------------------------------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """Folder or URL under which `tables` and `staging` lie: paths.lake, else the root."""
        return self.cfg.paths.lake.rstrip("/") or str(self.root)

    def table_path(self, name: str) -> str:
        """Folder or URL of a Delta table."""
        return f"{self.place}/tables/{name}"

    def work(self, *parts: str) -> Path:
        """A folder for files between a trainer and the job that publishes them; made if need be, always under the root."""
        path = (self.root / "work").joinpath(*parts).resolve()
        if not path.is_relative_to((self.root / "work").resolve()):
            raise InputError(f"{'/'.join(parts)!r} leaves the data root")
        path.mkdir(parents=True, exist_ok=True)
        return path

    def raw_path(self) -> Path:
        """Folder of raw input files: data.path (or GR2_DATA), or where the simulator writes."""
        if self.cfg.data.source == "simulator":
            return self.root / "raw"
        if self.cfg.data.path is None:
            raise ConfigError(f"profile {self.cfg.profile!r} needs its data folder: --set data.path=FOLDER, or the variable GR2_DATA")
        if not self.cfg.data.path.is_dir():
            raise InputError(f"data.path {str(self.cfg.data.path)!r} is not a folder")
        return self.cfg.data.path.resolve()

    # -- tables and models ----------------------------------------------------------------------------------------

    @cached_property
    def lake(self) -> Any:
        """Delta tables without a JVM (`schemas.lake.Lake`)."""
        return importlib.import_module("schemas.lake").Lake(self.place)

    @cached_property
    def spark(self) -> Any:
        """The Spark session (`spark_jobs.session`)."""
        return importlib.import_module("spark_jobs.session").get_session(self.cfg, self.root)

    def model(self, name: str) -> artifacts.Artifact:
        """A model's current version, at night (with --date) that of the promoted release.

        So a night does not meet models of a retraining that is under way. Raises MissingInputError naming the stage that makes it.
        """
        return artifacts.resolve(self.root, name, self.promoted.get("models", {}).get(name) if self.date else None)

    @property
    def promoted(self) -> dict[str, dict[str, Any]]:
        """Pins of the promoted release (tables, models); empty before the first."""
        rows = self.lake.read("releases", ["pins"], status="promoted").to_pylist() if self.lake.exists("releases") else []
        return dict(json.loads(rows[0]["pins"])) if rows else {}

    # -- the draft release ----------------------------------------------------------------------------------------

    def pin(self, kind: str, name: str, version: int | str) -> None:
        """Adds a table's version or a model's hash to the draft release (DESIGN contract 6)."""
        path = self.runs / "draft.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._pinning:
            self.pins = self._read_draft()
            self.pins.setdefault(kind, {})[name] = version
            artifacts.write_whole(path, json.dumps(self.pins, indent=1, sort_keys=True))

    @contextlib.contextmanager
    def drafted(self, tables: Iterable[str]) -> Iterator[None]:
        """Within, a build reads these tables as its draft pins them, whatever nights have published since (DESIGN contract 6)."""
        pins = {} if self.date else self._read_draft().get("tables", {})
        self.lake.pins = {table: pins[table] for table in tables if table in pins}
        try:
            yield
        finally:
            self.lake.pins = {}

    def _read_draft(self) -> dict[str, dict[str, Any]]:
        path = self.runs / "draft.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def runs(self) -> Path:
        """Folder of the draft release and the stages' records. A night has its own: what a build has under way is not its."""
        return self.root / "runs" / (f"night-{self.date}" if self.date else "")

    @contextlib.contextmanager
    def sole_writer(self) -> Iterator[None]:
        """Holds the root's writer lock where the lake lies on S3; elsewhere two drivers may write at once.

        Delta's Spark writers tell commits apart by an atomic create or rename. On S3 they do so within one driver only (Delta,
        S3SingleDriverLogStore): of two drivers' commits of one version, one would be lost.
        """
        if not self.place.startswith(("s3://", "s3a://")):
            yield
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "writer.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.log(f"another stage writes to {self.place}: waiting for it, since S3 takes one writer at a time")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield  # closing the file, or dying, lets go

    # -- telling --------------------------------------------------------------------------------------------------

    def log(self, message: str) -> None:
        """One line to stderr and to the run's log file, from the first of several processes."""
        if os.environ.get("RANK", "0") != "0":
            return
        line = f"{dt.datetime.now(dt.UTC):%H:%M:%S} {message}"
        print(line, file=sys.stderr, flush=True)
        folder = self.root / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "gr2.log").open("a") as file:
            file.write(line + "\n")

    def track(self, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        """Passes items through while showing progress: a bar on a terminal, a line every 15 seconds elsewhere."""
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import track

            yield from track(items, description=label, total=total, console=Console(stderr=True), transient=True)
            return
        last = started = time.monotonic()
        for done, item in enumerate(items, 1):
            yield item
            if time.monotonic() - last > 15:
                last = time.monotonic()
                self.log(f"{label}: {done}{f'/{total}' if total else ''} after {last - started:.0f} s")


def parse_date(text: str | None) -> dt.date | None:
    """A day from the command line. Raises InputError unless it is a real YYYY-MM-DD."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        raise InputError(f"--date {text!r}: write YYYY-MM-DD")
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise InputError(f"--date {text!r} is not a day of the calendar") from None
