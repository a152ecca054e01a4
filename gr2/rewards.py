"""Verifiable rewards of a re-ranking answer: what it gained over the incoming order, with nothing to gain from copying (METHOD 8).

Sources: the rank difference and the conditional rule are GR2's (2602.07774), the normalised gain REARANK's (2505.20046, its equation of
the relative improvement), overlong shaping DAPO's (2503.14476, equation 13). Notation: D incoming order, o output, N = |D|, ranks from 1.

`auc` and `ndcg` are paid as differences from D: the raw scores are positive for any order, so they would pay for a copy.
A list without a relevant candidate earns nothing for its rank: no order of it can be told from another. Where `conditional`, as in METHOD,
it earns nothing for its form either.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from gr2.answers import Parsed
from gr2.config import RL
from gr2.prompts import WORD

Kind = Literal["gr2", "normalised", "auc", "ndcg"]
_PIECE = re.compile(r"<[a-z]_\d+>|\w+|[^\w\s]")
ELLIPSIS = 0.5
_CITATION = re.compile(r"@(\w+)|([.,;:!?\n])|\b(" + WORD.pattern + r")\b")


@dataclass(frozen=True)
class Reward:
    """`total` = `rank` + alpha * `format` (each as paid), or settings.invalid. The flags say which order the output repeats."""

    total: float
    rank: float
    format: float
    copied_incoming: bool
    copied_shown: bool


def reward(
    kind: Kind,
    incoming: Sequence[str],
    shown: Sequence[str],
    grades: Sequence[float],
    parsed: Parsed,
    evidence: Collection[str],
    settings: RL,
    budget: int = 48,
) -> Reward:
    """The reward of one answer, in [min(invalid, -1), 1 + alpha]; never raises, whatever the model wrote.

    `incoming`, `shown`: labels in the incoming order and in the order shown; `grades`: relevance of each label of `incoming`, from 0;
    `evidence`: what a thought may cite (`prompts.evidence_words`); `budget`: tokens of a thought.
    """
    order = parsed.order
    if order is None or len(order) != len(incoming) or set(order) != set(incoming):
        return Reward(settings.invalid, 0.0, 0.0, False, False)
    grade_of = dict(zip(incoming, grades, strict=True))
    before, after = [grade_of[label] for label in incoming], [grade_of[label] for label in order]
    copied = tuple(order) == tuple(incoming), tuple(order) == tuple(shown)
    relevant, ideal = max(before, default=0) > 0, is_ideal(kind, after)
    rank = rank_reward(kind, before, after) if relevant else 0.0
    style = format_reward(parsed.thought, evidence, budget)
    if not settings.conditional:
        pays = True
    elif any(copied) and not ideal:
        rank, pays = min(rank, 0.0), False
    else:
        pays = relevant and (rank > 0 or (is_ideal(kind, before) and ideal))
    style = style if pays else 0.0
    return Reward(rank + settings.alpha * style, rank, style, *copied)


# -- ranking ----------------------------------------------------------------------------------------------------------


def rank_reward(kind: Kind, before: Sequence[float], after: Sequence[float]) -> float:
    """R_rank of METHOD 8 from the grades read along D and along o (the same multiset, one grade above 0 at least)."""
    if kind == "gr2":
        return (mean_top_rank(before) - mean_top_rank(after)) / len(before)
    if kind == "normalised" and is_ideal(kind, before):
        return 0.0 if is_ideal(kind, after) else ndcg(after) - 1.0
    if kind == "normalised":
        return max(-1.0, (ndcg(after) - ndcg(before)) / (1.0 - ndcg(before)))  # at most 1 by itself: NDCG is
    score: Callable[[Sequence[float]], float] = auc if kind == "auc" else ndcg
    return score(after) - score(before)


def is_ideal(kind: Kind, grades: Sequence[float]) -> bool:
    """Whether no order of the same candidates scores higher. `gr2` looks at the best grade alone, the others at all."""
    if kind == "gr2":
        best = [g == max(grades) for g in grades]
        return best == sorted(best, reverse=True)
    return list(grades) == sorted(grades, reverse=True)


def mean_top_rank(grades: Sequence[float]) -> float:
    """Rank of the target from 1; the mean rank where several share the best grade."""
    places = [place for place, g in enumerate(grades, 1) if g == max(grades)]
    return sum(places) / len(places)


def ndcg(grades: Sequence[float]) -> float:
    """NDCG of grades read along an order, gain 2^g - 1, discount log2(1 + rank). 0 where nothing is relevant."""
    best = _dcg(sorted(grades, reverse=True))
    return _dcg(grades) / best if best > 0 else 0.0


def auc(grades: Sequence[float]) -> float:
    """Share of pairs of different grade that stand right, each weighed by its difference in gain. 0 where all grades are equal."""
    pairs = [(2**a - 2**b, a > b) for place, a in enumerate(grades) for b in grades[place + 1 :] if a != b]
    total = sum(abs(weight) for weight, _ in pairs)
    return sum(weight for weight, right in pairs if right) / total if total else 0.0


def _dcg(grades: Sequence[float]) -> float:
    """Read along the grades: candidates of equal grade that change places leave every bit as it was, so rounding is no improvement."""
    return sum((2**g - 1) / math.log2(1 + rank) for rank, g in enumerate(grades, 1))


# -- form -------------------------------------------------------------------------------------------------------------


def format_reward(thought: str, evidence: Collection[str], budget: int = 48) -> float:
    """R_fmt in [0, 1]: the share of distinct citations that are true, for a thought that is there, within its budget, and cites at all.

    A citation is a label (`@C`), an evidence word, or the claim that a word holds of the label before it in the same clause. A thought must
    cite a label, and a word where words were shown; else it earns 0.
    """
    if not thought.strip() or len(_PIECE.findall(thought)) > budget:
        return 0.0
    allowed = set(evidence)
    labels, words, claims = citations(thought)
    has_claims, has_words = any(":" in e for e in allowed), any(WORD.fullmatch(e) for e in allowed)
    if not labels or (has_words and not words):
        return 0.0
    cited = labels | words | (claims if has_claims else set())
    return len(cited & allowed) / len(cited)


def citations(thought: str) -> tuple[set[str], set[str], set[str]]:
    """Labels, evidence words, and claims ("C:nextBest") that a thought makes."""
    labels: set[str] = set()
    words: set[str] = set()
    claims: set[str] = set()
    subject = ""
    for label, stop, word in _CITATION.findall(thought):
        if label:
            subject = label
            labels.add(label)
        elif stop:
            subject = ""
        else:
            words.add(word)
            if subject:
                claims.add(f"{subject}:{word}")
    return labels, words, claims


def overlong(tokens: int, limit: int, margin: int) -> float:
    """DAPO's soft punishment of length: 0 up to limit - margin, then falling in a line to -1 at the limit, -1 beyond."""
    if tokens <= limit - margin:
        return 0.0
    return -1.0 if tokens > limit else (limit - margin - tokens) / margin


# -- shorter contexts -------------------------------------------------------------------------------------------------


def compression_reward(text: str, saved: float, judge: float, alpha: float) -> float:
    """`(alpha * max(0, 1 - len_c / len_o) + (1 - alpha) * judge) * ellipsis_penalty` (METHOD 9; GR2's report, equation 10).

    `saved`: 1 - len_c / len_o; `judge`: the share of a frozen ranker's N@3 that is kept. A context that says "..." is paid half: the
    report names the penalty, not its size.
    """
    penalty = ELLIPSIS if "..." in text or "\u2026" in text else 1.0
    return (alpha * max(0.0, saved) + (1.0 - alpha) * judge) * penalty
