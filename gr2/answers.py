"""What the model wrote -> a permutation of the labels, or a named failure. Strict, total, never a silent repair (METHOD 5).

    parse('<think>pattern ...</think>["C","A","B"]', labels=("A", "B", "C"), mode="think").order == ("C", "A", "B")

The answer is what follows the one thought. An answer inside the thought does not count, nor does one with anything after it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gr2.prompts import END_THINK, THINK, Mode

FAILURES = {
    "missing_thought": "think mode, and the text does not begin with <think>",
    "unexpected_thought": "direct mode, and a thought was written",
    "nested_thought": "a second <think> or </think>",
    "unfinished": "the text ends inside the thought or inside the list",
    "answer_in_thought": "nothing follows a thought that holds a list",
    "missing_answer": "nothing follows the thought",
    "text_before_answer": "something other than the list follows the thought",
    "not_json": "the list is not JSON, or not a list of strings",
    "text_after_answer": "something follows the list",
    "unknown_label": "a label that was not given out",
    "repeated_label": "a label twice",
    "missing_label": "a label that was given out is not ranked",
}
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Parsed:
    """`status` is "ok", or a key of FAILURES; `order` (labels, best first) is there only where it is "ok"."""

    status: str
    order: tuple[str, ...] | None = None
    thought: str = ""


def parse(text: str, labels: Sequence[str], mode: Mode) -> Parsed:
    """Reads a completion. `labels`: those given out. Never raises, whatever the text is.

    Modes: `think` needs a thought (it may be empty); `direct` and `score` take none, or the empty one.
    """
    thought, rest, failure = _split(text.strip(), mode)
    if failure:
        return Parsed(failure, None, thought)
    if not rest:
        return Parsed("answer_in_thought" if _holds_list(thought, labels) else "missing_answer", None, thought)
    if THINK in rest or END_THINK in rest:
        return Parsed("nested_thought", None, thought)
    if not rest.startswith("["):
        return Parsed("text_before_answer", None, thought)
    value, end = _list_at(rest)
    if value is None:
        return Parsed("not_json" if "]" in rest else "unfinished", None, thought)
    if rest[end:].strip():
        return Parsed("text_after_answer", None, thought)
    status = _check(value, labels)
    return Parsed(status, tuple(value) if status == "ok" else None, thought)


def _split(text: str, mode: Mode) -> tuple[str, str, str]:
    """(thought, what follows it, failure or "")."""
    if not text.startswith(THINK):
        return ("", text, "missing_thought") if mode == "think" else ("", text, "")
    thought, end, rest = text[len(THINK) :].partition(END_THINK)
    if THINK in thought:
        return thought, "", "nested_thought"
    if not end:
        return thought, "", "unfinished"
    if mode != "think" and thought.strip():
        return thought, "", "unexpected_thought"
    return thought.strip(), rest.strip(), ""


def _list_at(text: str) -> tuple[Any, int]:
    """The JSON value that a text begins with, and where it ends; (None, 0) if there is none."""
    try:
        return _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0


def _holds_list(thought: str, labels: Sequence[str]) -> bool:
    """Whether a thought holds a list of any of the labels."""
    for found in re.findall(r"\[[^\[\]]*\]", thought):
        value, _ = _list_at(found)
        if isinstance(value, list) and value and all(isinstance(v, str) and v in labels for v in value):
            return True
    return False


def _check(value: Any, labels: Sequence[str]) -> str:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        return "not_json"
    if set(value) - set(labels):
        return "unknown_label"
    if len(set(value)) < len(value):
        return "repeated_label"
    return "ok" if len(value) == len(labels) else "missing_label"
