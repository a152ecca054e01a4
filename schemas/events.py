"""What users did, as the logs say it: one row an event, deduplicated by content."""

from schemas.base import BOOL, DATE, DOUBLE, INT, LONG, STRING, TIMESTAMP, Column, Table

TABLE = Table(
    name="events",
    version="1.0",
    grain="one user-item event",
    key=("event_id",),
    partition_by=("period",),
    mode="insert",
    change_feed=True,
    layout="logs arrive, and are read, by day; a merge looks only into the periods of the rows that come in",
    laws={
        "known_kind": "kind IN ('view', 'click', 'purchase', 'review', 'impression')",
        "rating_in_range": "rating IS NULL OR rating BETWEEN 0 AND 10",
        "slot_from_one": "slot_row IS NULL OR slot_row >= 1",
        "propensity_is_probability": "propensity IS NULL OR (propensity > 0 AND propensity <= 1)",
    },
    columns=(
        Column("event_id", STRING, "hash of source, user, item, kind, time, request and slot: the same event ingested twice is one row"),
        Column("kind", STRING, "what happened", values=("view", "click", "purchase", "review", "impression")),
        Column("user_id", STRING, "pseudonymous user"),
        Column("item_id", STRING, "item, a string even where it looks like a number"),
        Column("event_time", TIMESTAMP, "when, UTC; null where the source has none", nullable=True),
        Column("event_date", DATE, "UTC day of event_time; the day of the nearest earlier event of the user where the time is unknown"),
        Column("day_known", BOOL, "false where event_date was filled in"),
        Column("source_order", LONG, "place in the source's own order of this user, where it has one", nullable=True),
        Column("rating", DOUBLE, "stars, where the event is a review", nullable=True),
        Column("request_id", STRING, "request that showed the item, where logs have it", nullable=True),
        Column("slot_row", INT, "row of the slot, from 1", nullable=True),
        Column("slot_col", INT, "column of the slot, from 1", nullable=True),
        Column("propensity", DOUBLE, "probability with which the logging policy showed the item there", nullable=True),
        Column("source_file", STRING, "file the row came from first, relative to the data folder", volatile=True),
        Column("ingest_date", DATE, "day whose run ingested the row: late events have event_date before it", volatile=True),
        Column("period", STRING, "partition: day, month or year of event_date, by data.period"),
    ),
)
