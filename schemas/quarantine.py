"""Rows that were refused, with the reason: nothing is lost, nothing bad is let in."""

from schemas.base import DATE, STRING, Column, Table

TABLE = Table(
    name="quarantine",
    version="1.0",
    grain="one refused row",
    key=("quarantine_id",),
    mode="insert",
    partition_by=("target",),
    layout="what one stage refused is looked at together",
    columns=(
        Column("quarantine_id", STRING, "hash of file, locator, reason and record"),
        Column("target", STRING, "table the row was meant for"),
        Column("reason", STRING, "rule that refused it, such as missing_user, bad_time, future_date, not_json"),
        Column("source_file", STRING, "file the row came from"),
        Column("locator", STRING, "start of the record's hash: equal rows of a file are kept once"),
        Column("record", STRING, "the record, cut to 500 characters, personal fields removed", long=True),
        Column("ingest_date", DATE, "day whose run refused it"),
    ),
)
