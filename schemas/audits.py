"""What was checked, what was found, whether it passed."""

from schemas.base import BOOL, DOUBLE, STRING, Column, Table

TABLE = Table(
    name="audits",
    version="1.0",
    grain="one check of one run",
    key=("run_id", "stage", "audit", "subject"),
    partition_by=("run_id",),
    layout="a run replaces its own figures",
    columns=(
        Column("run_id", STRING, "run"),
        Column("stage", STRING, "stage that was audited"),
        Column(
            "audit", STRING, "coverage, drift, gate, leakage, position, reconciliation, reward_hacking, sid_health, stale_answers, traces"
        ),
        Column("subject", STRING, "what the figure is of"),
        Column("value", DOUBLE, "figure", nullable=True),
        Column("low", DOUBLE, "smallest value that passes", nullable=True),
        Column("high", DOUBLE, "largest value that passes", nullable=True),
        Column("passed", BOOL, "whether it did"),
        Column("detail", STRING, "in words", long=True),
    ),
)
