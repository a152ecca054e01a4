"""Position audit: does an order depend on where candidates were shown, or on how they were named? (DESIGN contract 11)

Slots and labels of a replica are seeded shuffles that know nothing of the candidates. So a policy that reads only the candidates gives
replicas the same order (tau near 1), and its first choices fall uniformly on slots and on labels: that is the exact null of the test.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from gr2.metrics import kendall_tau
from validation.findings import Finding, finding, mean

Row = Mapping[str, Any]  # a row of rerank_scores


def audit(rows: Iterable[Row], incoming: Mapping[str, Sequence[str]], min_tau: float = -1.0, max_copy_rate: float = 1.0) -> list[Finding]:
    """Findings for each model and mode of `rerank_scores` rows. `incoming`: request -> candidate ids in incoming order."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[f"{row['model']}/{row['mode']}"].append(row)
    found = []
    for name, members in sorted(groups.items()):
        answered = [r for r in members if r["new_order"] is not None]
        found += [*_agreement(name, answered, min_tau), *_copies(name, answered, incoming, max_copy_rate), *_lift(name, answered, incoming)]
    return found


def _agreement(name: str, answered: list[Row], min_tau: float) -> list[Finding]:
    """Kendall's tau and agreement on the first place, over pairs of replicas of one request."""
    replicas: dict[str, list[Row]] = defaultdict(list)
    for row in answered:
        replicas[row["request_id"]].append(row)
    pairs = [pair for members in replicas.values() for pair in combinations(members, 2)]
    bound = min_tau if min_tau > -1 else None
    tau = mean([kendall_tau(a["new_order"], b["new_order"]) for a, b in pairs])
    first = mean([a["new_order"][0] == b["new_order"][0] for a, b in pairs])
    detail = f"{len(pairs)} pairs of replicas of {sum(len(m) > 1 for m in replicas.values())} requests"
    return [
        finding("position", f"{name}/tau", tau, low=bound, detail=f"Kendall's tau between replicas; {detail}"),
        finding("position", f"{name}/top1_agreement", first, detail=f"same first choice; {detail}"),
    ]


def _copies(name: str, answered: list[Row], incoming: Mapping[str, Sequence[str]], most: float) -> list[Finding]:
    """How often an answer is the order shown, or the incoming order, item by item."""
    figures = [r for r in answered if r["replica"] == 0]
    shown = [r["new_order"] == [incoming[r["request_id"]][p] for p in r["shown"]] for r in figures]
    came = [list(r["new_order"]) == list(incoming[r["request_id"]]) for r in figures]
    high = most if most < 1 else None
    return [
        finding("position", f"{name}/copies_shown", mean(shown), high=high, detail=f"answers that repeat the order shown, of {len(shown)}"),
        finding(
            "position", f"{name}/copies_incoming", mean(came), high=high, detail=f"answers that repeat the incoming order, of {len(came)}"
        ),
    ]


def _lift(name: str, answered: list[Row], incoming: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Share of first choices by slot and by label, over what chance would give: the largest lift, and the chance of so uneven a spread."""
    found = []
    for what in ("slot", "label"):
        size = max((len(r["shown"]) for r in answered), default=0)
        full = [r for r in answered if len(r["shown"]) == size]
        places = [list(incoming[r["request_id"]]).index(r["new_order"][0]) for r in full]
        spots = [
            list(r["shown"]).index(p) if what == "slot" else sorted(set(r["labels"])).index(r["labels"][p])
            for r, p in zip(full, places, strict=True)
        ]
        counts = np.bincount(spots, minlength=size) if full else np.zeros(0)
        lifts = counts * size / max(1, len(full))
        value = float(lifts.max()) if len(lifts) else None
        text = " ".join(f"{x:.2f}" for x in lifts)
        detail = f"first choices by {what}, over chance: {text}; p = {_uniform_p(counts):.2g} under no effect, {len(full)} answers"
        found.append(finding("position", f"{name}/{what}_lift", value, detail=detail))
    return found


def _uniform_p(counts: np.ndarray) -> float:
    """Chi-square test of uniformity; 1 where there is nothing to test."""
    from scipy.stats import chisquare

    return float(chisquare(counts).pvalue) if counts.sum() and len(counts) > 1 else 1.0
