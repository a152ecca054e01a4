"""Every quality figure, with its interval and what it is compared to."""

from schemas.base import DOUBLE, INT, LONG, STRING, Column, Table

TABLE = Table(
    name="metrics",
    version="1.0",
    grain="one figure",
    key=("run_id", "profile", "protocol", "model", "mode", "population", "slice", "n_candidates", "seed", "metric", "reference"),
    partition_by=("run_id",),
    layout="a run replaces its own figures",
    laws={"interval_holds_value": "low IS NULL OR (low <= value + 1e-9 AND value <= high + 1e-9)"},
    columns=(
        Column("run_id", STRING, "run"),
        Column("profile", STRING, "profile"),
        Column("protocol", STRING, "leave_one_out or time, and the order inside a day"),
        Column("model", STRING, "model or baseline; prerank is the incoming order"),
        Column("mode", STRING, "think, direct, score; order for baselines; full for full ranking over all items"),
        Column("population", STRING, "overall: every request; conditional: target in the list", values=("overall", "conditional")),
        Column("slice", STRING, "all, same_day, later_day (the headline), provably_later, unknown_day"),
        Column("n_candidates", INT, "list length; 0 for full ranking"),
        Column("seed", LONG, "seed of the run"),
        Column("metric", STRING, "recall@k, ndcg@k, mrr"),
        Column("reference", STRING, "empty: the value itself; a model: the difference to it, paired"),
        Column("value", DOUBLE, "mean over requests"),
        Column("low", DOUBLE, "lower end of the 95 % bootstrap interval", nullable=True),
        Column("high", DOUBLE, "upper end", nullable=True),
        Column("n", LONG, "requests"),
    ),
)
