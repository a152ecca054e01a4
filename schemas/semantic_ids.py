"""The bijection between items and codes under one frozen tokenizer (DESIGN contract 8)."""

from schemas.base import BOOL, DATE, DOUBLE, INT, STRING, Column, Table, list_of

TABLE = Table(
    name="semantic_ids",
    version="1.0",
    grain="one item and tokenizer version",
    key=("tokenizer", "item_id"),
    partition_by=("tokenizer",),
    layout="one tokenizer is read at a time, and old ones stay as they were",
    unique=(("tokenizer", "token_text"),),
    min_rows=1,
    laws={"levels_agree": "size(codes) = size(learned_codes)"},
    columns=(
        Column("tokenizer", STRING, "tokenizer version: tokenizer@ and its content hash"),
        Column("item_id", STRING, "item"),
        Column("codes", list_of(INT), "one code a level, after collisions were separated"),
        Column("token_text", STRING, "such as <a_12><b_240><c_7><d_3>"),
        Column("learned_codes", list_of(INT), "codes before separation"),
        Column("separated", BOOL, "true where codes differ from learned_codes"),
        Column("residual", DOUBLE, "squared error of the quantised vector, relative to the vector's own squared norm"),
        Column("added_on", DATE, "day whose run added the item", volatile=True),
    ),
)
