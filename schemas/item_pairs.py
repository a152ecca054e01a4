"""Directed co-occurrence: what tends to follow what, decayed, as of what it was fitted on."""

from schemas.base import DOUBLE, INT, LONG, STRING, Column, Table

TABLE = Table(
    name="item_pairs",
    version="1.0",
    grain="one directed pair of items and fit",
    key=("fit", "item_id", "next_item_id"),
    partition_by=("fit",),
    layout="a fit is replaced whole, and one is read at a time",
    laws={"positive": "weight > 0 AND count >= 1"},
    columns=(
        Column(
            "fit", STRING, "interactions it was fitted on: train (split pretrain) or refit (pretrain and rerank)", values=("train", "refit")
        ),
        Column("item_id", STRING, "earlier item"),
        Column("next_item_id", STRING, "later item of the same history, within evidence.window steps"),
        Column("weight", DOUBLE, "co-occurrence, decayed by age at the reference date and by distance in steps"),
        Column("count", LONG, "undecayed count"),
        Column("next_count", LONG, "count at distance one: direct transitions"),
        Column("lift", DOUBLE, "weight over what independence would give"),
        Column("median_gap_days", DOUBLE, "median of the days between the two"),
        Column("rank", INT, "place of the pair among the item's, by weight, from 1"),
    ),
)
