"""Each item's text as a few learned vectors (METHOD 9)."""

from schemas.base import FLOAT, INT, STRING, Column, Table, list_of

TABLE = Table(
    name="item_latents",
    version="1.0",
    grain="one item and compressor version",
    key=("compressor", "item_id"),
    partition_by=("compressor",),
    layout="one version is read at a time",
    columns=(
        Column("compressor", STRING, "compressor, with its hash"),
        Column("item_id", STRING, "item"),
        Column("vectors", list_of(FLOAT), "k x hidden, row by row"),
        Column("k", INT, "vectors"),
        Column("text_tokens", INT, "tokens that they replace"),
    ),
)
