"""What changed since a table was built: how a night costs what changed, and not what there is.

A stage that builds by increments says, in the commit of its table, which version of its source the rows were made from, under which
settings and code (`Built`). The next night reads from the source's change feed what was added since, rebuilds what depends on it, and
replaces whole partitions. Where no earlier build can be told, or it was made otherwise, everything is built: slower, and the same rows.

Two runs at once: a build is published only onto the version that it started from. Who was overtaken starts again (`until_settled`).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyspark.errors import PySparkException
from pyspark.sql import DataFrame

from gr2.config import Config
from gr2.context import Context, Result
from gr2.pipeline import get, settings_of
from schemas.lake import UPKEEP
from spark_jobs.publish import RETRIES, Overtaken
from spark_jobs.session import read


@dataclass(frozen=True)
class Built:
    """What a table's rows were made from."""

    source: str
    version: int  # of the source
    settings: dict[str, Any]  # hashes of the stage's settings and code; anything else that a later build must know
    base: int = -1  # version of the table that the build started from; -1: there was none

    def metadata(self) -> str:
        """As it stands in the commit."""
        return json.dumps({"source": self.source, "version": self.version, "settings": self.settings}, sort_keys=True)


def building(cfg: Config, ctx: Context, stage: str, target: str, source: str) -> Built:
    """What a build of `target` that begins now is made from. Raises MissingInputError without the source.

    The draft then holds the source as it is read here, though a night published it: later stages belong to what was made from it.
    """
    base, version = ctx.lake.version(target) if ctx.lake.exists(target) else -1, ctx.lake.version(source)
    if not ctx.date:
        ctx.pin("tables", source, version)
    return Built(source, version, dict(settings_of(get(stage), cfg)), base)


def last_built(ctx: Context, target: str, now: Built) -> Built | None:
    """How the rows of `target` were made, if the last commit that changed them says so, of the same source and by the same code."""
    if now.base < 0:
        return None
    told = json.loads(ctx.lake.content_commit(target).get("userMetadata") or "{}")
    same = ("config", "code")
    if told.get("source") != now.source or any(told["settings"].get(k) != now.settings[k] for k in same):
        return None
    return Built(now.source, told["version"], told["settings"], now.base)


def added(ctx: Context, now: Built, before: Built) -> DataFrame | None:
    """Rows that the source gained between two builds; nothing where its change feed does not reach back so far."""
    if before.version >= now.version:
        return read(ctx, now.source).limit(0)
    feed = ctx.spark.read.format("delta").option("readChangeFeed", "true").option("startingVersion", before.version + 1)
    try:
        changed = feed.option("endingVersion", now.version).load(ctx.table_path(now.source))
        changed.schema  # noqa: B018  (resolves the versions, or fails)
    except PySparkException as error:
        ctx.log(f"{now.source}: its change feed does not reach back to version {before.version} ({str(error).splitlines()[0][:120]})")
        return None
    return changed.where("_change_type = 'insert'").drop("_change_type", "_commit_version", "_commit_timestamp")


def replaced(ctx: Context, now: Built, before: Built) -> set[str] | None:
    """Periods of the source that were replaced between two builds, as its commits say; nothing where one of them does not say."""
    commits = ctx.lake.commits(now.source)
    if before.version < commits[-1]["version"]:
        return None
    between = [c for c in commits if before.version < c["version"] <= now.version and c.get("operation") not in UPKEEP]
    told = [json.loads(c.get("userMetadata") or "{}").get("settings", {}).get("periods") for c in between]
    return None if None in told else {period for periods in told for period in periods}


def until_settled(ctx: Context, build: Callable[[], Result]) -> Result:
    """Builds, and again where another run published in between. Raises Overtaken if that does not end."""
    for attempt in range(RETRIES):
        try:
            return build()
        except Overtaken as error:
            if attempt == RETRIES - 1:
                raise
            ctx.log(f"{error}; building again")
    raise AssertionError("unreachable")
