"""Drift: does a night look like the weeks before it, and are answers what they were when the model was judged?

Population stability index, sum over bins of (share now - share before) * ln(share now / share before) (Siddiqi, Credit Risk Scorecards,
2006): below 0.1 little moved, above 0.25 much. Samples of finite size have a positive index even if nothing moved, about
(bins - 1) * (1 / n now + 1 / n before); limits are held against the index less that.
"""

import datetime as dt
import math
from collections.abc import Mapping

from gr2.context import Context
from schemas.lake import Lake
from validation.findings import Finding, finding
from validation.gate import judged

FEWEST = 50  # rows on either side; with fewer nothing is concluded
FLOOR = 1e-4  # share that an empty bin counts as
# of a night its own lists and answers, of the test those that the models were judged by: a build since may have made others
PARTS = "CREATE VIEW {0} AS FROM {0}_now WHERE split = 'live' UNION ALL BY NAME FROM {0}_judged WHERE split <> 'live'"
NOW = "event_date = $night AS now"
BEFORE = "event_date BETWEEN $first AND $night"
# subject -> (tables, query that gives `now` (true: of the night), `bin`, `n`)
INPUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "kinds of events": (("events",), f"SELECT {NOW}, kind AS bin, count(*) AS n FROM events WHERE {BEFORE} GROUP BY ALL"),
    "hours of events": (
        ("events",),
        f"SELECT {NOW}, hour(event_time) // 3 AS bin, count(*) AS n FROM events WHERE {BEFORE} GROUP BY ALL",
    ),
    # not how long histories are: in a young log they grow by themselves
    "choices of a user in a day": (
        ("interactions",),
        f"""SELECT now, least(choices, 10) AS bin, count(*) AS n
        FROM (SELECT {NOW}, user_id, event_date, count(*) AS choices FROM interactions WHERE {BEFORE} GROUP BY ALL) GROUP BY ALL""",
    ),
    "popularity of items chosen": (
        ("interactions", "item_stats"),
        f"""SELECT {NOW}, coalesce(log2(popularity_rank)::INT, -1) AS bin, count(*) AS n
        FROM interactions LEFT JOIN (SELECT * FROM item_stats WHERE fit = 'refit') USING (item_id) WHERE {BEFORE} GROUP BY ALL""",
    ),
    "categories of items chosen": (
        ("interactions", "items"),
        f"""SELECT {NOW}, coalesce(categories[1], '') AS bin, count(*) AS n
        FROM interactions JOIN items USING (item_id) WHERE {BEFORE} GROUP BY ALL""",
    ),
    "residuals of new items": (
        ("semantic_ids", "items"),
        """SELECT coalesce(first_seen BETWEEN $first AND $night, false) AS now, (residual * 20)::INT AS bin, count(*) AS n
        FROM semantic_ids JOIN items USING (item_id) WHERE tokenizer = $tokenizer AND coalesce(first_seen <= $night, true) GROUP BY ALL""",
    ),
    "incoming place of the first choice": (
        ("rerank_scores", "candidates"),
        """SELECT r.night = $night::VARCHAR AS now, r.mode || list_position(c.candidate_ids, r.new_order[1])::VARCHAR AS bin, count(*) AS n
        FROM rerank_scores r JOIN candidates c USING (request_id)
        WHERE r.new_order IS NOT NULL AND r.replica = 0 AND list_contains($live, r.model_id || '/' || r.mode)
            AND (r.night = $night::VARCHAR OR r.split = 'test') GROUP BY ALL""",
    ),
    "answers that failed": (
        ("rerank_scores",),
        """SELECT night = $night::VARCHAR AS now, status = 'ok' AS bin, count(*) AS n FROM rerank_scores
        WHERE replica = 0 AND list_contains($live, model_id || '/' || mode) AND (night = $night::VARCHAR OR split = 'test') GROUP BY ALL""",
    ),
}  # fmt: skip


def stability(before: Mapping[object, float], now: Mapping[object, float]) -> tuple[float, float]:
    """Population stability index of two histograms (bin -> count), and its expectation if both came from one population.

    Raises ValueError for an empty side.
    """
    n_before, n_now = sum(before.values()), sum(now.values())
    if not n_before or not n_now:
        raise ValueError("no rows on one side: nothing to compare")
    bins = before.keys() | now.keys()
    index = 0.0
    for b in bins:
        was, became = max(before.get(b, 0) / n_before, FLOOR), max(now.get(b, 0) / n_now, FLOOR)
        index += (became - was) * math.log(became / was)
    return index, (len(bins) - 1) * (1 / n_before + 1 / n_now)


def audit(ctx: Context, night: dt.date, days: int, limit: float, tokenizer: str, live: list[str]) -> list[Finding]:
    """A finding for each subject whose tables exist: the index less what chance gives, at most `limit`.

    `days`: of the reference, before the night; `live`: model_id/mode of the night's answers, which are held against the test lists.
    """
    import duckdb

    known = {"night": night, "first": night - dt.timedelta(days=days), "tokenizer": tokenizer, "live": live}
    found = []
    versions = judged(ctx.promoted)
    with duckdb.connect() as connection:
        for table in sorted({t for tables, _ in INPUTS.values() for t in tables if ctx.lake.exists(t)}):
            if table not in versions:
                connection.register(table, ctx.lake.dataset(table))
                continue
            connection.register(f"{table}_now", ctx.lake.dataset(table))
            connection.register(f"{table}_judged", Lake(ctx.place, versions).dataset(table))
            connection.execute(PARTS.format(table))
        for subject, (tables, query) in INPUTS.items():
            if not all(ctx.lake.exists(t) for t in tables):
                continue
            rows = connection.execute(query, {k: v for k, v in known.items() if f"${k}" in query}).fetchall()
            before, now = ({b: n for side, b, n in rows if side is wanted} for wanted in (False, True))
            found.append(_judged(subject, before, now, limit))
    return found


def _judged(subject: str, before: Mapping[object, float], now: Mapping[object, float], limit: float) -> Finding:
    counts = f"{sum(now.values())} rows now, {sum(before.values())} before"
    if min(sum(now.values()), sum(before.values())) < FEWEST:
        return finding("drift", subject, None, detail=f"too few to tell: {counts}")
    index, chance = stability(before, now)
    detail = f"stability index {index:.3f} less {chance:.3f} by chance; {counts}"
    return finding("drift", subject, index - chance, high=limit, detail=detail)
