"""The strict parser: every failure by its name, no string that raises, no repair."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gr2.answers import FAILURES, parse
from gr2.prompts import EMPTY_THOUGHT, LABELS, format_answer, format_thought

pytestmark = pytest.mark.unit
ABC = ("A", "B", "C")
GOOD = '["C","A","B"]'

# text, mode -> status; each failure has a row here (checked below)
CASES = [
    (f"<think>pattern. need.</think>{GOOD}", "think", "ok"),
    (f" <think>\n\n</think>\n\n{GOOD}\n", "think", "ok"),
    ('<think>x</think>[ "C", "A",\n"B" ]', "think", "ok"),
    ('<think>my list: ["A","B","C"]</think>' + GOOD, "think", "ok"),
    (GOOD, "direct", "ok"),
    (EMPTY_THOUGHT + GOOD, "direct", "ok"),
    (f"<think> \n</think>{GOOD}", "score", "ok"),
    (GOOD, "think", "missing_thought"),
    ("", "think", "missing_thought"),
    ("I think: " + GOOD, "think", "missing_thought"),
    (f"x<think>y</think>{GOOD}", "think", "missing_thought"),
    (f"<think>y</think>{GOOD}", "direct", "unexpected_thought"),
    (f"<think>y</think>{GOOD}", "score", "unexpected_thought"),
    (f"<think>a<think>b</think>c</think>{GOOD}", "think", "nested_thought"),
    (f"<think>a<think>b</think>{GOOD}", "think", "nested_thought"),
    (f"<think>a</think><think>b</think>{GOOD}", "think", "nested_thought"),
    (f"<think>a</think></think>{GOOD}", "think", "nested_thought"),
    (f"<think>a</think>{GOOD}</think>", "think", "nested_thought"),
    ("<think>a", "think", "unfinished"),
    (f"<think>a{GOOD}", "think", "unfinished"),
    ('<think>a</think>["C","A","B"', "think", "unfinished"),
    ('<think>a</think>["C","A', "think", "unfinished"),
    (f"<think>so: {GOOD}</think>", "think", "answer_in_thought"),
    ('<think>so: ["C"] or [ "A" ]</think> ', "think", "answer_in_thought"),
    ("<think>so [maybe] [1] [</think>", "think", "missing_answer"),
    (EMPTY_THOUGHT, "direct", "missing_answer"),
    ("", "direct", "missing_answer"),
    (f"<think>a</think>Answer: {GOOD}", "think", "text_before_answer"),
    ("<think>a</think>C, A, B", "think", "text_before_answer"),
    ('<think>a</think>{"C":1}', "think", "text_before_answer"),
    (f"```json\n{GOOD}\n```", "direct", "text_before_answer"),
    ("[C, A, B]", "direct", "not_json"),
    ("['C', 'A', 'B']", "direct", "not_json"),
    ('["C","A","B",]', "direct", "not_json"),
    ("[1,2,3]", "direct", "not_json"),
    ('[["C"],"A","B"]', "direct", "not_json"),
    ('["C","A",null]', "direct", "not_json"),
    (f"{GOOD} because", "direct", "text_after_answer"),
    (f"{GOOD}{GOOD}", "direct", "text_after_answer"),
    (f"{GOOD}]", "direct", "text_after_answer"),
    (f"{GOOD}<eos>", "direct", "text_after_answer"),
    ('["C","A","D"]', "direct", "unknown_label"),
    ('["c","a","b"]', "direct", "unknown_label"),
    ('["C ","A","B"]', "direct", "unknown_label"),
    ('["CAB"]', "direct", "unknown_label"),
    ('["C","A","A"]', "direct", "repeated_label"),
    ('["C","A","B","C"]', "direct", "repeated_label"),
    ('["C","A"]', "direct", "missing_label"),
    ("[]", "direct", "missing_label"),
]


@pytest.mark.parametrize(("text", "mode", "status"), CASES)
def test_each_answer_has_its_name(text: str, mode: str, status: str) -> None:
    parsed = parse(text, ABC, mode)  # type: ignore[arg-type]
    assert parsed.status == status
    assert parsed.order == (("C", "A", "B") if status == "ok" else None)
    assert (parsed.order is not None) == (status == "ok")


def test_every_failure_is_tried_and_explained() -> None:
    assert {status for *_, status in CASES} == {"ok", *FAILURES}


def test_the_thought_is_kept_and_the_outer_answer_counts() -> None:
    parsed = parse(f'<think> first ["A","B","C"] then not </think>{GOOD}', ABC, "think")
    assert parsed.thought == 'first ["A","B","C"] then not'
    assert parsed.order == ("C", "A", "B")
    assert parse("<think>cut off", ABC, "think").thought == "cut off"


pieces = st.sampled_from(
    ["<think>", "</think>", "[", "]", '"', '","', '["', '"]', "A", "B", "C", "D", ",", " ", "\n", "{", "}", "1", "null", "\\u0041"]
)
texts = st.one_of(
    st.text(), st.lists(pieces, max_size=30).map("".join), st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps)
)


@given(text=texts, mode=st.sampled_from(["think", "direct", "score"]))
@example(text="[" * 100_000, mode="direct")
@example(text="<think></think>" + "[" * 100_000 + "]" * 100_000, mode="think")
@example(text="<think>" + "[" * 3_000 + "</think>", mode="think")
@example(text="[" + "9" * 10_000 + "]", mode="direct")
@example(text='["\ud800","A","B"]', mode="direct")
@example(text='["\x00"]', mode="direct")
@settings(max_examples=500, deadline=None)
def test_never_raises_and_never_repairs(text: str, mode: str) -> None:
    parsed = parse(text, ABC, mode)  # type: ignore[arg-type]
    assert parsed.status == "ok" or parsed.status in FAILURES
    assert (parsed.status == "ok") == (parsed.order is not None)
    if parsed.order is not None:
        assert sorted(parsed.order) == list(ABC)
        answer = text.rpartition("</think>")[2]
        assert tuple(json.loads(answer)) == parsed.order  # what was read is all that stands after the thought


@given(order=st.integers(1, 20).flatmap(lambda n: st.permutations(LABELS[:n])), thought=st.text().filter(lambda t: "think>" not in t))
def test_what_is_formatted_parses(order: list[str], thought: str) -> None:
    parsed = parse(format_thought(thought) + format_answer(order), sorted(order), "think")
    assert (parsed.status, parsed.order, parsed.thought) == ("ok", tuple(order), thought.strip())
    assert parse(format_answer(order), order, "direct").order == tuple(order)


@given(order=st.permutations(LABELS[:6]), cut=st.integers(0, 40))
def test_no_prefix_of_an_answer_is_an_answer(order: list[str], cut: int) -> None:
    whole = format_thought("need") + format_answer(order)
    assert (parse(whole[:cut], order, "think").order is not None) == (cut >= len(whole))


def test_long_thoughts_are_read_in_linear_time() -> None:
    """A thought full of brackets cannot make the parser quadratic in what it decodes."""
    assert parse("<think>" + "[ " * 1_000_000 + "</think>", ABC, "think").status == "missing_answer"
