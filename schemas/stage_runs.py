"""What each stage did and cost."""

from schemas.base import DOUBLE, LONG, STRING, Column, Table

TABLE = Table(
    name="stage_runs",
    version="1.0",
    grain="one run of one stage",
    key=("run_id", "stage"),
    columns=(
        Column("run_id", STRING, "run"),
        Column("stage", STRING, "stage"),
        Column("status", STRING, "ok; up_to_date: it ran in an earlier run, which the other columns tell of", values=("ok", "up_to_date")),
        Column("rows_in", LONG, "rows read"),
        Column("rows_out", LONG, "rows published"),
        Column("quarantined", LONG, "rows refused"),
        Column("duplicates", LONG, "duplicates dropped"),
        Column("tokens", LONG, "tokens trained on or generated"),
        Column("seconds", DOUBLE, "wall time", volatile=True),
        Column("peak_mib", DOUBLE, "peak memory of the process and its children", volatile=True),
        Column("fingerprint", STRING, "hash of configuration, code and inputs"),
        Column("detail", STRING, "JSON: what else the stage says of itself", volatile=True, long=True),
    ),
)
