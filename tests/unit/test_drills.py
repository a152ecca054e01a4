"""Drills are requests like any other: they parse, cite what is shown, and say nothing about taste."""

from collections import Counter

import pytest

from gr2.answers import parse
from gr2.drills import CITED, FEWEST, drill
from gr2.prompts import evidence_words, format_answer, format_thought, load_template, render

ITEMS = [(f"<a_{i // 9}><b_{i % 9}>", f"item {i}") for i in range(60)]
TEMPLATE = load_template()


def test_answers_follow_the_thought_and_name_every_label_once():
    for seed in range(200):
        view, thought, order = drill(ITEMS, TEMPLATE, seed, history=4, most=8)
        parsed = parse(format_thought(thought) + format_answer(order), view.labels, "think")
        assert parsed.order == order
        cited = [word[1] for word in thought.split() if word.startswith("@")]
        assert cited == list(order[:CITED])
        rest = [label for label in view.labels if label not in cited]
        assert list(order[CITED:]) == rest, "labels that are not cited keep the incoming order"
        assert FEWEST <= len(view.candidates) <= 8
        assert len(view.history) <= 4


def test_a_thought_claims_only_what_its_lines_show():
    for seed in range(50):
        view, thought, _ = drill(ITEMS, TEMPLATE, seed)
        true = set(evidence_words(view, TEMPLATE))
        for claim in thought.partition("compare ")[2].rstrip(".").split(", "):
            label, *words = claim.split()
            assert {f"{label[1:]}:{word}" for word in words} <= true
        assert thought.partition("compare ")[2], "a drill compares"


def test_equal_seeds_give_equal_drills_and_chance_cites_all_places_alike():
    assert drill(ITEMS, TEMPLATE, 5) == drill(ITEMS, TEMPLATE, 5)
    assert render(drill(ITEMS, TEMPLATE, 5)[0], TEMPLATE, "think") != render(drill(ITEMS, TEMPLATE, 6)[0], TEMPLATE, "think")
    first: Counter[int] = Counter()
    for seed in range(1500):
        view, _, order = drill(ITEMS, TEMPLATE, seed, history=0, most=FEWEST)
        first[view.labels.index(order[0])] += 1
    assert all(abs(count / 1500 - 1 / FEWEST) < 0.05 for count in first.values())


def test_every_word_of_the_template_is_drilled():
    said: set[str] = set()
    for seed in range(400):
        said |= set(evidence_words(drill(ITEMS, TEMPLATE, seed, most=10)[0], TEMPLATE))
    places = {word for word in TEMPLATE.vocabulary if word.startswith("prior")}
    assert TEMPLATE.vocabulary - said - places == set(), "words of level and trend come, and so do the best marks"


def test_a_catalogue_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="larger than population"):
        drill(ITEMS[:2], TEMPLATE, 1)
