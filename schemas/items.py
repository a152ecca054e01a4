"""The catalogue: what is known of every item, text assembled for models."""

from schemas.base import BOOL, DATE, DOUBLE, STRING, Column, Table, list_of

TABLE = Table(
    name="items",
    version="1.1",
    grain="one item",
    key=("item_id",),
    laws={"price_not_negative": "price IS NULL OR price >= 0", "text_not_empty": "length(text) > 0"},
    min_rows=1,
    columns=(
        Column("item_id", STRING, "item"),
        Column("title", STRING, "title, HTML entities resolved, at most 300 characters", nullable=True),
        Column("brand", STRING, "brand or maker", nullable=True),
        Column("categories", list_of(STRING), "categories, general to special; empty where unknown"),
        Column("price", DOUBLE, "price in the source's currency", nullable=True),
        Column("text", STRING, "title, brand and categories in one line; the item id where nothing else is known", long=True),
        Column("has_text", BOOL, "false where text is only the id"),
        Column("first_seen", DATE, "first day the item is known", nullable=True),
        Column("asin", STRING, "Amazon's number, where the files name one", nullable=True),
    ),
)
