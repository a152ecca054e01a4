"""OpenLineage: which versions of which tables a stage read and wrote, told to whoever listens.

Nothing is told unless the operator says where to, by the client's own variables (OPENLINEAGE_URL, OPENLINEAGE_CONFIG, or
OPENLINEAGE__TRANSPORT__TYPE and its like). A listener that cannot be reached never fails a stage.
"""

import contextlib
import datetime as dt
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gr2.context import Context

PRODUCER = "gr2"


def wanted() -> bool:
    """Whether the environment names a listener."""
    return any(name == "OPENLINEAGE_URL" or name.startswith(("OPENLINEAGE_CONFIG", "OPENLINEAGE__TRANSPORT")) for name in os.environ)


@contextlib.contextmanager
def told(stage: str, ctx: "Context", reads: tuple[str, ...], writes: tuple[str, ...]) -> Iterator[None]:
    """Tells START, then COMPLETE or FAIL, of one run of a stage; tables with the versions that it found, and that it left."""
    if not wanted() or os.environ.get("RANK", "0") != "0":
        yield
        return
    run, before = str(uuid.uuid4()), versions(ctx, reads)
    _emit(ctx, "START", run, stage, before, {})
    try:
        yield
    except Exception as error:
        _emit(ctx, "FAIL", run, stage, before, {}, f"{type(error).__name__}: {error}")
        raise
    _emit(ctx, "COMPLETE", run, stage, before, versions(ctx, writes))


def versions(ctx: "Context", tables: tuple[str, ...]) -> dict[str, int]:
    """Table -> its version, of those that exist."""
    return {name: ctx.lake.version(name) for name in tables if ctx.lake.exists(name)}


def _emit(
    ctx: "Context", state: str, run: str, stage: str, reads: dict[str, int], writes: dict[str, int], failure: str | None = None
) -> None:
    try:
        from openlineage.client import OpenLineageClient
        from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
        from openlineage.client.facet_v2 import dataset_version_dataset, error_message_run

        def facets(version: int) -> dict[str, Any]:
            return {"version": dataset_version_dataset.DatasetVersionDatasetFacet(str(version))}

        place = ctx.place if "://" in ctx.place else Path(ctx.place).resolve().as_uri()
        about: dict[str, Any] = {"errorMessage": error_message_run.ErrorMessageRunFacet(failure, "python")} if failure else {}
        event = RunEvent(
            eventType=RunState[state],
            eventTime=dt.datetime.now(dt.UTC).isoformat(),
            run=Run(run, about),
            job=Job(PRODUCER, f"{ctx.cfg.profile}.{stage}"),
            producer=PRODUCER,
            inputs=[InputDataset(place, f"tables/{name}", facets=facets(v)) for name, v in reads.items()],
            outputs=[OutputDataset(place, f"tables/{name}", facets=facets(v)) for name, v in writes.items()],
        )
        OpenLineageClient().emit(event)
    except Exception as error:
        ctx.log(f"lineage: not told ({type(error).__name__})")
