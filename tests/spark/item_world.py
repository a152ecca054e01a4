"""Items of three topics, and who follows whom: what the tests of vectors and codes are built on."""

from gr2.context import Context
from tests.tables import put

TOPICS = ("lavender hair shampoo", "red nail polish", "steel coffee grinder")


def topic_of(item: str) -> int:
    return int(item[1:]) % 3


def put_items(ctx: Context, count: int) -> list[str]:
    """Items of three topics; the last one is never bought."""
    ids = [f"i{k:03d}" for k in range(count)]
    rows = [{"item_id": i, "categories": [], "text": f"{TOPICS[topic_of(i)]} number {i}", "has_text": True} for i in ids]
    put(ctx, "items", rows)
    return ids


def put_pairs(ctx: Context, ids: list[str], fit: str, shift: int) -> None:
    """Each item but the last is followed by the two next ones of a topic that is `shift` away (0: its own)."""
    rows = []
    for k, item in enumerate(ids[:-1]):
        others = [o for o in ids[k + 1 : -1] if topic_of(o) == (topic_of(item) + shift) % 3][:2]
        rows += [
            {"fit": fit, "item_id": item, "next_item_id": o, "weight": 1.0 / r, "count": 1, "rank": r} for r, o in enumerate(others, 1)
        ]
    for row in rows:
        row |= {"next_count": 1, "lift": 1.0, "median_gap_days": 1.0}
    put(ctx, "item_pairs", rows, {"fit": fit})
