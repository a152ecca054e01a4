"""What the re-ranker reads and the form of what it writes: (history, candidates, evidence) -> chat messages (METHOD 5).

    view = make_view("r1", history, candidates, replica=0)       # labels and slots: two independent seeded shuffles
    messages = render(view, load_template("rerank_v3"), "think")

A candidate is one line, label last. What is known of it stands in its line (rerank_v1; in sentences rerank_llm_v1), or in lists of labels
after all lines, best first, which models from scratch learn to read at once (rerank_v3):

    <a_1><b_2><c_3><d_4> priorTwo nextBest brandOne @C
    nextTop @C @Z @Z brandTop @C @A @Z
    priorTop
    ["A","C","B"]

The completion is `<think>THOUGHT</think>["C","A","B"]`. In byte-level BPE the pieces `["`, `","`, `"]` and ` @` hold no letter, so a
label is the same single token (the bare letter) in the prompt, in a thought and in the answer; after `["` the next token is a label. Only
in lists with grades ` @C6`, a label and its grade, is one token (`graded_labels`): a list of ten takes ten.
An engine must keep `<think>` and `</think>` in the text that it returns, and drop the end token.
"""

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from string import Formatter
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from gr2.config import PROJECT, Section, templates
from gr2.errors import ConfigError

Mode = Literal["think", "direct", "score"]
Value = float | str | None
LABELS = tuple("ABCDEFGHIJKLMNOPQRST")
THINK, END_THINK = "<think>", "</think>"
EMPTY_THOUGHT = THINK + END_THINK
ANSWER_OPEN, ANSWER_SEPARATOR, ANSWER_CLOSE = '["', '","', '"]'
DEFAULT = "rerank_v3"
# What a prompt may show: columns of candidate_features (`grade` is the label and never among them), and two that are derived: `place`, the
# incoming place, and `trend` = recent - popularity, the log share of an item's choices that decay has left (0: all of late).
DERIVED = frozenset({"place", "trend"})
COLUMNS = DERIVED | frozenset(
    {"prior_gap", "popularity", "recent", "pair_last", "pair_next", "pair_max", "pair_sum", "lift_max", "pair_gap_days"}
    | {"same_brand", "category_overlap", "text_similarity", "text_similarity_max", "price_ratio", "days_since_seen"}
)
SMALL_IS_GOOD = frozenset({"place", "prior_gap", "pair_gap_days"})
NOBODY = "Z"  # a label that is never given out: it fills a list of labels, so that every place of it stands at the same distance
GRADED = {f" @{label}{grade}": (label, str(grade)) for label in (*LABELS, NOBODY) for grade in range(10)}  # ` @C6`: what it is made of
COMPARED = 3  # candidates that a program's thought compares: the first of its order
BY_PLACE = ("incoming_rank", "prior_score", "prior_gap")  # belong to a place in the incoming order, not to the item in it
WORD = re.compile(r"[a-z]+[A-Z][a-z]+")  # the shape of every evidence word
_FIELDS = {
    "history_line": {"line", "sid", "text", "age", "days"},
    "candidate_line": {"sid", "text", "evidence", "after", "label"},
    "target_line": {"label"},
    "after": {"line"},
}


# -- what is shown ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HistoryItem:
    """An item the user chose, `days_ago` days before the request (negative: unknown)."""

    sid: str
    text: str
    days_ago: int
    item_id: str = ""


@dataclass(frozen=True)
class Candidate:
    """One candidate. `features`: columns of candidate_features."""

    item_id: str
    sid: str
    text: str
    features: Mapping[str, Value]


@dataclass(frozen=True)
class View:
    """One request as one replica shows it.

    `candidates` and `labels` are in incoming order; `shown` holds incoming places (from 0) in the order shown; `history` is oldest first.
    """

    request_id: str
    history: tuple[HistoryItem, ...]
    candidates: tuple[Candidate, ...]
    labels: tuple[str, ...]
    shown: tuple[int, ...]

    @property
    def shown_labels(self) -> tuple[str, ...]:
        """Labels in the order shown."""
        return tuple(self.labels[place] for place in self.shown)

    def label_of(self, item_id: str) -> str:
        """The label that names an item. Raises ValueError if it is not a candidate."""
        return self.labels[[c.item_id for c in self.candidates].index(item_id)]

    def item_of(self, label: str) -> str:
        """The item that a label names. Raises ValueError for a label not given out."""
        return self.candidates[self.labels.index(label)].item_id


def make_view(
    request_id: str, history: Sequence[HistoryItem], candidates: Sequence[Candidate], replica: int, shuffled: bool = True
) -> View:
    """Gives out labels and slots by two independent shuffles, seeded by request and replica (DESIGN contract 11).

    Not `shuffled`: slots are the incoming order, which a policy can then repeat without reading; only to show that it does.

    Raises ValueError for no candidate, more than there are labels, or a repeated one.
    """
    count = len(candidates)
    if not 1 <= count <= len(LABELS) or len({c.item_id for c in candidates}) < count:
        raise ValueError(f"request {request_id!r}: {count} candidates; 1 to {len(LABELS)} distinct ones can be labelled")
    labels, shown = list(LABELS[:count]), list(range(count))
    _generator("labels", request_id, replica).shuffle(labels)
    if shuffled:
        _generator("slots", request_id, replica).shuffle(shown)
    return View(request_id, tuple(history), tuple(candidates), tuple(labels), tuple(shown))


def redrawn(candidates: Sequence[Candidate], target_id: str, request_id: str, replica: int) -> tuple[Candidate, ...]:
    """Moves the target to a uniformly drawn incoming place; the others keep their order (METHOD 8: then a copy earns nothing on average).

    Features that belong to a place (rank, prior score, gap) stay with the place. Raises ValueError if the target is not a candidate.
    """
    old = [c.item_id for c in candidates].index(target_id)
    items = [c for c in candidates if c.item_id != target_id]
    items.insert(_generator("redraw", request_id, replica).randrange(len(candidates)), candidates[old])
    places = [{k: c.features[k] for k in BY_PLACE if k in c.features} for c in candidates]
    return tuple(replace(c, features={**c.features, **place}) for c, place in zip(items, places, strict=True))


def _generator(purpose: str, request_id: str, replica: int) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(f"{purpose}\0{request_id}\0{replica}".encode()).digest()[:8]))


# -- templates --------------------------------------------------------------------------------------------------------


class Feature(Section):
    """A column said in words: level = thresholds reached; level 0 is not said; `best` marks the list's largest value (level 1 at least).

    With `listed` the word does not stand in each candidate's line: it stands once, before the labels of so many candidates at most, the
    best first. A small model learns to read such lists; words that it must bind to a line's label it did not (docs/log.md). `as_answer`
    says the list in the form of an answer. With `grades` each label of a list is followed by a digit, the number of these thresholds that
    its value reaches: an order alone does not say by how much.
    """

    column: str = ""
    at: tuple[float, ...]
    words: tuple[str, ...]
    best: str = ""
    listed: int = Field(0, ge=0)
    as_answer: bool = False
    grades: tuple[float, ...] = Field((), max_length=9, exclude_if=lambda grades: not grades)  # no grades: the hash of before

    @model_validator(mode="after")
    def _consistent(self) -> "Feature":
        if len(self.at) != len(self.words) or list(self.at) != sorted(set(self.at)):
            raise ValueError("`at` must rise and have one threshold a word")
        if bad := [w for w in (*self.words, *filter(None, [self.best])) if not WORD.fullmatch(w)]:
            raise ValueError(f"words must be letters like nextLow, so that none is ordinary English: {', '.join(bad)}")
        if self.listed and len(self.words) != 1:
            raise ValueError("a listed feature has one word and one threshold")
        if self.as_answer and not self.listed:
            raise ValueError("only a listed feature can be said as an answer")
        if self.grades and (not self.listed or self.as_answer or list(self.grades) != sorted(set(self.grades))):
            raise ValueError("`grades` must rise, and belong to a listed feature that is not said as an answer")
        return self

    def grade(self, value: Value) -> str:
        """The digit after a listed label; nothing where the feature has no grades."""
        return str(sum(value >= g for g in self.grades)) if self.grades and isinstance(value, (int, float)) else ""

    def level(self, value: Value) -> int:
        """Thresholds that a value reaches; 0 for what is unknown."""
        return sum(value >= a for a in self.at) if isinstance(value, (int, float)) else 0


class Template(Section):
    """A prompt template: a file in conf/prompts. Its digest is part of every prompt's hash."""

    name: str
    version: str
    system: str
    knowledge: str
    steps: str
    history_title: str
    candidates_title: str
    history_line: str
    candidate_line: str
    target_line: str
    closing: dict[Literal["think", "direct"], str]
    text_words: int = Field(ge=0)
    after: str
    ages: Feature
    thought: dict[Literal["pattern", "need", "compare"], str]
    evidence: dict[str, Feature]

    @model_validator(mode="after")
    def _consistent(self) -> "Template":
        for line, allowed in _FIELDS.items():
            if unknown := {field for _, field, _, _ in Formatter().parse(getattr(self, line)) if field is not None} - allowed:
                raise ValueError(f"{line}: unknown field {sorted(unknown)}; there are {sorted(allowed)}")
        if unknown := {f.column for f in self.evidence.values()} - COLUMNS:
            raise ValueError(f"evidence: a prompt may not show {sorted(unknown)}")
        words = [w for f in [*self.evidence.values(), self.ages] for w in (*f.words, f.best) if w]
        if len(set(words)) < len(words):
            raise ValueError("evidence: a word stands for one level of one feature only")
        if set(self.closing) != {"think", "direct"} or set(self.thought) != {"pattern", "need", "compare"}:
            raise ValueError("closing needs think and direct; thought needs pattern, need and compare")
        return self

    @property
    def digest(self) -> str:
        """Hash of all that the template says."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def vocabulary(self) -> frozenset[str]:
        """Every evidence word of the template, shown or not: each is a citation wherever it stands in a thought."""
        return frozenset(w for f in self.evidence.values() for w in (*f.words, f.best) if w)


@cache
def load_template(name: str = DEFAULT, evidence: bool = True) -> Template:
    """Reads `conf/prompts/<name>.yaml`; `evidence=False` gives the same prompt without evidence. Raises ConfigError."""
    folder = PROJECT / "conf" / "prompts"
    if name not in templates():
        raise ConfigError(f"no prompt template {name!r} in conf/prompts; there are: {', '.join(templates())}")
    try:
        found = Template.model_validate(yaml.safe_load((folder / f"{name}.yaml").read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"prompt template {name!r}: {error}") from None
    return found if evidence else found.model_copy(update={"evidence": {}})


def prompt_hash(template: Template, text: str) -> str:
    """16 hex digits over the template and a rendered prompt."""
    return hashlib.sha256(f"{template.digest}\0{text}".encode()).hexdigest()[:16]


# -- rendering --------------------------------------------------------------------------------------------------------


def render(view: View, template: Template, mode: Mode, target: str | None = None) -> list[dict[str, str]]:
    """Chat messages. `score` reads what `direct` reads. `target` (an item id; teachers' targeted mode) only adds a line.

    Raises ValueError if the target is not a candidate.
    """
    said = evidence_of(view, template)
    lines = [template.history_title]
    for number, item in enumerate(view.history, 1):
        age = template.ages.level(item.days_ago)
        word = template.ages.words[age - 1] if age else ""
        fields = {"line": number, "sid": item.sid, "text": clean(item.text, template.text_words), "age": word, "days": item.days_ago}
        lines.append(_line(template.history_line, fields))
    lines.append(template.candidates_title)
    for place in view.shown:
        candidate = view.candidates[place]
        fields = {"sid": candidate.sid, "text": clean(candidate.text, template.text_words), "label": view.labels[place]}
        words = [word for key, word in said[place].items() if not template.evidence[key.removesuffix("_best")].listed]
        fields |= {"evidence": " ".join(words), "after": _after(candidate, view, template)}
        lines.append(_line(template.candidate_line, fields))
    lines += evidence_lists(view, template)
    if target is not None:
        lines.append(template.target_line.format(label=view.label_of(target)))
    lines.append(template.closing["think" if mode == "think" else "direct"])
    system = " ".join(part for part in (template.system, template.knowledge, template.steps if mode == "think" else "") if part)
    return [{"role": "system", "content": system}, {"role": "user", "content": "\n".join(lines)}]


def prefill(mode: Mode) -> str:
    """What follows the rendered prompt before the model goes on: nothing, the empty thought, or that and the opening of the answer."""
    return {"think": "", "direct": EMPTY_THOUGHT, "score": EMPTY_THOUGHT + ANSWER_OPEN}[mode]


def clean(text: str, words: int) -> str:
    """The first `words` words of a text from outside, without what could pose as a tag, a label citation or a line of the prompt."""
    return " ".join(re.sub(r"[<>@\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text).split()[:words])


def _line(pattern: str, fields: Mapping[str, object]) -> str:
    return " ".join(pattern.format(**fields).split())


def evidence_lists(view: View, template: Template) -> list[str]:
    """The listed features: `nextTop @C @A @Z likeTop @A @B @C` in one line, as many labels each time where the list is long enough; then
    those said as an answer, the word and the list in a line each."""
    inline, answers = [], []
    for feature in template.evidence.values():
        if not feature.listed:
            continue
        places = best_first(feature, view)
        if feature.as_answer:
            answers += [feature.words[0], format_answer([view.labels[place] for place in places])]
        else:
            graded = [view.labels[place] + feature.grade(_value(feature.column, place, view.candidates[place])) for place in places]
            graded += [NOBODY + feature.grade(-math.inf)] * (min(feature.listed, len(view.labels)) - len(places))
            inline.append(" ".join([feature.words[0], *(f"@{label}" for label in graded)]))
    return [*([" ".join(inline)] if inline else []), *answers]


def best_first(feature: Feature, view: View) -> list[int]:
    """Incoming places that a listed feature names, best first; ties in incoming order."""
    values = [_value(feature.column, place, c) for place, c in enumerate(view.candidates)]
    sign = 1.0 if feature.column in SMALL_IS_GOOD else -1.0
    known = [(sign * float(value), place) for place, value in enumerate(values) if feature.level(value)]  # type: ignore[arg-type]
    return [place for _, place in sorted(known)][: feature.listed]


def _after(candidate: Candidate, view: View, template: Template) -> str:
    """The history line after which the candidate is most often chosen."""
    source = candidate.features.get("pair_item")
    for number, item in reversed(list(enumerate(view.history, 1))):
        if template.evidence and source and item.item_id == source:
            return template.after.format(line=number)
    return ""


# -- evidence and thoughts --------------------------------------------------------------------------------------------


def evidence_of(view: View, template: Template | None = None) -> list[dict[str, str]]:
    """For each candidate in incoming order: feature -> word; the word of the list's largest value has the key `<feature>_best`."""
    template = template or load_template()
    said: list[dict[str, str]] = [{} for _ in view.candidates]
    for name, feature in template.evidence.items():
        if feature.listed:
            for number, place in enumerate(best_first(feature, view)):
                said[place] |= {name: feature.words[0]} | ({f"{name}_best": feature.best} if feature.best and number == 0 else {})
            continue
        values = [_value(feature.column, place, c) for place, c in enumerate(view.candidates)]
        levels = [feature.level(v) for v in values]
        largest = max((v for v in values if isinstance(v, (int, float)) and v == v), default=None)
        for place, (value, level) in enumerate(zip(values, levels, strict=True)):
            if level:
                said[place][name] = feature.words[level - 1]
                if feature.best and value == largest:
                    said[place][f"{name}_best"] = feature.best
    return said


def _value(column: str, place: int, candidate: Candidate) -> Value:
    if column == "place":
        return place + 1
    if column == "trend":
        recent, popularity = candidate.features.get("recent"), candidate.features.get("popularity")
        return recent - popularity if isinstance(recent, (int, float)) and isinstance(popularity, (int, float)) else None
    return candidate.features.get(column)


def evidence_words(view: View, template: Template | None = None) -> list[str]:
    """What a thought may cite: labels ("C"), words of the prompt ("nextBest", "dayWeek"), claims ("C:nextBest" holds). Sorted."""
    template = template or load_template()
    said = evidence_of(view, template)
    ages = {template.ages.words[level - 1] for item in view.history if (level := template.ages.level(item.days_ago))}
    claims = {f"{label}:{word}" for label, words in zip(view.labels, said, strict=True) for word in words.values()}
    return sorted(set(view.labels) | ages | {w for words in said for w in words.values()} | claims)


def compose_thought(
    view: View, ranking: Sequence[str], pattern: Sequence[str], need: Sequence[str], template: Template | None = None, cited: int = COMPARED
) -> str:
    """The three-step thought of a program teacher: pattern -> need -> comparison, in at most 48 tokens, citing only what is shown.

    `ranking`: labels, best first; `pattern`, `need`: names of features, the weightiest first (those not said of the leader are left out).
    `pattern brandOne. need nextBest likeHigh. compare @C nextBest likeHigh, @A priorOne, @B popTop.`
    """
    template = template or load_template()
    said = dict(zip(view.labels, evidence_of(view, template), strict=True))
    leader = said[ranking[0]]
    steps = [[template.thought["pattern"]], [template.thought["need"]]]
    for step, names in zip(steps, (pattern, need), strict=True):
        step += [leader[n] for n in _with_best(names) if n in leader][:3]
    order = [*_with_best(need), *_with_best(pattern), "prior"]
    claims = []
    for label in ranking[:cited]:
        words = list(dict.fromkeys(said[label][n] for n in order if n in said[label]))[:2]
        claims.append(" ".join([f"@{label}", *words]))
    return f"{' '.join(steps[0])}. {' '.join(steps[1])}. {template.thought['compare']} {', '.join(claims)}."


def led_by(view: View, places: Sequence[int]) -> tuple[str, ...]:
    """Labels in the order of a program that moves a few candidates: those of these incoming places first, the others as they came."""
    return (*(view.labels[place] for place in places), *(label for other, label in enumerate(view.labels) if other not in places))


def _with_best(names: Sequence[str]) -> list[str]:
    return [key for name in names for key in (f"{name}_best", name)]


# -- the form of a completion -----------------------------------------------------------------------------------------


def format_thought(text: str) -> str:
    """A thought in its tags. Raises ValueError for a text that holds a tag."""
    if THINK in text or END_THINK in text:
        raise ValueError("a thought cannot hold its own tags")
    return f"{THINK}{text}{END_THINK}"


def format_answer(labels: Sequence[str]) -> str:
    """Labels, best first, as JSON without spaces: two tokens a label. Raises ValueError for an unknown label."""
    if unknown := set(labels) - set(LABELS):
        raise ValueError(f"no such labels: {sorted(unknown)}")
    return ANSWER_OPEN + ANSWER_SEPARATOR.join(labels) + ANSWER_CLOSE


def graded_labels(template: Template) -> list[str]:
    """Every label with every grade, as lists with grades say it; none where no feature has grades."""
    return list(GRADED) if any(feature.grades for feature in template.evidence.values()) else []


def vocabulary_texts(template: Template, copies: int = 1000) -> list[str]:
    """Texts that hold every word a prompt or a completion can have, for training a small BPE: the words become single tokens.

    So many copies because they compete for merges with a whole catalogue (20 copies beside Amazon Beauty left 61 words in pieces).
    """
    words = [w for f in [*template.evidence.values(), template.ages] for w in (*f.words, f.best) if w]
    fixed = [
        template.system,
        template.knowledge,
        template.steps,
        template.history_title,
        template.candidates_title,
        *template.closing.values(),
    ]
    thought = " ".join(f"{step}." for step in template.thought.values())
    lines = "\n".join(f" {word} {word}, {word}. @{label}" for word, label in zip(words, LABELS * len(words), strict=False))
    answers = "\n".join(format_answer(LABELS[start:]) for start in range(len(LABELS)))  # no tag before it: `>["` would become one token
    return [*fixed, thought, lines, answers, "".join(graded_labels(template))] * copies
