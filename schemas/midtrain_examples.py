"""Texts of the mid-training mix (METHOD 3)."""

from schemas.base import LONG, STRING, Column, Table

TABLE = Table(
    name="midtrain_examples",
    version="1.0",
    grain="one training text",
    key=("fit", "example_id"),
    partition_by=("fit",),
    sort_by=("ordinal",),
    layout="a fit is replaced whole, and one is read at a time, by ranges of the ordinal",
    min_rows=1,
    columns=(
        Column("fit", STRING, "interactions it was built from: train or refit", values=("train", "refit")),
        Column("example_id", STRING, "task and the user or item"),
        Column("task", STRING, "part of the mix", values=("history", "titles", "captions", "lookup", "persona")),
        Column("prompt", STRING, "read, not learned; may be empty", long=True),
        Column("completion", STRING, "learned", long=True),
        Column("ordinal", LONG, "order of reading: by hash of example_id"),
    ),
)
