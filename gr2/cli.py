"""The `gr2` command. Only here are stages run; other rooms are loaded by name when a command needs them."""

import contextlib
import importlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gr2 import __version__
from gr2.artifacts import write_whole
from gr2.context import Context, Result, parse_date
from gr2.environment import checks, set_defaults
from gr2.errors import AuditError, ConfigError, EnvironmentProblem, GR2Error

if TYPE_CHECKING:
    from gr2.pipeline import Stage

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="GR2, the Generative Reasoning Re-ranker: interaction logs in, a better order of candidates out.\n\n"
    "Start with `gr2 run --profile demo`, then `gr2 report` and `gr2 sql 'select * from metrics'`.\n\n"
    "Exit codes: 0 done, 2 configuration, 3 input, 4 failed audit, 5 something must be built first, 6 machine, 7 model, 8 engine, "
    "1 anything else.",
)  # fmt: skip

Profile = Annotated[str, typer.Option(help="A profile: a file in conf/.")]
Date = Annotated[str | None, typer.Option(help="The night of a day, YYYY-MM-DD: what it adds. Without it: everything is built.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: key=value, such as rl.prompts_per_step=8. Repeatable.")]
LAST_WORDS = "GR2_LAST_WORDS"  # file for a stage's exit code and error: torchrun ends with 1 whatever its processes ended with
WIDE = 110  # columns of a terminal from which the summary shows every figure


def main() -> None:
    """Entry point: named errors become one line and an exit code.

    The process ends without the interpreter's own end: there CPython before 3.14 kills threads of native libraries that ask for the lock,
    which aborts a finished run now and then (python/cpython#87135).
    """
    set_defaults()
    try:
        app(standalone_mode=True)
    except GR2Error as error:
        code, said = error.exit_code, f"{type(error).__name__}: {error}"
        print(_as_asked(said, sys.argv[1:]), file=sys.stderr)
        if last_words := os.environ.get(LAST_WORDS):
            write_whole(Path(last_words), f"{code} {said}")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@app.command()
def run(
    profile: Profile = "demo",
    date: Date = None,
    first: Annotated[str | None, typer.Option("--from", help="First stage. It and the later ones run even if they are up to date.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Last stage.")] = None,
    force: Annotated[bool, typer.Option(help="Run every stage again, even if up to date.")] = False,
    settings: Set = None,
) -> None:
    """Run the stages in order: everything; or with --date what a night adds (data, new codes, lists, scores, drift, release).

    A stage whose settings, code and inputs did not change is skipped, so a killed run goes on with the stage that it was at; a training
    goes on from its last checkpoint, if its `checkpoint_every` asks for some, RL from its stored rollouts.
    """
    from gr2 import pipeline

    ctx = _context(profile, settings, date)
    stages = pipeline.between(first, last, "night" if ctx.date else "build")
    _require_machine(ctx)
    started, rows, refused = time.monotonic(), [], None
    with _lock(ctx):
        for number, stage in enumerate(stages, 1):
            fingerprint = pipeline.fingerprint(stage, ctx.cfg, ctx)
            if not force and first is None and pipeline.up_to_date(stage, ctx, fingerprint):
                rows.append((stage.name, "up to date", pipeline.read_record(ctx, stage.name)))
                continue
            ctx.log(f"[{number}/{len(stages)}] {stage.name}")
            try:
                _run_stage(stage, ctx, settings or [], fingerprint)
                rows.append((stage.name, "ok", pipeline.read_record(ctx, stage.name)))
            except AuditError as error:
                if stage.name != "release":
                    raise
                refused = error  # what came out is told all the same
                rows.append((stage.name, "refused", {}))
    _summary(ctx, rows, time.monotonic() - started)
    if refused:
        raise refused


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="Its name, as `gr2 run` prints it, such as candidates.")],
    profile: Profile = "demo",
    date: Date = None,
    settings: Set = None,
) -> None:
    """Run one stage, up to date or not. What it reads must be there; the message says which stage builds what is missing."""
    from gr2 import pipeline

    ctx = _context(profile, settings, date)
    found = pipeline.get(name)
    if found.trains and pipeline.processes(found, ctx.cfg) > 1 and "RANK" not in os.environ:
        _spawn(found, ctx, settings or [])
        return
    result = pipeline.execute(found, ctx.cfg, ctx, pipeline.fingerprint(found, ctx.cfg, ctx))
    ctx.log(f"{name}: {_counts(result)}")


@app.command()
def tables(profile: Profile = "demo", settings: Set = None) -> None:
    """Every table: rows, version, grain, key."""
    importlib.import_module("schemas.query").print_tables(_context(profile, settings))


@app.command()
def sql(
    query: str,
    profile: Profile = "demo",
    output: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
    latest: Annotated[bool, typer.Option(help="Read the latest versions instead of the promoted release.")] = False,
    settings: Set = None,
) -> None:
    """Ask the tables with DuckDB: a view for each, at the promoted release; no JVM. Example: gr2 sql "select * from metrics"."""
    if output not in ("table", "csv", "json"):
        raise ConfigError(f"--format {output!r}: choose table, csv or json")
    importlib.import_module("schemas.query").print_query(_context(profile, settings), query, output, latest)


@app.command()
def report(profile: Profile = "demo", settings: Set = None) -> None:
    """Build the static HTML report again and say where it is."""
    ctx = _context(profile, settings)
    importlib.import_module("spark_jobs.report").run(ctx.cfg, ctx)
    print(ctx.root / "reports" / "index.html")


@app.command()
def release(
    action: Annotated[str, typer.Argument(help="list, or retire.")] = "list",
    release_id: Annotated[str, typer.Option(help="The release to retire, as `gr2 release list` prints it.")] = "",
    profile: Profile = "demo",
    settings: Set = None,
) -> None:
    """List the releases, or retire one (its pins then no longer hold back maintenance)."""
    importlib.import_module("spark_jobs.release").manage(_context(profile, settings), action, release_id)


@app.command()
def doctor(profile: Profile = "demo", settings: Set = None) -> None:
    """Check the machine: Python, Java, compiler, disk, jars."""
    ctx = _context(profile, settings)
    found = checks(ctx.root)
    for check in found:
        print(f"{'ok ' if check.ok else 'NO '} {check.name:12} {check.found}" + ("" if check.ok else f"  ->  {check.remedy}"))
    if not all(check.ok for check in found):
        raise EnvironmentProblem("the machine lacks something: see above")


@app.command()
def airflow(
    profile: Annotated[str, typer.Option(envvar="GR2_PROFILE", help="The profile of runs that name none.")] = "demo",
    port: Annotated[int, typer.Option(help="Of the web page and the API.")] = 8080,
    settings: Set = None,
) -> None:
    """Start a local Airflow (SQLite, 127.0.0.1) with the DAGs of this project; Ctrl-C ends it and its children.

    Any other Airflow takes the profile of scheduled runs from the variable GR2_PROFILE, too.
    """
    importlib.import_module("dags.local").start(_context(profile, settings).root, profile, port)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


# -- running ------------------------------------------------------------------------------------------------------------


def _as_asked(message: str, argv: list[str]) -> str:
    """An error's message, the commands that it names with the profile and the settings of the command that failed."""
    given = [word for name, word in pairwise(argv) if name in ("--profile", "--set") for word in (name, word)]
    return re.sub(r"`(gr2 (?:stage|run)\b[^`]*)`", lambda found: f"`{' '.join([found[1], shlex.join(given)]).rstrip()}`", message)


def _context(profile: str, settings: list[str] | None, date: str | None = None) -> Context:
    from gr2.config import load

    return Context(load(profile, settings), parse_date(date))


def _run_stage(stage: "Stage", ctx: Context, settings: list[str], fingerprint: str) -> None:
    """Trainers get a process of their own, so that their memory and threads end with them; the rest share one Spark session."""
    from gr2 import pipeline

    if stage.trains:
        _spawn(stage, ctx, settings)
    else:
        pipeline.execute(stage, ctx.cfg, ctx, fingerprint)


def _spawn(stage: "Stage", ctx: Context, settings: list[str]) -> None:
    from gr2 import pipeline

    count = pipeline.processes(stage, ctx.cfg)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "gr2", "stage", stage.name, "--profile", ctx.cfg.profile]
    if ctx.date:
        command += ["--date", str(ctx.date)]
    for item in settings:
        command += ["--set", item]
    environment = dict(os.environ)
    if count > 1:  # they share the cores; what `set_defaults` gave this process is meant for one
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    with tempfile.TemporaryDirectory() as folder:
        last_words = Path(folder) / "last_words"
        done = subprocess.run(command, cwd=Path.cwd(), env={**environment, LAST_WORDS: str(last_words)}, check=False)
        code, _, said = last_words.read_text().partition(" ") if last_words.exists() else ("", "", "")
    if done.returncode:
        raise _StageFailed(stage.name, int(code or done.returncode), said or "its own message is above")


class _StageFailed(GR2Error):
    def __init__(self, name: str, code: int, said: str) -> None:
        super().__init__(f"stage {name!r} ended with code {code}: {said}. Go on with the same command once it is mended")
        self.exit_code = code if 0 < code < 128 else 1


def _require_machine(ctx: Context) -> None:
    for check in checks(ctx.root):
        if not check.ok:
            raise EnvironmentProblem(f"{check.name}: {check.found}. {check.remedy}")


@contextlib.contextmanager
def _lock(ctx: Context) -> Iterator[None]:
    """One build a root at a time, and one run of each night: two would race for the same stage records."""
    import fcntl

    path = ctx.runs / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another `gr2 run` works under {ctx.runs}: wait for it, or give this one its own --set paths.root=..."
            ) from None
        yield


def _counts(result: Result) -> str:
    named = {
        "in": result.rows_in,
        "out": result.rows_out,
        "quarantined": result.quarantined,
        "duplicates": result.duplicates,
        "tokens": result.tokens,
    }
    return ", ".join(f"{value:,} {key}" for key, value in named.items() if value) or "done"


def _summary(ctx: Context, rows: list[tuple[str, str, dict[str, object]]], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"gr2 run --profile {ctx.cfg.profile}: {seconds:.0f} s")
    columns = ["rows_in", "rows_out", "quarantined", "duplicates", "tokens", "seconds", "peak_mib"]
    if console.width < WIDE:
        columns = ["rows_out", "quarantined", "tokens", "seconds"]
    for column in ("stage", "status"):
        table.add_column(column, no_wrap=True)
    for column in columns:
        table.add_column(column.replace("_", " ").replace("mib", "MiB"), justify="right", no_wrap=True)
    for name, status, record in rows:
        figures = [record.get(column) or 0 for column in columns]
        table.add_row(name, status, *(f"{value:,.0f}" if value else "" for value in figures))
    console.print(table)
    if ctx.lake.exists("metrics") and not ctx.date:
        console.print(importlib.import_module("spark_jobs.evaluation").results_table(ctx))
    if (ctx.root / "reports" / "index.html").exists() and not ctx.date:
        console.print(f"report: {ctx.root / 'reports' / 'index.html'}")
