"""The rewards: METHOD 8's figures, the laws of DESIGN contract 10, and the zoo of hacks."""

import dataclasses
import math
from itertools import permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from zoo import BEASTS, BLIND, EVIDENCE, GOOD, GRADES, INCOMING, KINDS, PAGE, SHOWN, Beast, blind_mean, page, say

from gr2 import rewards
from gr2.answers import FAILURES, Parsed, parse
from gr2.config import RL
from gr2.prompts import LABELS
from gr2.rewards import Kind, Reward, reward

pytestmark = pytest.mark.unit
kinds = st.sampled_from(KINDS)
WITH, WITHOUT = RL(), RL(conditional=False)


@dataclasses.dataclass(frozen=True)
class Case:
    """A request and an answer to it."""

    kind: Kind
    incoming: tuple[str, ...]
    shown: tuple[str, ...]
    grades: tuple[int, ...]
    order: tuple[str, ...]
    thought: str

    def earns(self, settings: RL = WITH, **changes: object) -> Reward:
        c = dataclasses.replace(self, **changes)  # type: ignore[arg-type]
        evidence = {*c.incoming, "nextBest", "priorOne", *(f"{label}:nextBest" for label in c.incoming)}
        return reward(c.kind, c.incoming, c.shown, c.grades, Parsed("ok", c.order, c.thought), evidence, settings)


@st.composite
def cases(draw: st.DrawFn, graded: bool = True, copies: bool = True) -> Case:
    count = draw(st.integers(2 if copies else 4, 10))
    labels = LABELS[:count]
    incoming, shown, order = (tuple(draw(st.permutations(labels))) for _ in range(3))
    if copies and draw(st.booleans()):
        order = draw(st.sampled_from([incoming, shown]))
    target = draw(st.integers(0, count - 1))
    single = tuple(int(place == target) for place in range(count))
    grades = tuple(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))) if graded and draw(st.booleans()) else single
    thought = draw(
        st.sampled_from(["", "need.", f"need nextBest. compare @{order[0]} nextBest.", "compare @Z brandOne.", "@A nextBest " * 50])
    )
    return Case(draw(kinds), incoming, shown, grades, order, thought)


# -- METHOD 8, by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "before", "after", "expected"),
    [
        ("gr2", [0, 0, 1, 0, 0], [1, 0, 0, 0, 0], 2 / 5),
        ("gr2", [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], -4 / 5),
        ("gr2", [0, 1, 2], [2, 0, 1], 2 / 3),
        ("gr2", [0, 1, 1, 0], [1, 0, 1, 0], 0.5 / 4),  # two targets: the mean rank
        ("normalised", [0, 0, 1], [1, 0, 0], 1.0),
        ("normalised", [0, 0, 1], [0, 1, 0], (1 / math.log2(3) - 0.5) / 0.5),
        ("normalised", [0, 1, 0], [0, 0, 1], (0.5 - 1 / math.log2(3)) / (1 - 1 / math.log2(3))),
        ("normalised", [1, 0, 0], [1, 0, 0], 0.0),
        ("normalised", [1, 0, 0], [0, 1, 0], 1 / math.log2(3) - 1),
        ("normalised", [0, 1] + [0] * 18, [0] * 19 + [1], -1.0),  # clipped
        ("auc", [0, 0, 1], [0, 1, 0], 0.5),
        ("auc", [0, 1, 2], [2, 1, 0], 1.0),
        ("auc", [0, 1, 2], [2, 0, 1], 5 / 6),  # pairs weigh 3, 2, 1; only (0, 1) stands wrong
        ("ndcg", [0, 0, 1], [1, 0, 0], 0.5),
        ("ndcg", [1, 2], [2, 1], 1 - (1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3))),
    ],
)
def test_rank_reward(kind: Kind, before: list[int], after: list[int], expected: float) -> None:
    assert rewards.rank_reward(kind, before, after) == pytest.approx(expected, abs=1e-12)


def test_conditional_rule_case_by_case() -> None:
    """Each line of METHOD 8's rule, on the zoo's request (incoming A B C D E, shown D B E A C, target C)."""

    def earns(order: str, grades: tuple[int, ...] = GRADES, config: RL = WITH, thought: str = GOOD) -> Reward:
        return reward("gr2", INCOMING, SHOWN, grades, parse(say(order, thought), INCOMING, "think"), EVIDENCE, config)

    first, shown_first = (1, 0, 0, 0, 0), (0, 0, 0, 1, 0)
    assert earns("CABDE") == Reward(0.4 + 0.2, 0.4, 1.0, False, False)  # improved: rank and form are paid
    assert earns("ABCDE") == Reward(0.0, 0.0, 0.0, True, False)  # the incoming order, not ideal: nothing
    assert earns("DBEAC") == Reward(-0.4, -0.4, 0.0, False, True)  # the order shown: its loss, no form
    assert earns("ABCED") == Reward(0.0, 0.0, 0.0, False, False)  # no improvement: no form
    assert earns("ABCDE", first) == Reward(0.2, 0.0, 1.0, True, False)  # ideal and kept: form is paid
    assert earns("AEDCB", first) == Reward(0.2, 0.0, 1.0, False, False)
    assert earns("BACDE", first).total == pytest.approx(-0.2)  # ideal and left: its loss, no form
    assert earns("DBEAC", shown_first) == Reward(0.6 + 0.2, 0.6, 1.0, False, True)  # the order shown is ideal: exempt
    assert earns("ABCDE", (0, 0, 0, 0, 0)).total == 0.0  # nothing is relevant: nothing is paid
    assert earns("ABCDE", config=WITHOUT) == Reward(0.2, 0.0, 1.0, True, False)  # the plain reward pays for a copy
    gain = reward("normalised", INCOMING, "CBADE", (0, 0, 1, 0, 1), parse(say("CBADE"), INCOMING, "think"), EVIDENCE, WITH)
    assert gain == Reward(0.0, 0.0, 0.0, False, True)  # better than incoming, but a copy of what was shown and not ideal


@pytest.mark.parametrize("status", FAILURES)
def test_every_failure_costs_the_same(status: str) -> None:
    for config in (WITH, WITHOUT):
        assert reward("gr2", INCOMING, SHOWN, GRADES, Parsed(status, None, GOOD), EVIDENCE, config) == Reward(-1.5, 0, 0, False, False)
    stale = Parsed("ok", ("A", "B"), "")
    assert reward("gr2", INCOMING, SHOWN, GRADES, stale, EVIDENCE, WITH).total == -1.5


def test_settings_of_the_profile_serve() -> None:
    assert reward("gr2", INCOMING, SHOWN, GRADES, parse(say("CABDE"), INCOMING, "think"), EVIDENCE, RL()).total == pytest.approx(0.6)
    assert reward("gr2", INCOMING, SHOWN, GRADES, parse("", INCOMING, "think"), EVIDENCE, RL(invalid=-3.0)).total == -3.0


# -- laws -------------------------------------------------------------------------------------------------------------


@given(cases(), st.booleans())
@settings(max_examples=500)
def test_bounded_and_worse_when_invalid(case: Case, conditional: bool) -> None:
    config = RL(conditional=conditional)
    earned = case.earns(config)
    assert -1.0 <= earned.rank <= 1.0
    assert 0.0 <= earned.format <= 1.0
    assert earned.total == pytest.approx(earned.rank + config.alpha * earned.format)
    assert config.invalid < earned.total <= 1.0 + config.alpha


@given(cases(), st.permutations(LABELS))
@settings(max_examples=300)
def test_invariant_to_relabelling(case: Case, names: list[str]) -> None:
    new = dict(zip(LABELS, names, strict=True))
    thought = "".join(new[c] if p == "@" and c in new else c for p, c in zip(" " + case.thought, case.thought, strict=False))
    thought = thought if "@Z" not in case.thought else case.thought
    renamed = dataclasses.replace(
        case, thought=thought, **{f: tuple(new[x] for x in getattr(case, f)) for f in ("incoming", "shown", "order")}
    )
    assert renamed.earns() == case.earns()


@given(cases(graded=False, copies=False), st.data())
@settings(max_examples=500)
def test_monotone_in_the_targets_new_rank(case: Case, data: st.DataObject) -> None:
    """Among answers that copy neither order; strictly so wherever METHOD's clip does not bind."""
    target = case.incoming[case.grades.index(1)]
    other = tuple(data.draw(st.permutations(case.incoming)))
    assume(not {case.order, other} & {case.incoming, case.shown})
    assume(case.order.index(target) != other.index(target))
    nearer, further = sorted((case.order, other), key=lambda order: order.index(target))
    mine, theirs = case.earns(order=nearer), case.earns(order=further)
    assert mine.total >= theirs.total
    if mine.rank > -1.0:
        assert mine.rank > theirs.rank


@given(cases())
@settings(max_examples=500)
def test_no_ranking_pay_for_a_copy_that_is_not_ideal(case: Case) -> None:
    for copy in (case.incoming, case.shown):
        earned = case.earns(order=copy)
        grade = dict(zip(case.incoming, case.grades, strict=True))
        ideal = rewards.is_ideal(case.kind, [grade[label] for label in copy])
        assert (earned.copied_incoming, earned.copied_shown) == (copy == case.incoming, copy == case.shown)
        assert ideal or (earned.total <= 0 and earned.format == 0)


@given(cases())
@settings(max_examples=500)
def test_form_is_paid_only_with_an_improvement_or_a_kept_ideal(case: Case) -> None:
    earned = case.earns()
    grade = dict(zip(case.incoming, case.grades, strict=True))
    before, after = list(case.grades), [grade[label] for label in case.order]
    kept = rewards.is_ideal(case.kind, before) and rewards.is_ideal(case.kind, after)
    if earned.format > 0:
        assert earned.rank > 0 or kept
    if max(case.grades) == 0:
        assert earned.total == 0


@given(cases(), st.data())
@settings(max_examples=300)
def test_ideal_is_what_no_order_beats(case: Case, data: st.DataObject) -> None:
    assume(max(case.grades) > 0)
    ideal = sorted(case.grades, reverse=True)
    other = data.draw(st.permutations(case.grades))
    assert rewards.is_ideal(case.kind, ideal)
    assert rewards.rank_reward(case.kind, case.grades, ideal) >= rewards.rank_reward(case.kind, case.grades, other)
    if case.kind != "normalised" and not rewards.is_ideal(case.kind, other):
        assert rewards.rank_reward(case.kind, case.grades, ideal) > rewards.rank_reward(case.kind, case.grades, other)


@given(cases())
@settings(max_examples=300)
def test_swapping_equals_is_no_improvement(case: Case) -> None:
    """Rounding must not look like a gain: candidates of equal grade change places, the reward is exactly zero."""
    by_grade: dict[int, list[str]] = {}
    for label, g in zip(case.incoming, case.grades, strict=True):
        by_grade.setdefault(g, []).append(label)
    swapped = tuple(by_grade[g].pop() for g in case.grades)
    assert case.earns(order=swapped).rank == 0.0


def test_scores_themselves() -> None:
    """Differences of scores would hide a constant that is wrong."""
    assert rewards.mean_top_rank([0, 2, 1]) == 2
    assert rewards.mean_top_rank([1, 0, 1]) == 2
    assert rewards.ndcg([0, 1]) == pytest.approx(1 / math.log2(3))
    assert rewards.ndcg([0, 0]) == 0.0
    assert rewards.auc([2, 0, 1]) == pytest.approx((3 + 2) / (3 + 2 + 1))
    assert rewards.auc([0, 1]) == 0.0
    assert rewards.auc([1, 1]) == 0.0


def test_an_empty_list_earns_nothing_and_unequal_lengths_are_a_bug_of_the_caller() -> None:
    assert reward("ndcg", (), (), (), Parsed("ok", (), "thought @A"), {"A"}, WITHOUT).rank == 0.0
    assert reward("gr2", (), (), (), Parsed("ok", (), ""), (), WITH).total == 0.0
    with pytest.raises(ValueError, match="zip"):
        reward("ndcg", ("A", "B"), ("A", "B"), (1,), Parsed("ok", ("A", "B"), ""), (), WITH)


# -- thoughts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thought", "expected"),
    [
        (GOOD, 1.0),
        ("compare @C nextBest.", 1.0),
        ("", 0.0),
        ("   ", 0.0),
        ("it is the best", 0.0),
        ("@C is best", 0.0),  # words were shown, none cited
        ("need nextBest.", 0.0),  # no label
        ("@C brandOne.", 1 / 3),  # label true; word and claim false
        ("@A nextBest.", 2 / 3),  # claim false
        ("@A priorOne, nextBest. @C.", 1.0),  # after the comma the word is no claim on A
        ("@Z nextBest.", 1 / 3),
        ("@c nextBest.", 1 / 3),
        ("@C nextBest " * 30, 0.0),  # beyond the budget
        ("<a_1><b_2> @C nextBest", 1.0),
    ],
)
def test_format_reward(thought: str, expected: float) -> None:
    assert rewards.format_reward(thought, EVIDENCE) == pytest.approx(expected)


def test_budget_counts_pieces_and_bare_prompts_need_no_words() -> None:
    thought = "@C nextBest" + " so" * 45
    assert rewards.format_reward(thought, EVIDENCE, budget=48) == 1.0
    assert rewards.format_reward(thought + " so", EVIDENCE, budget=48) == 0.0
    assert rewards.format_reward("@C before @A.", INCOMING) == 1.0  # evidence switched off: labels are all there is to cite
    assert rewards.format_reward("@C nextBest", INCOMING) == 0.5


@given(st.text(), st.lists(st.text()))
def test_format_reward_never_raises(thought: str, evidence: list[str]) -> None:
    assert 0.0 <= rewards.format_reward(thought, evidence) <= 1.0


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (80, 0), (90, -0.5), (100, -1), (101, -1), (500, -1)])
def test_overlong(tokens: int, expected: float) -> None:
    assert rewards.overlong(tokens, limit=100, margin=20) == pytest.approx(expected)
    assert rewards.overlong(tokens, limit=100, margin=0) == (-1.0 if tokens > 100 else 0.0)


# -- the zoo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beast", BEASTS, ids=lambda b: b.name)
def test_no_hack_beats_the_honest_answer(beast: Beast) -> None:
    honest = BEASTS[0]
    for kind in KINDS:
        assert honest.earns(kind).total >= beast.earns(kind).total
        if beast.status != "ok":
            assert beast.earns(kind).total == WITH.invalid
        if "copy" in beast.name or "copies" in beast.name or "format only" in beast.name:
            assert beast.earns(kind).total <= 0


def test_plain_reward_pays_the_copy_and_the_conditional_does_not() -> None:
    copy = next(b for b in BEASTS if b.name == "copies the incoming order")
    assert copy.earns("normalised", WITHOUT).total == pytest.approx(0.2)
    assert copy.earns("normalised", WITH).total == 0.0


def test_zoo_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `python tests/unit/zoo.py`"


@pytest.mark.parametrize("kind", ["gr2", "auc", "ndcg"])
def test_blind_rules_earn_nothing_on_average(kind: Kind) -> None:
    """METHOD 8: with the target's rank uniform, an order that does not look at it is worth at most nothing, near copies too."""
    assert all(blind_mean(rule, kind) <= 1e-9 for rule in permutations(range(5)))


def test_normalised_pays_a_blind_swap_at_the_top() -> None:
    """A weakness of the published formula, kept in sight: see docs/reward_zoo.md."""
    assert blind_mean(BLIND["copy of the incoming order"], "normalised") == 0.0
    assert blind_mean(BLIND["first two swapped"], "normalised") == pytest.approx((1 + 1 / math.log2(3) - 1) / 5)


def test_a_shorter_context_is_paid_for_what_it_saves_and_keeps_and_half_where_it_says_dots():
    assert rewards.compression_reward("a b", 0.6, 0.9, 0.25) == pytest.approx(0.25 * 0.6 + 0.75 * 0.9)
    assert rewards.compression_reward("a b", -0.6, 1.0, 0.25) == 0.75, "a longer one saves nothing"
    for text in ("a ... b", "a\u2026"):
        assert rewards.compression_reward(text, 0.5, 1.0, 0.2) == pytest.approx(0.45)
