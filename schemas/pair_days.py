"""What followed what on each day: the additive facts that the evidence of any fit, and of any night, is summed up from."""

from schemas.base import DATE, DOUBLE, INT, LONG, STRING, Column, Table, list_of

TABLE = Table(
    name="pair_days",
    version="1.0",
    grain="one directed pair of items on one day",
    key=("event_date", "split", "item_id", "next_item_id"),
    partition_by=("period",),
    layout="a night replaces the periods in which interactions changed, and no other",
    laws={"positive": "closeness > 0 AND count >= 1 AND next_count <= count", "gaps_agree": "size(gap_days) = count"},
    columns=(
        Column("event_date", DATE, "day of the later interaction; 1970-01-01 where no day is known"),
        Column("split", STRING, "split of the later interaction", values=("pretrain", "rerank", "valid", "test")),
        Column("item_id", STRING, "earlier item"),
        Column("next_item_id", STRING, "later item of the same history, within evidence.window steps"),
        Column("closeness", DOUBLE, "sum of 1 / steps between the two; decay is counted when days are summed up"),
        Column("count", LONG, "occurrences"),
        Column("next_count", LONG, "occurrences at distance one: direct transitions"),
        Column("gap_days", list_of(INT), "days between the two, of each occurrence, ascending"),
        Column("period", STRING, "partition: day, month or year of event_date, by data.period"),
    ),
)
