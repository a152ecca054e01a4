"""One module a table. A table's module is its contract: grain, key, columns with comments, laws, version.

Spark types, DDL, the Great Expectations suite and the docs page are derived from it; nothing else describes a table.
"""

import importlib

from schemas.base import Column, Table

# in the order of the flow
NAMES = (
    "events", "quarantine", "items", "interactions", "histories", "impressions", "pair_days", "item_pairs", "item_stats",
    "item_embeddings", "semantic_ids", "midtrain_examples", "candidates", "candidate_features", "program_lists", "reasoning_traces",
    "sft_examples", "rl_prompts", "rollouts", "item_latents", "distill_examples", "rerank_scores", "baselines", "metrics", "audits",
    "releases", "stage_runs",
)  # fmt: skip


def get(name: str) -> Table:
    """The contract of one table. Raises KeyError for a name that no module declares."""
    if name not in NAMES:
        raise KeyError(f"no schema module declares a table {name!r}")
    return importlib.import_module(f"schemas.{name}").TABLE


def all_tables() -> list[Table]:
    """Every table, in the order of the flow."""
    return [get(name) for name in NAMES]


__all__ = ["NAMES", "Column", "Table", "all_tables", "get"]
