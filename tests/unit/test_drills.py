"""Drills are requests like any other: they parse, cite what is shown, and say nothing about taste."""

from collections import Counter

import pytest

from gr2.answers import parse
from gr2.drills import drill
from gr2.prompts import COMPARED, evidence_of, evidence_words, format_answer, format_thought, load_template, render
from gr2.sections import FEWEST_DRILLED as FEWEST

ITEMS = [(f"<a_{i // 9}><b_{i % 9}>", f"item {i}") for i in range(60)]
LINES, LISTS = load_template("rerank_v1"), load_template("rerank_v3")
TEMPLATE = LINES


@pytest.mark.parametrize("template", [LINES, LISTS], ids=["lines", "lists"])
def test_answers_follow_the_thought_and_name_every_label_once(template):
    for seed in range(200):
        view, thought, order = drill(ITEMS, template, str(seed), history=4, most=8, ordered=1 + seed % COMPARED)
        parsed = parse(format_thought(thought) + format_answer(order), view.labels, "think")
        assert parsed.order == order
        cited = [word[1] for word in thought.split() if word.startswith("@")]
        assert cited == list(order[:COMPARED]), "the thought compares the first of its order"
        assert FEWEST <= len(view.candidates) <= 8
        assert len(view.history) <= 4


def test_who_leads_in_what_the_thought_needs_stands_first_and_the_others_stay():
    one = LISTS.model_copy(update={"evidence": {"like": LISTS.evidence["like"], "next": LISTS.evidence["next"]}})
    for seed in range(100):
        view, _, order = drill(ITEMS, one, str(seed))
        said = dict(zip(view.labels, evidence_of(view, one), strict=True))
        led = {label for label in view.labels if {"like_best", "next_best"} & said[label].keys()}
        assert order[0] in led or not any(said.values()), "who leads in what is needed stands first"
        assert list(order[1:]) == [label for label in view.labels if label != order[0]], "the others keep the incoming order"


def test_so_many_as_are_ordered_stand_first_by_what_is_needed():
    one = LISTS.model_copy(update={"evidence": {"next": LISTS.evidence["next"]}})
    told = 0
    for seed in range(100):
        view, _, order = drill(ITEMS, one, str(seed), ordered=2)
        values = [candidate.features.get("pair_next", 0.0) for candidate in view.candidates]
        best = sorted(range(len(values)), key=lambda place: -values[place])  # type: ignore[operator]
        if values[best[1]]:
            assert [view.labels.index(label) for label in order[:2]] == best[:2], "as the list in the prompt has them"
            rest = [label for label in view.labels if label not in order[:2]]
            assert list(order[2:]) == rest, "the others keep the incoming order"
            told += 1
    assert told > 50


def test_a_thought_claims_only_what_its_lines_show():
    for seed in range(50):
        view, thought, _ = drill(ITEMS, TEMPLATE, str(seed))
        true = set(evidence_words(view, TEMPLATE))
        for claim in thought.partition("compare ")[2].rstrip(".").split(", "):
            label, *words = claim.split()
            assert {f"{label[1:]}:{word}" for word in words} <= true
        assert thought.partition("compare ")[2], "a drill compares"


def test_equal_seeds_give_equal_drills_and_all_places_lead_alike():
    assert drill(ITEMS, LISTS, "5") == drill(ITEMS, LISTS, "5")
    assert render(drill(ITEMS, LISTS, "5")[0], LISTS, "think") != render(drill(ITEMS, LISTS, "6")[0], LISTS, "think")
    bare = LISTS.model_copy(update={"evidence": {"next": LISTS.evidence["next"]}})
    first: Counter[int] = Counter()
    for seed in range(3000):
        view, _, order = drill(ITEMS, bare, str(seed), history=0, most=FEWEST)
        if any(evidence_of(view, bare)):
            first[view.labels.index(order[0])] += 1
    total = sum(first.values())
    assert all(abs(count / total - 1 / FEWEST) < 0.06 for count in first.values()), "what is drawn favours no place"


def test_every_word_of_the_template_is_drilled():
    said: set[str] = set()
    for seed in range(400):
        said |= set(evidence_words(drill(ITEMS, TEMPLATE, str(seed), most=10)[0], TEMPLATE))
    places = {word for word in TEMPLATE.vocabulary if word.startswith("prior")}
    assert TEMPLATE.vocabulary - said - places == set(), "words of level and trend come, and so do the best marks"


def test_a_catalogue_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="larger than population"):
        drill(ITEMS[:2], TEMPLATE, "1")
