"""Stage `item_latents`: each item's learned vectors as a table.

Reads the artefact `latents` (its vectors.arrow). Writes `item_latents` (one item and compressor version; key compressor, item_id), the
current compressor's partition alone; those of earlier compressors stay.
A rerun is harmless: the partition is named after the compressor's content and replaced whole.

    gr2 stage item_latents --profile demo
"""

import pyarrow as pa

import schemas
from gr2.config import Config
from gr2.context import Context, Result
from spark_jobs.publish import publish
from spark_jobs.session import frame_of


def run(cfg: Config, ctx: Context) -> Result:
    """Publishes the current compressor's vectors. Raises MissingInputError, AuditError."""
    compressor = ctx.model("latents")
    with pa.memory_map(str(compressor.path / "vectors.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
        named = table.append_column("compressor", pa.array([compressor.id] * table.num_rows, pa.string()))
        rows = publish(ctx, "item_latents", frame_of(ctx, named.select(schemas.get("item_latents").names())), {"compressor": compressor.id})
    return Result(rows_in=table.num_rows, rows_out=rows)
