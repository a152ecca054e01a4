"""Baseline orders in the form of rerank_scores."""

from schemas.base import STRING, Column, Table, list_of

TABLE = Table(
    name="baselines",
    version="1.1",
    grain="one request and baseline",
    key=("request_id", "model"),
    partition_by=("model",),
    layout="one order at a time is read",
    columns=(
        Column("request_id", STRING, "request"),
        Column("model", STRING, "baseline", values=("prerank", "random", "popularity", "transition", "lambdamart", "program", "oracle")),
        Column("split", STRING, "as in candidates", values=("valid", "test")),
        Column("new_order", list_of(STRING), "candidate ids, best first"),
    ),
)
