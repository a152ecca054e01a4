"""What the platform knew of a user at the end of a day on which something happened."""

from schemas.base import DATE, INT, STRING, Column, Table, list_of

TABLE = Table(
    name="histories",
    version="2.0",
    grain="one user as of a day",
    key=("user_id", "as_of"),
    partition_by=("period",),
    layout="a night adds the rows of its day, and replaces the periods since the late events of a user",
    min_rows=1,
    laws={"lists_agree": "size(item_ids) = size(days)"},
    columns=(
        Column("user_id", STRING, "user"),
        Column("as_of", DATE, "end of this day"),
        Column("item_ids", list_of(STRING), "last data.max_history items, oldest first"),
        Column("days", list_of(INT), "day of each, days since 1970-01-01"),
        Column("length", INT, "interactions up to then, cut or not"),
        Column("period", STRING, "partition: day, month or year of as_of, by data.period"),
    ),
)
