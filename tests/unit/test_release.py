"""Which releases stay live when another is promoted."""

import datetime as dt

from spark_jobs.release import succeeded


def row(number: int, status: str) -> dict:
    return {"release_id": f"r{number}", "status": status, "promoted_at": dt.datetime(2026, 1, number, tzinfo=dt.UTC)}


def statuses(rows: list[dict]) -> dict[str, str]:
    return {r["release_id"]: r["status"] for r in rows}


def test_the_one_before_is_superseded_and_the_oldest_are_retired():
    there = [row(1, "superseded"), row(2, "retired"), row(3, "superseded"), row(4, "promoted")]
    found = statuses(succeeded(there, row(5, "promoted"), keep=2))
    assert found == {"r1": "retired", "r2": "retired", "r3": "superseded", "r4": "superseded", "r5": "promoted"}


def test_the_same_pins_promoted_again_are_one_release():
    there = [row(1, "superseded"), row(2, "promoted")]
    assert statuses(succeeded(there, row(2, "promoted"), keep=9)) == {"r1": "superseded", "r2": "promoted"}
    assert statuses(succeeded([], row(1, "promoted"), keep=0)) == {"r1": "promoted"}
