"""Prompts for RL and OPD, each with what a verifier needs."""

from schemas.base import BOOL, FLOAT, INT, LONG, STRING, Column, Table, list_of

TABLE = Table(
    name="rl_prompts",
    version="1.1",
    grain="one prompt",
    key=("prompt_id",),
    partition_by=("split",),
    layout="one split is read at a time",
    columns=(
        Column("prompt_id", STRING, "request and replica"),
        Column("request_id", STRING, "request"),
        Column("split", STRING, "rerank trains, valid picks", values=("rerank", "valid")),
        Column("redrawn", BOOL, "true where the incoming order was re-drawn so that the target's rank is uniform"),
        Column("prompt", STRING, "rendered prompt", long=True),
        Column("mode", STRING, "think or direct", values=("think", "direct")),
        Column("incoming", list_of(STRING), "labels in the incoming order D (after re-drawing)"),
        Column("shown", list_of(STRING), "labels in the order shown"),
        Column("grades", list_of(INT), "relevance of each label of `incoming`"),
        Column("weights", list_of(FLOAT), "what each grade counts, as in candidates", nullable=True),
        Column("evidence", list_of(STRING), "what a thought may cite: labels and evidence words shown"),
        Column("prompt_hash", STRING, "hash of template and text"),
        Column("ordinal", LONG, "order of reading"),
    ),
)
