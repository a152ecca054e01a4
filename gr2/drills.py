"""Drills: made-up lists in the re-ranker's own form, which teach a model from scratch to read a list and to keep its word.

    view, thought, order = drill(items, load_template("rerank_v3"), "13:7", history=6)

A drawn slate with drawn evidence, a thought that says which evidence it goes by, and an answer that puts the best by it first (one, or
`ordered` of them); the others keep the incoming order. There is nothing to know about anybody's taste: which evidence counts is drawn
too, so a drill teaches no preference, only that a need which was named is followed, that words after a label are true of it, and that the
answer names every label once. Models with a base can do this already; a small one does not learn it from the few accepted traces alone
(docs/log.md).
"""

import random
from collections.abc import Sequence

from gr2.prompts import (
    SMALL_IS_GOOD,
    Candidate,
    Feature,
    HistoryItem,
    Template,
    Value,
    View,
    best_first,
    compose_thought,
    evidence_of,
    led_by,
    make_view,
)
from gr2.sections import FEWEST_DRILLED

NEEDS = 2  # features that a drill goes by
SILENT = 0.7  # share of evidence that a line does not have


def drill(
    items: Sequence[tuple[str, str]], template: Template, name: str, *, history: int = 6, most: int = 10, ordered: int = 1
) -> tuple[View, str, tuple[str, ...]]:
    """`(view, thought, labels in order)` of one made-up request over `(semantic ID, text)` of a catalogue.

    `history`, `most`: the most items of a history and candidates of a list; `ordered`: how many are put in order. The name is the seed of
    all draws. Raises ValueError for a catalogue that is smaller than one request.
    """
    draw = random.Random(name)
    count, past = draw.randint(FEWEST_DRILLED, most), draw.randint(0, history)
    chosen = draw.sample(items, count + past)
    ages = sorted((draw.randint(0, 400) for _ in range(past)), reverse=True)
    seen = [HistoryItem(sid, text, days) for (sid, text), days in zip(chosen[count:], ages, strict=True)]
    slate = [Candidate(str(place), sid, text, _evidence(template, draw)) for place, (sid, text) in enumerate(chosen[:count])]
    view = make_view(f"drill:{name}", seen, slate, replica=0)
    said = evidence_of(view, template)
    names = [name for name in draw.sample(sorted(template.evidence), len(template.evidence)) if any(name in words for words in said)]
    need, pattern = names[:NEEDS], names[NEEDS : NEEDS + 2]
    levels = [_levels(template.evidence[name], name, view, said) for name in need]
    best = sorted(range(count), key=lambda place: [*(-levels_N[place] for levels_N in levels), place])
    order = led_by(view, best[:ordered])
    return view, compose_thought(view, order, pattern, need, template), order


def _levels(feature: Feature, name: str, view: View, said: Sequence[dict[str, str]]) -> list[float]:
    """How good each candidate is in one feature, as the prompt says it (0: not at all). Of places and gaps, small ones are good."""
    if feature.listed:
        named = best_first(feature, view)
        return [float(len(named) - named.index(place)) if place in named else 0.0 for place in range(len(said))]
    sign = -1.0 if feature.column in SMALL_IS_GOOD else 1.0
    return [sign * (feature.words.index(w[name]) + 1 + 0.5 * (f"{name}_best" in w)) if name in w else 0.0 for w in said]


def _evidence(template: Template, draw: random.Random) -> dict[str, Value]:
    """A value for some of the columns that the template shows: at one of its thresholds, or beyond where only the order counts."""
    values: dict[str, Value] = {}
    for feature in template.evidence.values():
        if draw.random() >= SILENT:
            values[feature.column] = draw.choice(feature.at) + (draw.random() if feature.listed else 1e-6)
    trend, recent = values.pop("trend", None), values.get("recent")
    if isinstance(trend, float) and isinstance(recent, float):
        values["popularity"] = recent - trend  # the template derives the trend from both
    return values
