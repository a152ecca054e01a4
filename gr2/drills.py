"""Drills: made-up lists in the re-ranker's own form, which teach a model from scratch to read a list and to keep its word.

    view, thought, order = drill(items, load_template("rerank_v1"), seed=7, history=6)

A drawn slate with drawn evidence, a thought that cites three of its lines, and an answer that follows the thought. There is nothing to know
about anybody's taste: which lines are cited is chance, so a drill teaches no order, only that words after a label are those of its line and
that the answer names the cited labels first and every label once. Models with a base can do this already; a small one never learns it from
the few accepted traces alone (docs/log.md).
"""

import random
from collections.abc import Sequence

from gr2.prompts import Candidate, HistoryItem, Template, Value, View, compose_thought, make_view

CITED = 3
FEWEST = 3  # candidates
SILENT = 0.7  # share of evidence that a line does not have


def drill(
    items: Sequence[tuple[str, str]], template: Template, seed: int, *, history: int = 6, most: int = 10
) -> tuple[View, str, tuple[str, ...]]:
    """`(view, thought, labels in order)` of one made-up request over `(semantic ID, text)` of a catalogue.

    `history`, `most`: the most items of a history and candidates of a list. Equal seeds give equal drills. Raises ValueError for a
    catalogue that is smaller than one request.
    """
    draw = random.Random(seed)
    count, past = draw.randint(FEWEST, most), draw.randint(0, history)
    chosen = draw.sample(items, count + past)
    ages = sorted((draw.randint(0, 400) for _ in range(past)), reverse=True)
    seen = [HistoryItem(sid, text, days) for (sid, text), days in zip(chosen[count:], ages, strict=True)]
    slate = [Candidate(str(place), sid, text, _evidence(template, draw)) for place, (sid, text) in enumerate(chosen[:count])]
    view = make_view(f"drill:{seed}", seen, slate, replica=0)
    first = draw.sample(view.labels, CITED)
    order = (*first, *(label for label in view.labels if label not in first))
    names = draw.sample(sorted(template.evidence), len(template.evidence))
    return view, compose_thought(view, order, names[:2], names[2:5], template, CITED), order


def _evidence(template: Template, draw: random.Random) -> dict[str, Value]:
    """A value for some of the columns that the template says in words, each at one of its thresholds."""
    values: dict[str, Value] = {}
    for feature in template.evidence.values():
        if draw.random() >= SILENT:
            values[feature.column] = draw.choice(feature.at) + 1e-6
    trend, recent = values.pop("trend", None), values.get("recent")
    if isinstance(trend, float) and isinstance(recent, float):
        values["popularity"] = recent - trend  # the template derives the trend from both
    return values
