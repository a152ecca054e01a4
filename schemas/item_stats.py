"""How often and how lately an item was chosen, as of what it was fitted on."""

from schemas.base import DATE, DOUBLE, INT, LONG, STRING, Column, Table

TABLE = Table(
    name="item_stats",
    version="1.0",
    grain="one item and fit",
    key=("fit", "item_id"),
    partition_by=("fit",),
    layout="a fit is replaced whole, and one is read at a time",
    columns=(
        Column("fit", STRING, "as in item_pairs", values=("train", "refit")),
        Column("item_id", STRING, "item"),
        Column("count", LONG, "interactions"),
        Column("users", LONG, "distinct users"),
        Column("recent", DOUBLE, "interactions, decayed by age at the reference date"),
        Column("popularity_rank", INT, "1 for the most frequent (ties by item_id)"),
        Column("last_date", DATE, "last interaction", nullable=True),
        Column("reference_date", DATE, "end of the fitted interactions: ages are counted from here"),
    ),
)
