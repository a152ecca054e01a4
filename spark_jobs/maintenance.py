"""Stage `maintenance`: small files are joined, and files that no live release needs are removed (DESIGN contract 6).

Reads   `releases`; the logs of all tables.
Writes  no rows: OPTIMIZE rewrites files and VACUUM removes them; contents, and versions that are pinned, stay. Of work/ go answers that
        killed engine jobs kept and that nobody took up.
Rerun   harmless: joined files are not joined again, and removed ones are gone.
Run     gr2 stage maintenance --profile demo

The files of a version are kept while a release that is not retired pins it, or a build's draft, and for maintenance.keep_days without any
pin; the log, without which a version cannot be read either, is kept as long as the oldest pin is old. `gr2 release retire` lets go.
"""

import json
import math
import re
import time
from collections import Counter

from pyarrow.fs import FileType

import schemas
from gr2.config import Config
from gr2.context import Context, Result
from schemas.lake import dataset_of
from spark_jobs.session import alter

DAY = 86_400.0  # seconds
CHUNK = re.compile(r"\.?[0-9a-f]{24}\.parquet(-[0-9a-f]{8})?")  # whole, or as a killed worker left it
LOG_DAYS = 30  # how long Delta keeps a log unless it is told otherwise


def run(cfg: Config, ctx: Context) -> Result:
    """Maintains every table that exists."""
    pinned, detail, freed = live_versions(ctx), {}, 0
    for name in schemas.NAMES:
        if ctx.lake.exists(name):
            done = maintain(cfg, ctx, name, pinned.get(name, set()))
            freed += done.get("removed_files", 0)
            if done:
                detail[name] = done
                ctx.log(f"maintenance: {name}: {done}")
    if old := remove_chunks(cfg, ctx):
        ctx.log(f"maintenance: {old} kept answers of runs that never ended removed")
    return Result(rows_out=freed + old, detail=detail)


def live_versions(ctx: Context) -> dict[str, set[int]]:
    """Table -> versions that a release which is not retired pins, or is judged by, or that a build under way reads."""
    found = [Context(ctx.cfg).pins]
    if ctx.lake.exists("releases"):
        rows = ctx.lake.read("releases", ["pins"], status=["promoted", "superseded"]).to_pylist()
        found += [json.loads(row["pins"]) for row in rows]
    live: dict[str, set[int]] = {}
    for pins in found:
        for name, version in (*pins.get("tables", {}).items(), *pins.get("judged", {}).items()):
            live.setdefault(name, set()).add(version)
    return live


def maintain(cfg: Config, ctx: Context, name: str, pinned: set[int]) -> dict[str, int]:
    """What was done to one table; nothing where nothing was due."""
    joined = join_files(cfg, ctx, name)
    table = ctx.lake.open(name)
    age = max((time.time() - c["timestamp"] / 1000 for c in table.history() if c["version"] in pinned), default=0.0)
    if age > (LOG_DAYS - 1) * DAY:
        keep_log(ctx, name, math.ceil(age / DAY) + LOG_DAYS)
    # By delta-rs, since VACUUM in Spark knows one age for all and rounds it to hours; here each pinned version is named. Whatever is
    # younger than keep_days stays, so that a writer at work loses nothing.
    hours, keep = math.ceil(cfg.maintenance.keep_days * 24), sorted(pinned)
    listed = table.vacuum(hours, True, enforce_retention_duration=False, full=True, keep_versions=keep)
    found = dataset_of(table).filesystem.get_file_info(listed)
    removed = [file for file in found if file.type != FileType.NotFound]  # it names what went before, too
    if removed:  # else a commit would say that nothing happened
        table.vacuum(hours, False, enforce_retention_duration=False, full=True, keep_versions=keep)
    return {k: v for k, v in (("joined_files", joined), ("removed_files", len(removed))) if v}


def join_files(cfg: Config, ctx: Context, name: str) -> int:
    """Compacts a table where a partition has more than maintenance.small_files files; returns how many were joined."""
    partitions = schemas.get(name).partition_by
    actions = ctx.lake.open(name).get_add_actions(flatten=True)
    columns = [actions[f"partition.{column}"] for column in partitions]
    counts = Counter(tuple(column[row].as_py() for column in columns) for row in range(len(actions["path"])))
    if max(counts.values(), default=0) <= cfg.maintenance.small_files:
        return 0
    from delta.tables import DeltaTable

    compaction = DeltaTable.forPath(ctx.spark, ctx.table_path(name)).optimize().executeCompaction()
    return int(compaction.select("metrics.numFilesRemoved").collect()[0][0])


def remove_chunks(cfg: Config, ctx: Context) -> int:
    """Removes answers that killed engine jobs left in work/ (`engine_pool.answered`) and no later run took up; returns how many."""
    before = time.time() - max(cfg.maintenance.keep_days, 1.0) * DAY  # those of a run at work are younger
    chunks = (path for path in ctx.work().glob("*/*.parquet*") if CHUNK.fullmatch(path.name))
    old = [path for path in chunks if path.stat().st_mtime < before]
    for path in old:
        path.unlink(missing_ok=True)
    return len(old)


def keep_log(ctx: Context, name: str, days: int) -> None:
    """Has Delta keep a table's log for so many days, if it keeps it shorter."""
    found = ctx.lake.open(name).metadata().configuration.get("delta.logRetentionDuration", f"interval {LOG_DAYS} days")
    if int(found.split()[1]) < days:
        alter(ctx, name, f"SET TBLPROPERTIES ('delta.logRetentionDuration' = 'interval {days:d} days')")
