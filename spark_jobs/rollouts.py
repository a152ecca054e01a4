"""Stage `rollouts`: every sample that the current policies were trained on becomes a row.

Reads the Arrow files that the stages `rl` and `opd` left under work/rollouts/<run>, for the runs that made the current models.
Writes `rollouts` (one sample of one training step; key rollout_id), insert-only: runs of earlier models stay.
A rerun is harmless: a rollout's id holds run, step, prompt and place, and rows that are there are left as they are.

    gr2 stage rollouts --profile demo
"""

import pyarrow as pa

import schemas
from gr2 import artifacts
from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import InputError, MissingInputError
from spark_jobs.publish import publish
from spark_jobs.session import frame_of

POLICIES = ("rl-teacher", "rl", "opd", "opd+rl")


def run(cfg: Config, ctx: Context) -> Result:
    """Publishes the rollouts of the current policies. Raises MissingInputError (no policy), InputError (their files are gone)."""
    there = [name for name in POLICIES if name in artifacts.names(ctx.root)]
    if not there:
        raise MissingInputError(f"no policy was trained under {ctx.root}: run `gr2 stage rl` first")
    runs = [f"{name}-{ctx.model(name).manifest['fingerprint']}" for name in there]
    tables = {run_id: stored(ctx, run_id) for run_id in runs}
    table = pa.concat_tables(tables.values())
    added = publish(ctx, "rollouts", frame_of(ctx, table))
    return Result(rows_in=table.num_rows, rows_out=added, detail={run_id: part.num_rows for run_id, part in tables.items()})


def stored(ctx: Context, run_id: str) -> pa.Table:
    """A run's rollouts in the columns of the table. Raises InputError where neither files nor published rows are left."""
    schema = schemas.get("rollouts").arrow()
    parts = []
    for path in sorted(ctx.work("rollouts", run_id).glob("step-*.arrow")):
        with pa.memory_map(str(path)) as source:
            parts.append(pa.ipc.open_file(source).read_all().select(schema.names))
    if parts:
        return pa.concat_tables(parts)
    if ctx.lake.exists("rollouts") and ctx.lake.read("rollouts", ["rollout_id"], run=run_id).num_rows:
        return schema.empty_table()
    raise InputError(f"the rollouts of {run_id} are gone from work/rollouts: run `gr2 stage rl` and `gr2 stage opd` again")
