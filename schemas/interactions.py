"""Deduplicated, sessionised interactions in each user's order; `split` cuts them by the profile's protocol."""

from schemas.base import BOOL, DATE, INT, STRING, TIMESTAMP, Column, Table

FITS = {"train": ("pretrain",), "refit": ("pretrain", "rerank")}  # the splits that each fit learns from

TABLE = Table(
    name="interactions",
    version="2.0",
    grain="one interaction of a user with an item",
    key=("user_id", "ordinal"),
    unique=(("event_id",),),
    laws={"ordinal_from_one": "ordinal >= 1"},
    partition_by=("period",),
    min_rows=1,
    change_feed=True,
    layout="a night replaces the periods in which something changed: its own, those of late events, and the days that a window moved over",
    columns=(
        Column("user_id", STRING, "user"),
        Column("ordinal", INT, "place in the user's history, from 1, oldest first"),
        Column("item_id", STRING, "item"),
        Column("event_id", STRING, "event it stands for (the strongest of its session: purchase, then click)"),
        Column("kind", STRING, "kind of that event"),
        Column("event_time", TIMESTAMP, "when, UTC", nullable=True),
        Column("event_date", DATE, "day"),
        Column("day_known", BOOL, "false where the day was filled in"),
        Column("session", INT, "session of the user, from 1: a new one after data.session_gap_minutes, or a new day"),
        Column("gap_days", INT, "days since the interaction before; null for the first", nullable=True),
        Column(
            "split",
            STRING,
            "part of the protocol: the pre-ranker and evidence are fitted on pretrain",
            values=("pretrain", "rerank", "valid", "test"),
        ),
        Column("period", STRING, "partition: day, month or year of event_date, by data.period"),
    ),
)
