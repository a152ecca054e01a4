"""No future: on every run, what was fitted is recounted from the splits it may see, and what is read is dated (DESIGN contract 7).

Each check is one constant query over the Delta tables (DuckDB, no JVM) that counts violations; zero passes. Rules:
    fit `train` may see split pretrain; fit `refit` may see pretrain and rerank; histories lie before their target;
    what a re-ranker trains on comes from split rerank (RL may read valid to pick a checkpoint), never from test.
That under leave-one-out another user's training item may be later than a target is inherent in that protocol, and not counted.
"""

from typing import Any

from gr2 import artifacts
from gr2.context import Context
from schemas.lake import Lake
from validation.findings import Finding, finding

FITTED = """
    WITH allowed(fit, split) AS (VALUES ('train', 'pretrain'), ('refit', 'pretrain'), ('refit', 'rerank')),
    fitted AS (SELECT a.fit, i.user_id, i.ordinal, i.item_id, i.event_date FROM interactions i JOIN allowed a USING (split))
"""
# name -> (tables it reads, query that counts violations, what a violation is)
CHECKS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "splits_in_order": (
        ("interactions",),
        """
        WITH part AS (
            SELECT user_id, list_position(['pretrain', 'rerank', 'valid', 'test'], split) AS place,
                min(ordinal) AS low, max(ordinal) AS high
            FROM interactions GROUP BY ALL)
        SELECT count(*) FROM part a JOIN part b ON a.user_id = b.user_id AND a.place < b.place WHERE a.high > b.low
        """,
        "a user's later split begins before an earlier one ends",
    ),
    "item_stats_recount": (
        ("interactions", "item_stats"),
        FITTED
        + """
        , counted AS (SELECT fit, item_id, count(*) AS n, max(event_date) AS last FROM fitted GROUP BY ALL)
        SELECT count(*) FROM item_stats s FULL JOIN (SELECT * FROM counted WHERE fit IN (SELECT fit FROM item_stats)) c
            ON s.fit = c.fit AND s.item_id = c.item_id
        WHERE coalesce(s.count, 0) <> coalesce(c.n, 0) OR s.last_date > c.last
        """,
        "an item's count or last day is not that of the interactions its fit may see",
    ),
    "reference_date": (
        ("interactions", "item_stats"),
        FITTED
        + """
        , ends AS (SELECT fit, max(event_date) AS last FROM fitted GROUP BY fit)
        SELECT count(*) FROM item_stats JOIN ends USING (fit) WHERE reference_date > last
        """,
        "decay is anchored after the last interaction that the fit may see",
    ),
    "item_pairs_recount": (
        ("interactions", "item_pairs"),
        FITTED
        + """
        , counted AS (
            SELECT a.fit, a.item_id, b.item_id AS next_item_id, count(*) AS n, count(*) FILTER (b.ordinal = a.ordinal + 1) AS direct
            FROM fitted a JOIN fitted b ON a.fit = b.fit AND a.user_id = b.user_id
            WHERE b.ordinal BETWEEN a.ordinal + 1 AND a.ordinal + $window GROUP BY ALL)
        SELECT count(*) FROM item_pairs p LEFT JOIN counted c USING (fit, item_id, next_item_id)
        WHERE p.count > coalesce(c.n, 0) OR p.next_count > coalesce(c.direct, 0)
        """,
        "a pair counts more than the interactions that its fit may see",
    ),
    "midtrain_histories": (
        ("interactions", "midtrain_examples", "semantic_ids"),
        FITTED
        + """
        , said AS (
            SELECT fit, regexp_extract(example_id, '^history:(.*):[0-9]+$', 1) AS user_id,
                unnest(regexp_extract_all(prompt || completion, '<a_[0-9]+>(?:<[b-j]_[0-9]+>)*')) AS sid
            FROM midtrain_examples WHERE task = 'history'),
        named AS (SELECT s.fit, s.user_id, i.item_id FROM said s JOIN semantic_ids i ON i.token_text = s.sid AND i.tokenizer = $tokenizer)
        SELECT count(*) FROM named ANTI JOIN fitted USING (fit, user_id, item_id)
        """,
        "a mid-training history names an item that the user did not choose within its fit",
    ),
    "request_fit": (
        ("candidates",),
        "SELECT count(*) FROM candidates WHERE (fit = 'refit' AND split <> 'test') OR (fit = 'live') <> (split = 'live')",
        "a request to train or pick on was answered by a fit that saw its target's split",
    ),
    "history_before_target": (
        ("candidates", "interactions"),
        """
        WITH target AS (
            SELECT c.request_id, c.user_id, c.history_ids, max(i.ordinal) AS ordinal
            FROM candidates c LEFT JOIN interactions i ON i.user_id = c.user_id AND i.item_id = c.target_id AND i.split = c.split
            WHERE c.source = 'beam' AND c.split <> 'live' GROUP BY ALL),
        shown AS (SELECT request_id, user_id, ordinal, unnest(history_ids) AS item_id FROM target)
        SELECT (SELECT count(*) FROM target WHERE ordinal IS NULL) + (
            SELECT count(*) FROM shown s
                ANTI JOIN interactions i ON i.user_id = s.user_id AND i.item_id = s.item_id AND i.ordinal < s.ordinal
        )
        """,
        "a history item does not lie before the target",
    ),
    "history_before_night": (
        ("candidates", "interactions"),
        """
        WITH shown AS (SELECT user_id, as_of, unnest(history_ids) AS item_id FROM candidates WHERE split = 'live'),
        first AS (SELECT user_id, item_id, min(event_date) AS day FROM interactions GROUP BY ALL)
        SELECT count(*) FROM shown s LEFT JOIN first f USING (user_id, item_id) WHERE f.day IS NULL OR f.day >= s.as_of
        """,
        "a night's list was made from something that the user did later",
    ),
    "features_of_the_fit": (
        ("candidates", "candidate_features", "item_stats"),
        """
        SELECT count(*) FROM candidate_features f JOIN candidates c USING (request_id)
            LEFT JOIN item_stats s ON s.fit = c.fit AND s.item_id = f.item_id
        WHERE c.split <> 'live' AND abs(f.popularity - ln(1 + coalesce(s.count, 0))) > 1e-6
        """,
        "a candidate's popularity is not that of its request's fit",
    ),
    "sft_requests": (
        ("sft_examples", "candidates"),
        """
        SELECT count(*) FROM sft_examples s LEFT JOIN candidates c USING (request_id)
        WHERE s.source <> 'drill' AND c.split IS DISTINCT FROM 'rerank'
        """,
        "SFT read a request outside split rerank",
    ),
    "rl_requests": (
        ("rl_prompts", "candidates"),
        """
        SELECT count(*) FROM rl_prompts p LEFT JOIN candidates c USING (request_id)
        WHERE c.split IS DISTINCT FROM p.split OR p.split NOT IN ('rerank', 'valid')
        """,
        "RL read a request outside splits rerank (training) and valid (picking)",
    ),
    "distill_requests": (
        ("distill_examples", "candidates"),
        """
        SELECT count(*) FROM distill_examples LEFT JOIN candidates c USING (request_id)
        WHERE coalesce(c.split, '') NOT IN ('rerank', 'valid')
        """,
        "distillation, which needs no label, read a request outside splits rerank and valid",
    ),
}
OF_NIGHTS = ("history_before_night",)
TIME_ONLY: dict[str, tuple[tuple[str, ...], str, str]] = {
    "windows_in_order": (
        ("interactions",),
        """
        WITH part AS (
            SELECT list_position(['pretrain', 'rerank', 'valid', 'test'], split) AS place, min(event_date) AS low, max(event_date) AS high
            FROM interactions GROUP BY ALL)
        SELECT count(*) FROM part a JOIN part b ON a.place < b.place WHERE a.high >= b.low
        """,
        "a later window begins before an earlier one ends",
    )
}


def audit(ctx: Context) -> list[Finding]:
    """Runs every check whose tables exist. Each finding's value is the number of violations; more than none fails.

    A build's tables are held against each other as its draft pins them, for nights since move windows and places; a night's lists are
    held against all that has arrived.
    """
    checks = {**CHECKS, **(TIME_ONLY if ctx.cfg.data.protocol == "time" else {})}
    nightly = {name: check for name, check in checks.items() if name in OF_NIGHTS}
    built = {name: check for name, check in checks.items() if name not in OF_NIGHTS}
    return [*_counted(ctx, Lake(ctx.place, ctx.pins.get("tables")), built), *_counted(ctx, Lake(ctx.place), nightly)]


def _counted(ctx: Context, lake: Lake, checks: dict[str, tuple[tuple[str, ...], str, str]]) -> list[Finding]:
    """The findings of some checks on a lake's versions."""
    import duckdb

    tokenizer = artifacts.resolve(ctx.root, "tokenizer").id if "tokenizer" in artifacts.names(ctx.root) else ""
    known: dict[str, Any] = {"window": ctx.cfg.evidence.window, "tokenizer": tokenizer}
    found = []
    with duckdb.connect() as connection:
        tables = sorted({t for needed, _, _ in checks.values() for t in needed})
        there = {t for t in tables if lake.exists(t)}
        for table in sorted(there):
            connection.register(table, lake.dataset(table))
        for name, (needed, query, meaning) in checks.items():
            if not there.issuperset(needed):
                ctx.log(f"leakage check {name} left out: there is no table {', '.join(sorted(set(needed) - there))}")
                continue
            parameters = {name: value for name, value in known.items() if f"${name}" in query}
            row = connection.execute(query, parameters).fetchone()
            count = float(row[0] or 0) if row else 0.0
            found.append(finding("leakage", name, count, high=0.0, detail=f"violations: {meaning}"))
    return found
