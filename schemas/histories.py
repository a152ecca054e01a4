"""What the platform knew of a user at the end of a day on which something happened."""

from schemas.base import DATE, INT, STRING, Column, Table, list_of

TABLE = Table(
    name="histories",
    version="1.0",
    grain="one user as of a day",
    key=("user_id", "as_of"),
    min_rows=1,
    laws={"lists_agree": "size(item_ids) = size(days)"},
    columns=(
        Column("user_id", STRING, "user"),
        Column("as_of", DATE, "end of this day"),
        Column("item_ids", list_of(STRING), "last data.max_history items, oldest first"),
        Column("days", list_of(INT), "day of each, days since 1970-01-01"),
        Column("length", INT, "interactions up to then, cut or not"),
    ),
)
