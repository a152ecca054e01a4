"""Raw events to `histories` and `pair_days`/`item_pairs`: time, memory and bytes by size, the cost of a night, of the gates, and of Polars.

    python -m benchmarks.data_plane --work FOLDER --millions 1 3 10        (10 takes about half an hour on two cores)

For each size a marketplace of 103 days is simulated (not timed). In one process and one Spark session (`local[2]`, 4 GiB): the whole
build of the first 99 days, then four nights, each 1 % of the events: the first ones find the JVM cold for what only nights do, the last is
the one that counts; all are told. Then the obvious Polars script on the same files. The last line is the exponent of time against events.
"""

import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

USERS = 1500  # give about a million events in 100 days
STAGES = ("events", "interactions", "evidence")
DAYS, NIGHTS = 103, 4  # the last days are nights
BESIDE = ("quarantine", "histories")  # audited while another table is being written: their seconds are spent waiting for its cores
HEAVY = "-XX:+UseParallelGC"  # and both compilers: what a profile for heavy jobs says in place of `spark_jobs.session.JVM`


def settings(root: Path, millions: float, days: int, partitions: int = 4) -> list[str]:
    """Overrides of the demo profile. `partitions`: of a shuffle."""
    return [
        f"paths.root={root}", f"simulator.users={round(USERS * millions)}", "simulator.items=5000", "simulator.new_items_per_day=10",
        f"simulator.days={days}", "spark.driver_memory=4g", f"spark.shuffle_partitions={partitions}",
        f"spark.extra={{spark.driver.extraJavaOptions: '{HEAVY}'}}",
    ]  # fmt: skip


def resident(root_pid: int) -> float:
    """MiB that a process and all that descend from it hold (Linux); pages that they share, as after a fork, count once (PSS)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    total, todo = 0.0, [root_pid]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            shares = re.findall(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
            total += sum(map(int, shares)) / 1024
        todo += [child for child, parent in parents.items() if parent == pid]
    return total


class Peak:
    """Largest resident memory of the process tree while it is open."""

    def __init__(self, pid: int) -> None:
        self.pid, self.mib, self.stop = pid, 0.0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.stop.wait(1):
            self.mib = max(self.mib, resident(self.pid))


def raw(work: Path, millions: float) -> dict[str, Any]:
    """Simulates the days that are not there yet."""
    import datetime as dt

    from gr2 import simulate
    from gr2.config import load

    root = work / f"spark-{millions:g}"
    cfg = load("demo", settings(root, millions, DAYS))
    start = dt.date.fromisoformat(cfg.simulator.start)
    simulate.write_days(cfg.simulator, cfg.seed, root / "raw", [start + dt.timedelta(days=n) for n in range(DAYS)], root / "truth")
    return {}


def spark(work: Path, millions: float) -> dict[str, Any]:
    """The whole build and its nights, each stage timed, the gates apart. Runs in a process of its own."""
    import datetime as dt
    import importlib
    import os

    from gr2.environment import set_defaults

    set_defaults()
    from gr2 import pipeline
    from gr2.config import load
    from gr2.context import Context

    publishing: Any = importlib.import_module("spark_jobs.publish")
    root = work / f"spark-{millions:g}"
    start = dt.date.fromisoformat(load("demo").simulator.start)
    gates = {"seconds": 0.0}
    audit = publishing._audit

    def timed(*given: Any) -> Any:
        began = time.monotonic()
        try:
            return audit(*given)
        finally:
            if given[1].name not in BESIDE:
                gates["seconds"] += time.monotonic() - began

    publishing._audit = timed
    whole = load("demo", settings(root, millions, DAYS - NIGHTS))
    importlib.import_module("validation.suites")._context()  # imports are not the work
    found: dict[str, Any] = {"millions": millions}
    peak = Peak(os.getpid())
    runs = [("build", Context(whole))]
    for number in range(1, NIGHTS + 1):
        day = DAYS - NIGHTS + number
        night = Context(load("demo", settings(root, millions, day, partitions=2)), start + dt.timedelta(days=day - 1))
        runs.append(("night" if number == NIGHTS else f"night {number}", night))
    for name, ctx in runs:
        _ = ctx.spark
        seconds, gates["seconds"] = {}, 0.0
        for stage in STAGES:
            began = time.monotonic()
            result = importlib.import_module(pipeline.get(stage).module).run(ctx.cfg, ctx)
            seconds[stage] = time.monotonic() - began
            found[f"{name} rows"] = result.rows_in if stage == "events" else found[f"{name} rows"]
        found |= {f"{name} seconds": seconds, f"{name} gates": gates["seconds"]}
    peak.stop.set()
    found |= {"peak MiB": peak.mib, "bytes": sum(f.stat().st_size for f in (root / "tables").rglob("*.parquet"))}
    return found


def polars(work: Path, millions: float) -> dict[str, Any]:
    """The same tables by the obvious Polars script, which keeps no rules, refuses and publishes nothing."""
    import os

    from schemas.lake import Lake

    root = work / f"spark-{millions:g}"
    peak, began = Peak(os.getpid()), time.monotonic()
    rows = polars_tables(root, work)
    seconds = time.monotonic() - began
    peak.stop.set()
    spark_rows = Lake(root).dataset("histories").count_rows()
    return {"polars seconds": seconds, "polars MiB": peak.mib, "equal": [rows, spark_rows]}


def polars_tables(root: Path, out: Path) -> int:
    """Raw days to `histories` and `pair_days` as Parquet; returns the rows of histories."""
    import gzip

    import polars as pl

    kinds = {"purchase": 3, "click": 2, "review": 1}
    fields = {n: pl.String for n in ("kind", "user_id", "item_id", "time", "request_id")} | {"row": pl.Int64, "col": pl.Int64}
    parts = []
    for path in sorted(root.glob("raw/day=*/events.jsonl.gz")):
        with gzip.open(path, "rb") as file:
            lines = [line for line in file.read().split(b"\n") if line.startswith(b"{") and line.endswith(b"}")]
        parts.append(pl.read_ndjson(b"\n".join(lines), schema=fields, ignore_errors=True))
    timed = pl.concat(parts).with_columns(pl.col("time").str.to_datetime("%+", time_unit="us", strict=False))
    events = timed.drop_nulls(["kind", "user_id", "item_id", "time"]).unique()
    acts = events.filter(pl.col("kind").is_in(list(kinds))).with_columns(
        pl.col("time").dt.date().alias("date"), pl.col("kind").replace_strict(kinds, return_dtype=pl.Int8).alias("strength")
    )
    late = pl.col("time").diff().over("user_id") > pl.duration(minutes=30)
    starts = (late | (pl.col("date") != pl.col("date").shift().over("user_id"))).fill_null(True)
    acts = acts.sort("user_id", "time").with_columns(starts.cum_sum().over("user_id").alias("session"))
    strongest = acts.sort("strength", descending=True, maintain_order=True)
    chosen = strongest.unique(["user_id", "session", "item_id"], keep="first", maintain_order=True).sort("user_id", "time")
    earlier = [pl.col("item_id").shift(step).over("user_id").alias("item") for step in range(1, 6)]
    pairs = pl.concat(
        [chosen.select("date", pl.col("item_id").alias("next"), e, pl.lit(n).alias("step")).drop_nulls() for n, e in enumerate(earlier, 1)]
    )
    days = pairs.filter(pl.col("item") != pl.col("next")).group_by("date", "item", "next")
    days.agg((1 / pl.col("step")).sum().alias("closeness"), pl.len().alias("count")).write_parquet(out / "pairs.parquet")
    placed = chosen.with_columns(pl.int_range(pl.len()).over("user_id").alias("place"))
    histories = placed.group_by("user_id", "date", maintain_order=True).agg(pl.col("place").last(), pl.col("item_id"))
    histories.write_parquet(out / "histories.parquet")
    return histories.height


def show(rows: list[dict[str, Any]]) -> None:
    """The table, and the exponent."""
    print("| events | build s | events/s | peak MiB | written MiB | gates | night s | night/build | Polars s | MiB | histories |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    totals = []
    for row in rows:
        build, night = sum(row["build seconds"].values()), sum(row["night seconds"].values())
        totals.append((row["build rows"], build))
        print(
            f"| {row['build rows']:,} | {build:.0f} | {row['build rows'] / build:,.0f} | {row['peak MiB']:,.0f} "
            f"| {row['bytes'] / 2**20:,.0f} | {row['build gates'] / build:.1%} | {night:.1f} ({row['night rows']:,}) | {night / build:.1%} "
            f"| {row['polars seconds']:.0f} | {row['polars MiB']:,.0f} | {row['equal'][0]:,} / {row['equal'][1]:,} |"
        )
        print(
            "   ",
            {k: {s: round(v, 1) for s, v in row[k].items()} for k in row if k.endswith(" seconds") and k != "polars seconds"},
            file=sys.stderr,
        )
    if len(totals) > 1:
        (n0, t0), (n1, t1) = totals[0], totals[-1]
        print(f"exponent of time against events: {math.log(t1 / t0) / math.log(n1 / n0):.2f}")


def main() -> None:
    """Each size and engine in a process of its own; results are kept in FOLDER and printed together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--millions", type=float, nargs="+", default=[1.0, 3.0, 10.0])
    parser.add_argument("--only", choices=["raw", "spark", "polars"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.only:
        print(json.dumps({"raw": raw, "spark": spark, "polars": polars}[given.only](given.work, given.millions[0])))
        return
    rows = []
    for millions in given.millions:
        row: dict[str, Any] = {}
        for engine in ("raw", "spark", "polars"):
            words = [sys.executable, "-m", "benchmarks.data_plane", "--work", str(given.work), "--millions", str(millions)]
            done = subprocess.run([*words, "--only", engine], stdout=subprocess.PIPE, text=True, check=True)
            row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        (given.work / "data_plane.json").write_text(json.dumps(rows))
    show(rows)


if __name__ == "__main__":
    main()
