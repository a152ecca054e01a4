"""The evidence teacher: a program, not a language model. It picks by the evidence tables; its rationale follows from its ranking.

It says what it is everywhere: its name is `evidence:5`. Who comes first is a draw from a conditional logit (McFadden 1974): the largest
of score + temperature * Gumbel, its score being w . features. The weights are fitted on the re-ranker's own training lists in folds of
users, so that no list of a user taught the weights which rank that user's lists. Trees that go on from its scores are in
`scoring.boosted`; where they rank, the logit still says why.

In the targeted mode the target's score gets a boost and the rationale is written for the boosted order: post hoc, as a model's would be.

Shapes: R lists, N candidates of the longest list, F features.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gr2.draws import seed_of
from gr2.errors import EngineError
from gr2.prompts import Candidate, Template, compose_thought, format_answer, format_thought, led_by
from scoring.engine import Answer, Ask, failed

Floats = NDArray[np.float64]
NAME = "evidence:5"
FOLDS = 5
RIDGE = 100.0  # of the standardised weights, against the sum over lists
BOOST = 8.0  # of the target's score in the targeted mode: it nearly always comes first
PLACES = 20  # incoming places with a weight of their own
# How prompts call the evidence in each column. Counts are heavy-tailed: they enter in logs.
COUNTS = {"pair_next": "next", "pair_last": "pair", "pair_sum": "ever", "pair_max": "ever", "lift_max": "lift"}
DEGREES = {"same_brand": "brand", "category_overlap": "kind", "text_similarity": "like", "text_similarity_max": "like"}
# Steps that a value may reach, much like the words of a prompt: what helps is seldom a straight line.
STEPS = {
    "lift_max": (2.0, 20.0, 60.0, 150.0, 400.0),
    "pair_sum": (0.01, 0.3, 1.5, 6.0),
    "recent": (1.5, 2.5, 3.5, 4.5),
    "trend": (-1.2, -0.75, -0.5, -0.3, -0.15),
    "category_overlap": (0.3, 0.5, 0.99),
    "text_similarity": (0.03, 0.1, 0.25, 0.5),
    "near": (1 / 182, 1 / 33, 1 / 9, 1 / 3, 1 / 2 + 1e-9),  # pairs at most half a year, a month, a week, two days, no day apart
}
NEED, PATTERN = ("next", "pair", "ever", "lift", "days", "like"), ("brand", "kind", "pop", "trend")


# -- features ---------------------------------------------------------------------------------------------------------


def columns_of() -> tuple[str, ...]:
    """Columns of `candidate_features` that the program reads; `design` leaves the prior's score to the trees."""
    of_item = ("pair_gap_days", "recent", "popularity", "price_ratio", "days_since_seen", "days_since_last")
    return ("incoming_rank", "prior_score", "prior_gap", *COUNTS, *DEGREES, *of_item)


def design(raw_RNC: Floats, there_RN: NDArray[np.bool_]) -> tuple[Floats, list[str]]:
    """(R, N, F) features of lists from raw columns (`columns_of`), and for each the name under which a rationale cites it ("" for none).

    NaN, what is unknown, counts as zero. Besides values there are steps, and places within the list: a ranking is about differences.
    All of them come a second time for requests of a later day than the user's last item, and are zero on its day: what is put in one
    basket and what is come back for have little in common (docs/log.md).
    """
    raw = dict(zip(columns_of(), np.moveaxis(np.nan_to_num(raw_RNC), 2, 0), strict=True))
    parts: list[tuple[Floats, str]] = []
    place_RN, gap_RN, age_RN = np.maximum(raw["incoming_rank"], 1.0), np.maximum(raw["prior_gap"], 0.0), raw["days_since_seen"]
    parts += [(1.0 / place_RN, "prior"), (np.log(place_RN), "prior"), (gap_RN, "gap"), (np.log1p(gap_RN), "gap")]
    parts += [((place_RN == place).astype(np.float64), "prior") for place in range(1, PLACES + 1)]
    columns = {name: (np.maximum(raw[name], 0.0), cited) for name, cited in COUNTS.items()}
    parts += [(transform(value_RN), cited) for value_RN, cited in columns.values() for transform in (np.log1p, np.sqrt)]
    columns |= {name: (raw[name], cited) for name, cited in DEGREES.items()}
    columns |= {"recent": (raw["recent"], "pop"), "popularity": (raw["popularity"], "pop")}
    columns["trend"] = (raw["recent"] - raw["popularity"], "trend")  # how much of its popularity is of late
    paired_RN = raw["pair_max"] > 0
    columns["near"] = (np.where(paired_RN, 1 / (1 + raw["pair_gap_days"]), 0.0), "days")  # 1: chosen on one day, 0: never together
    parts += [(np.where(paired_RN, np.log1p(raw["pair_gap_days"]), 0.0), "days")]
    parts += [(columns[name][0], columns[name][1]) for name in (*DEGREES, "recent", "popularity", "trend", "near")]
    for name, (value_RN, cited) in columns.items():
        parts += [(_above(value_RN, there_RN), cited), (_largest(value_RN, there_RN), cited)]
        parts += [((value_RN >= step).astype(np.float64), cited) for step in STEPS.get(name, (1e-9,) if name in COUNTS else ())]
    parts += [(np.abs(np.log(np.maximum(raw["price_ratio"], 1e-3))), "")]
    parts += [(np.log1p(np.maximum(age_RN, 0.0)), ""), ((age_RN < 0).astype(np.float64), "")]
    features_RNF, cited_F = np.stack([values for values, _ in parts], axis=2), [cited for _, cited in parts]
    return np.concatenate([features_RNF, features_RNF * (raw["days_since_last"] >= 1)[:, :, None]], axis=2), cited_F * 2


def _above(values_RN: Floats, there_RN: NDArray[np.bool_]) -> Floats:
    """Share of the list that a value exceeds."""
    exceeds_RNN = (values_RN[:, :, None] > values_RN[:, None, :]) & there_RN[:, None, :]
    return exceeds_RNN.sum(axis=2) / np.maximum(there_RN.sum(axis=1, keepdims=True), 1)


def _largest(values_RN: Floats, there_RN: NDArray[np.bool_]) -> Floats:
    """1 where a value is its list's largest, and the list has another."""
    own_RN = np.where(there_RN, values_RN, -np.inf)
    varied_R1 = own_RN.max(axis=1, keepdims=True) > np.where(there_RN, values_RN, np.inf).min(axis=1, keepdims=True)
    return ((own_RN == own_RN.max(axis=1, keepdims=True)) & varied_R1).astype(np.float64)


# -- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Program:
    """Fitted weights, one row a fold: row f was fitted on the users of the others. `center`, `scale`: of the standardised features."""

    weights_KF: Floats
    center_F: Floats
    scale_F: Floats

    def scores(self, raw_NC: Floats, fold: int) -> tuple[Floats, Floats]:
        """(N,) scores of one list and (N, F) what each feature added."""
        added_NF = self.standard(raw_NC[None], np.ones((1, len(raw_NC)), dtype=bool))[0] * self.weights_KF[fold]
        return added_NF.sum(axis=1), added_NF

    def log_probabilities(self, lists: Sequence[Sequence[Candidate]], users: Sequence[str]) -> list[Floats]:
        """(N,) for each list: log-probability of each candidate to be chosen, as the user's fold has it."""
        scores = [self.scores(raw_of(own), fold_of(user))[0] for own, user in zip(lists, users, strict=True)]
        return [scores_N - np.logaddexp.reduce(scores_N) for scores_N in scores]

    def standard(self, raw_RNC: Floats, there_RN: NDArray[np.bool_]) -> Floats:
        """(R, N, F) standardised features: what the weights multiply."""
        return np.asarray((design(raw_RNC, there_RN)[0] - self.center_F) / self.scale_F)


def fold_of(user: str) -> int:
    """The fold of a user."""
    return seed_of("fold", user) % FOLDS


def fit(
    raw_RNC: Floats,
    there_RN: NDArray[np.bool_],
    grades_RN: Floats,
    folds_R: NDArray[np.int64],
    ridge: float = RIDGE,
    weights_RN: Floats | None = None,
) -> Program:
    """Fits each fold, on the lists of the others' users that hold something relevant.

    `grades_RN`: relevance; the relevant items of a list share it. `weights_RN`: what each of them counts (inverse propensities).
    Raises EngineError where a fold has nothing to learn from.
    """
    holds_R = (np.where(there_RN, grades_RN, 0.0) > 0).any(axis=1)
    raw_RNC, there_RN, grades_RN, folds_R = raw_RNC[holds_R], there_RN[holds_R], grades_RN[holds_R], folds_R[holds_R]
    if not all((folds_R != fold).any() for fold in range(FOLDS)):
        raise EngineError(
            "the evidence teacher has no list with a target to learn from: it needs requests of split rerank of several users"
        )
    features_RNF, _ = design(raw_RNC, there_RN)
    seen_XF = features_RNF[there_RN]
    center_F, scale_F = seen_XF.mean(axis=0), seen_XF.std(axis=0)
    scale_F = np.where(scale_F > 1e-9, scale_F, 1.0)
    standard_RNF = (features_RNF - center_F) / scale_F
    share_RN = shares(grades_RN, there_RN, None if weights_RN is None else weights_RN[holds_R])
    rows = []
    for fold in range(FOLDS):
        taught = folds_R != fold
        rows.append(_conditional_logit(standard_RNF[taught], there_RN[taught], share_RN[taught], ridge))
    return Program(np.stack(rows), center_F, scale_F)


def shares(grades_RN: Floats, there_RN: NDArray[np.bool_], weights_RN: Floats | None = None) -> Floats:
    """(R, N) of a list's relevance each candidate's part, times what it counts. A list without any has zeros."""
    relevant_RN = np.where(there_RN, np.maximum(grades_RN, 0.0), 0.0)
    share_RN = relevant_RN / np.maximum(relevant_RN.sum(axis=1, keepdims=True), 1e-12)
    return np.asarray(share_RN if weights_RN is None else share_RN * weights_RN)


def _conditional_logit(features_RNF: Floats, there_RN: NDArray[np.bool_], share_RN: Floats, ridge: float) -> Floats:
    """Weights that maximise sum_r sum_n share_rn * log softmax_n(w . x_rn) - ridge / 2 * |w|^2."""
    from scipy.optimize import minimize

    total_R1 = share_RN.sum(axis=1, keepdims=True)  # 1 without weights

    def loss(weights_F: Floats) -> tuple[float, Floats]:
        scores_RN = np.where(there_RN, features_RNF @ weights_F, -np.inf)
        scores_RN = scores_RN - scores_RN.max(axis=1, keepdims=True)
        log_RN = scores_RN - np.log(np.exp(scores_RN).sum(axis=1, keepdims=True))
        gain = float((share_RN * np.where(there_RN, log_RN, 0.0)).sum())
        slope_F = np.einsum("rn,rnf->f", total_R1 * np.exp(log_RN) - share_RN, features_RNF)
        return 0.5 * ridge * float(weights_F @ weights_F) - gain, slope_F + ridge * weights_F

    found = minimize(loss, np.zeros(features_RNF.shape[2]), jac=True, method="L-BFGS-B", options={"maxiter": 300})
    return np.asarray(found.x, dtype=np.float64)


class Judge(Protocol):
    """What ranks: a `Program`, or one with trees (`scoring.boosted`)."""

    def log_probabilities(self, lists: Sequence[Sequence[Candidate]], users: Sequence[str]) -> list[Floats]: ...


# -- the engine -------------------------------------------------------------------------------------------------------


class EvidenceEngine:
    """Answers asks that carry their `view` and `user`; the prompt is not read.

    `template`: whose words a rationale may use. `ordered`: how many candidates it puts in order; the others keep their incoming places.
    `judge`: who ranks, by default the program itself; the reasons are the program's.
    """

    def __init__(self, program: Program, template: Template, ordered: int = 1, judge: Judge | None = None) -> None:
        self._program, self._template, self._ordered, self._judge = program, template, ordered, judge or program
        self._cited = design(np.zeros((1, 1, len(columns_of()))), np.ones((1, 1), dtype=bool))[1]

    def generate(self, asks: Sequence[Ask]) -> list[Answer]:
        """One draw an ask. An ask without view or user, or whose target is not listed, fails alone. No tokens are read or written."""
        whole = [ask for ask in asks if ask.view is not None and ask.user]
        logps = self._judge.log_probabilities([ask.view.candidates for ask in whole if ask.view], [ask.user for ask in whole])
        logp_of = {id(ask): logp_N for ask, logp_N in zip(whole, logps, strict=True)}
        answers = []
        for ask in asks:
            started = time.monotonic()
            try:
                text = self._write(ask, logp_of.get(id(ask)))
                answers.append(Answer(ask.key, text, seconds=time.monotonic() - started))
            except (ValueError, KeyError, TypeError) as error:
                answers.append(failed(ask, error, time.monotonic() - started))
        return answers

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float32]:
        """A program has no token probabilities: raises EngineError."""
        raise EngineError("the evidence teacher is a program and has no token probabilities: use a model, such as the trained teacher")

    def close(self) -> None:
        """Nothing to give back."""

    def _write(self, ask: Ask, logp_N: Floats | None) -> str:
        if ask.view is None or logp_N is None:
            raise ValueError("the evidence teacher needs the ask's view and user")
        view, scores_N = ask.view, logp_N.copy()
        _, added_NF = self._program.scores(raw_of(view.candidates), fold_of(ask.user))
        if ask.target is not None:
            scores_N[[c.item_id for c in view.candidates].index(ask.target)] += BOOST
        noise_N = np.random.default_rng(ask.seed).gumbel(size=len(scores_N))
        leader = int(np.argmax(scores_N + ask.temperature * noise_N))
        # The leader is drawn, those after it are the best of the rest, and what the thought does not name keeps its place: an order that
        # nothing tells of would be noise to learn from.
        ranking = led_by(view, [leader, *(int(n) for n in np.argsort(-scores_N, kind="stable") if n != leader)][: self._ordered])
        ahead_F = added_NF[leader] - added_NF.mean(axis=0)  # what puts the leader ahead of a usual candidate
        strength: dict[str, float] = {}
        for cited, value in zip(self._cited, ahead_F, strict=True):
            strength[cited] = strength.get(cited, 0.0) + float(value)
        need, pattern = (sorted((n for n in names if strength[n] > 0), key=lambda n: -strength[n]) for names in (NEED, PATTERN))
        thought = compose_thought(view, ranking, pattern, need, self._template)
        return format_thought(thought) + format_answer(ranking)


def raw_of(candidates: Sequence[Candidate]) -> Floats:
    """(N, C) raw columns of a view's candidates; NaN where unknown."""
    return np.array([[c.features.get(name) for name in columns_of()] for c in candidates], dtype=np.float64)  # of None NaN
