"""Which item was shown in which slot, and what came of it, where logs say so."""

from schemas.base import BOOL, DATE, DOUBLE, INT, STRING, TIMESTAMP, Column, Table

TABLE = Table(
    name="impressions",
    version="1.0",
    grain="one item in one slot of one request",
    key=("request_id", "item_id"),
    partition_by=("period",),
    layout="as events: slates are read by day, and a night replaces the periods of requests that changed",
    laws={"slot_from_one": "slot_row >= 1 AND slot_col >= 1", "purchase_needs_click": "NOT purchase OR click"},
    columns=(
        Column("request_id", STRING, "request"),
        Column("user_id", STRING, "user"),
        Column("item_id", STRING, "item shown"),
        Column("request_time", TIMESTAMP, "when the slate was shown"),
        Column("event_date", DATE, "day"),
        Column("slot_row", INT, "row, from 1"),
        Column("slot_col", INT, "column, from 1"),
        Column("position", INT, "reading order of the slot in the request, from 1"),
        Column("propensity", DOUBLE, "probability of showing the item there, where logged", nullable=True),
        Column("click", BOOL, "clicked"),
        Column("purchase", BOOL, "bought after the click"),
        Column("grade", INT, "0 nothing, 1 click, 2 click and purchase"),
        Column("period", STRING, "partition"),
    ),
)
