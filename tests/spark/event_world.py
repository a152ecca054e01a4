"""Raw files and events for the tests of the first stages."""

import datetime as dt
import gzip
import json
from pathlib import Path

import pyarrow as pa

import schemas

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def write(path: Path, lines: list[dict | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines).encode()))
    return path


def event_table(rows: list[tuple], **same: object) -> pa.Table:
    """(user, item, kind, minutes since the start) as events."""
    found = []
    for n, (user, item, kind, minutes) in enumerate(rows):
        time = None if minutes is None else START + dt.timedelta(minutes=minutes)
        event = dict.fromkeys(c.name for c in schemas.get("events").columns)
        event |= {"event_id": f"e{n:05d}", "kind": kind, "user_id": user, "item_id": item, "event_time": time, "source_file": "f"}
        event |= {"event_date": (time or START).date(), "day_known": time is not None, "ingest_date": dt.date(2026, 6, 1), "period": "2026"}
        found.append(event | same)
    return pa.Table.from_pylist(found, schema=schemas.get("events").arrow())


def day_events(came: list[tuple[str, int, int]]) -> pa.Table:
    """(user, number of the item, days since the start) as clicks, each in the period of its day; equal ones are equal events."""
    table = event_table([(user, f"i{item}", "click", day * 1440 + item) for user, item, day in came]).to_pylist()
    for event, said in zip(table, came, strict=True):
        event |= {"event_id": "-".join(map(str, said)), "period": str(event["event_date"])}
    return pa.Table.from_pylist(table, schema=schemas.get("events").arrow())
