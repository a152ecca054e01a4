"""Item vectors by model: text beside collaborative."""

from schemas.base import FLOAT, STRING, Column, Table, list_of

TABLE = Table(
    name="item_embeddings",
    version="1.0",
    grain="one item and embedding model",
    key=("item_id", "model"),
    partition_by=("model",),
    layout="a model is replaced whole, and one is read at a time",
    min_rows=1,
    columns=(
        Column("item_id", STRING, "item"),
        Column("model", STRING, "tfidf_svd, pairs_svd, or the last two parts of the encoder's id, joined by --"),
        Column("vector", list_of(FLOAT), "unit length; all zero where the model knows nothing of the item"),
    ),
)
