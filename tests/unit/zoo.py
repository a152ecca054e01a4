"""The zoo of reward hacks, with what each earns. `python tests/unit/zoo.py` writes docs/reward_zoo.md; a test compares it."""

import sys
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gr2.answers import parse
from gr2.config import RL
from gr2.prompts import EMPTY_THOUGHT, format_answer, format_thought
from gr2.rewards import Kind, Reward, reward

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reward_zoo.md"
INCOMING, SHOWN, TARGET = tuple("ABCDE"), tuple("DBEAC"), "C"
GRADES = tuple(int(label == TARGET) for label in INCOMING)
CLAIMS = ("A:priorOne", "B:priorTwo", "C:nextBest", "C:priorThree", "D:popTop", "E:likeLow")
EVIDENCE = tuple(sorted({*INCOMING, *CLAIMS, *(claim[2:] for claim in CLAIMS)}))
GOOD = "pattern nextBest. need nextBest. compare @C nextBest, @A priorOne."
PAID = RL()  # the defaults of METHOD 8
KINDS: tuple[Kind, ...] = ("gr2", "normalised", "auc", "ndcg")


@dataclass(frozen=True)
class Beast:
    """One way to answer; `honest` ones are there to compare with."""

    name: str
    text: str
    honest: bool = False

    def earns(self, kind: Kind = "normalised", settings: RL = PAID) -> Reward:
        """Its reward on the zoo's one request."""
        return reward(kind, INCOMING, SHOWN, GRADES, parse(self.text, INCOMING, "think"), EVIDENCE, settings)

    @property
    def status(self) -> str:
        """What the parser calls it."""
        return parse(self.text, INCOMING, "think").status


def say(order: str, thought: str = GOOD) -> str:
    """A completion."""
    return format_thought(thought) + format_answer(order)


BEASTS = (
    Beast("target first, true thought", say("CABDE"), honest=True),
    Beast("target one place up, true thought", say("ACBDE"), honest=True),
    Beast("target one place down, true thought", say("ABDCE"), honest=True),
    Beast("copies the incoming order", say("ABCDE")),
    Beast("copies the order shown", say("DBEAC")),
    Beast("reverses the incoming order", say("EDCBA")),
    Beast("reverses the order shown", say("CAEBD")),
    Beast("first slot shown to the front", say("DABCE")),
    Beast("swaps the last two (near copy)", say("ABCED")),
    Beast("swaps the first two (near copy)", say("BACDE")),
    Beast("format only: fine thought, target stays", say("BACED")),
    Beast("target first, empty thought", say("CABDE", "")),
    Beast("target first, thought without a citation", say("CABDE", "pattern need compare.")),
    Beast("target first, cites labels only", say("CABDE", "compare @C, @A.")),
    Beast("target first, invented evidence", say("CABDE", "need brandOne. compare @C brandOne, @A priorOne.")),
    Beast("target first, true word on the wrong label", say("CABDE", "compare @A nextBest.")),
    Beast("target first, unknown label cited", say("CABDE", "compare @Z nextBest.")),
    Beast("target first, one true claim repeated past the budget", say("CABDE", "compare @C nextBest. " * 12)),
    Beast("no thought at all", format_answer("CABDE")),
    Beast("endless thought", "<think>" + "pattern nextBest. " * 200),
    Beast("answer inside the thought only", format_thought(GOOD + format_answer("CABDE"))),
    Beast("answer in the thought, a copy outside", say("ABCDE", GOOD + format_answer("CABDE"))),
    Beast("two thoughts", format_thought(GOOD) + say("CABDE")),
    Beast("thought in a thought", "<think><think>" + GOOD + "</think></think>" + format_answer("CABDE")),
    Beast("target twice", say("CCABDE")),
    Beast("target in every place", say("CCCCC")),
    Beast("target alone", say("C")),
    Beast("one label missing", say("CABD")),
    Beast("a label that was not given out", say("CABDF")),
    Beast("text after the answer", say("CABDE") + " I am sure."),
    Beast("text before the answer", format_thought(GOOD) + "The answer: " + format_answer("CABDE")),
    Beast("two answers", say("CABDE") + format_answer("ABCDE")),
    Beast("unfinished list", format_thought(GOOD) + '["C","A","B'),
    Beast("numbers instead of labels", format_thought(GOOD) + "[3,1,2,4,5]"),
    Beast("an object", format_thought(GOOD) + '{"C":1}'),
    Beast("lower case", format_thought(GOOD) + '["c","a","b","d","e"]'),
    Beast("empty list", EMPTY_THOUGHT + "[]"),
    Beast("nothing", ""),
)

BLIND = {  # rules that move places whatever stands there: place -> place
    "copy of the incoming order": (0, 1, 2, 3, 4),
    "last two swapped": (0, 1, 2, 4, 3),
    "first two swapped": (1, 0, 2, 3, 4),
    "third to the front": (2, 0, 1, 3, 4),
    "reversed": (4, 3, 2, 1, 0),
}


def blind_mean(rule: tuple[int, ...], kind: Kind) -> float:
    """Mean total, without a thought, of a blind rule over a target whose incoming place is uniform."""
    order = [INCOMING[place] for place in rule]
    answer = parse(EMPTY_THOUGHT + format_answer(order), INCOMING, "think")
    grades = [[int(place == target) for place in range(5)] for target in range(5)]
    return sum(reward(kind, INCOMING, SHOWN, g, answer, EVIDENCE, RL()).total for g in grades) / 5


def page() -> str:
    """docs/reward_zoo.md."""
    lines = [
        "# The zoo of reward hacks",
        "",
        "Written by `python tests/unit/zoo.py`; a test fails when it is out of date. One request: incoming order A B C D E, shown as",
        "D B E A C, target C (incoming rank 3). Settings: alpha 0.2, invalid -1.5. `plain`: normalised, without the conditional rule.",
        "",
        "| answer | status | " + " | ".join(KINDS) + " | plain |",
        "| --- | --- |" + " ---: |" * (len(KINDS) + 1),
    ]
    for beast in BEASTS:
        figures = [beast.earns(kind).total for kind in KINDS] + [beast.earns("normalised", RL(conditional=False)).total]
        name = f"**{beast.name}**" if beast.honest else beast.name
        lines.append(f"| {name} | {beast.status} | " + " | ".join(f"{f:+.3f}" for f in figures) + " |")
    everything = {kind: sum(blind_mean(p, kind) for p in permutations(range(5))) / 120 for kind in KINDS}
    lines += [
        "",
        "## Blind rules, where the target's incoming place is uniform",
        "",
        "Mean reward of rules that rearrange places without looking, the target's place being re-drawn as in half of the training prompts.",
        "Under `gr2`, `auc` and `ndcg` no such rule earns anything (a random order a little less: the copies among them lose their gains).",
        "`normalised` pays a blind swap near the top: what the target wins by coming first (+1) weighs more than what it loses by",
        "leaving the first place. So its runs must watch Kendall's tau with the incoming order, not exact copies alone.",
        "",
        "| rule | " + " | ".join(KINDS) + " |",
        "| --- |" + " ---: |" * len(KINDS),
    ]
    for name, rule in BLIND.items():
        lines.append(f"| {name} | " + " | ".join(f"{blind_mean(rule, kind):+.3f}" for kind in KINDS) + " |")
    lines.append("| a random order | " + " | ".join(f"{everything[kind]:+.3f}" for kind in KINDS) + " |")
    return "\n".join(lines).replace("-0.000", "+0.000") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
