"""Trees that go on where the evidence program stops: what no sum of its features says. The source of `distill`, not of thoughts.

    judge = boost(program, raw_RNC, there_RN, grades_RN, folds_R, seed)
    for logp_N in judge.log_probabilities(lists, users): ...

Gradient boosting (Friedman 2001, as LightGBM has it) that starts from the scores of the conditional logit and lowers the same loss, the
cross-entropy of a list's softmax (Cao et al. 2007, ListNet's top one), the mean of several bags. What they come to is averaged with the
scores of LambdaMART (Burges 2010) on the raw columns: the two err apart, and their mean orders better than either, and is as sure as it
should be (docs/log.md). All are fitted in the program's own folds of users: no list of a user taught what judges that user's lists.

Shapes: R lists, N candidates of the longest, C raw columns, F features of trees, M candidates of all lists, one after the other.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gr2.prompts import Candidate
from scoring.evidence_engine import FOLDS, Floats, Program, columns_of, fold_of, raw_of, shares

NAME = "trees:3"
BAGS, ROUNDS, RANKED_ROUNDS = 4, 400, 200
# Chosen by cross-validation on Beauty's lists of rerank and valid (docs/log.md).
BOTH = {
    "min_data_in_leaf": 50, "learning_rate": 0.03, "lambda_l2": 10.0, "verbosity": -1, "deterministic": True, "force_row_wise": True,
    "num_threads": 1, "feature_pre_filter": False,  # else few lists leave no feature, which is an error
}  # fmt: skip
TREES = {**BOTH, "num_leaves": 7, "bagging_fraction": 0.6, "bagging_freq": 1, "feature_fraction": 0.5}
RANKED = {**BOTH, "objective": "lambdarank", "num_leaves": 15}


@dataclass(frozen=True, eq=False)
class Boosted:
    """The program, and for each fold of users its bags of trees."""

    program: Program
    bags: Sequence[Sequence[Any]]  # lightgbm.Booster, as the next
    ranked: Sequence[Any]  # LambdaMART

    def texts(self) -> dict[str, Any]:
        """Weights, and the trees in LightGBM's own words, exact to the last digit: what JSON can keep."""
        return {
            "program": {name: value.tolist() for name, value in vars(self.program).items()},
            "bags": [[bag.model_to_string() for bag in bags] for bags in self.bags],
            "ranked": [own.model_to_string() for own in self.ranked],
        }

    @classmethod
    def told(cls, texts: Mapping[str, Any]) -> "Boosted":
        """The judge whose `texts` these are."""
        from lightgbm import Booster

        program = Program(**{name: np.array(value) for name, value in texts["program"].items()})
        bags = [[Booster(model_str=text) for text in bags] for bags in texts["bags"]]
        return cls(program, bags, [Booster(model_str=text) for text in texts["ranked"]])

    def log_probabilities(self, lists: Sequence[Sequence[Candidate]], users: Sequence[str]) -> list[Floats]:
        """(N,) for each list: log-probability of each candidate to be chosen, as the user's fold has it."""
        if not lists:
            return []
        raw_RNC = np.zeros((len(lists), max(map(len, lists)), len(columns_of())))
        there_RN = np.zeros(raw_RNC.shape[:2], dtype=bool)
        for row, candidates in enumerate(lists):
            raw_RNC[row, : len(candidates)], there_RN[row, : len(candidates)] = raw_of(candidates), True
        logp_RN = self.judged(raw_RNC, there_RN, np.array([fold_of(user) for user in users]))
        return [row_N[there_N] for row_N, there_N in zip(logp_RN, there_RN, strict=True)]

    def judged(self, raw_RNC: Floats, there_RN: NDArray[np.bool_], folds_R: NDArray[np.int64] | None = None) -> Floats:
        """(R, N) log-probabilities of lists whose users are of the given folds; -inf where there is no candidate.

        Without folds these are lists that taught none of the judges: all of them have a say, as much as each other.
        """
        scores_RN = np.full(there_RN.shape, -np.inf)
        if folds_R is None:
            scores_RN[there_RN] = np.mean([self._scores(raw_RNC, there_RN, fold) for fold in range(FOLDS)], axis=0)
        else:
            for fold in np.unique(folds_R):
                own_R = folds_R == fold
                scores_RN[own_R[:, None] & there_RN] = self._scores(raw_RNC[own_R], there_RN[own_R], int(fold))
        return np.asarray(scores_RN - np.logaddexp.reduce(scores_RN, axis=1, keepdims=True))

    def _scores(self, raw_RNC: Floats, there_RN: NDArray[np.bool_], fold: int) -> Floats:
        """(M,) of one fold's judge."""
        logit_RN, features_MF = _inputs(self.program, raw_RNC, there_RN, fold)
        listwise_M = logit_RN[there_RN] + np.mean([bag.predict(features_MF) for bag in self.bags[fold]], axis=0)
        return np.asarray(listwise_M + self.ranked[fold].predict(raw_RNC[there_RN])) / 2


def boost(
    program: Program,
    raw_RNC: Floats,
    there_RN: NDArray[np.bool_],
    grades_RN: Floats,
    folds_R: NDArray[np.int64],
    seed: int,
    weights_RN: Floats | None = None,
    rounds: int = ROUNDS,
) -> Boosted:
    """Fits the trees of each fold on the lists of the others' users that hold something relevant, as `evidence_engine.fit` the weights."""
    import lightgbm

    share_RN = shares(grades_RN, there_RN, weights_RN)

    def of(fold: int) -> tuple[list[Any], Any]:
        taught = (folds_R != fold) & (share_RN > 0).any(axis=1)
        there, told_RN = there_RN[taught], share_RN[taught]
        logit_RN, features_MF = _inputs(program, raw_RNC[taught], there, fold)
        data = lightgbm.Dataset(features_MF, told_RN[there], init_score=logit_RN[there], free_raw_data=False)
        loss = listwise(told_RN[there], there.sum(axis=1))
        bags = [lightgbm.train({**TREES, "objective": loss, "seed": seed + bag}, data, rounds) for bag in range(BAGS)]
        counts_RN = np.broadcast_to(told_RN.sum(axis=1, keepdims=True), there.shape)  # what a list counts
        lists = {"label": grades_RN[taught][there], "weight": counts_RN[there], "group": there.sum(axis=1)}
        data = lightgbm.Dataset(raw_RNC[taught][there], **lists, free_raw_data=False)
        return bags, lightgbm.train({**RANKED, "seed": seed}, data, min(rounds, RANKED_ROUNDS))

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # each has one thread of LightGBM's
        bags, ranked = zip(*threads.map(of, range(FOLDS)), strict=True)
    return Boosted(program, bags, ranked)


def listwise(share_M: Floats, sizes_R: NDArray[np.int64]) -> Callable[[Floats, Any], tuple[Floats, Floats]]:
    """The objective as LightGBM asks for it: scores -> (slope, curvature) of -sum share * log softmax, the diagonal of the latter.

    `share_M`: `shares` of the candidates, list after list, of `sizes_R` each.
    """
    starts_R = np.cumsum(sizes_R) - sizes_R
    total_M = np.repeat(np.add.reduceat(share_M, starts_R), sizes_R)

    def slopes(scores_M: Floats, _: Any) -> tuple[Floats, Floats]:
        odds_M = np.exp(scores_M - np.repeat(np.maximum.reduceat(scores_M, starts_R), sizes_R))
        chance_M = odds_M / np.repeat(np.add.reduceat(odds_M, starts_R), sizes_R)
        return total_M * chance_M - share_M, np.maximum(total_M * chance_M * (1 - chance_M), 1e-3)

    return slopes


def _inputs(program: Program, raw_RNC: Floats, there_RN: NDArray[np.bool_], fold: int) -> tuple[Floats, Floats]:
    """(R, N) scores of the logit, (M, F) what trees read: the raw columns and the program's features, of which they tell days apart."""
    standard_RNF = program.standard(raw_RNC, there_RN)
    once_RNF = standard_RNF[:, :, : standard_RNF.shape[2] // 2]
    return standard_RNF @ program.weights_KF[fold], np.concatenate([raw_RNC, once_RNF], axis=2)[there_RN]
