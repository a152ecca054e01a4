"""Clicks under position bias: the position-based model of a log, and what a click is worth once it is known.

P(click) = P(the slot is looked at) * P(click | looked at) (Craswell et al., 2008; Chuklin et al., 2015, section 3.3). What was shown far up
was also thought better by whoever filled the slots, so the second factor must not be taken as equal for all: slots are compared within
groups of like propensity, which is all that the logging policy knew (Wang et al., 2018, use a regression). The two factors are fitted in
turns until the clicks of each slot and of each group are those counted (quasi-likelihood of a log-linear model; it draws nothing).

Shapes: K slots, G groups.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 200
ENOUGH = 1e-9  # largest change of an examination probability at which the fit ends


def examination(shown_KG: ArrayLike, clicked_KG: ArrayLike) -> NDArray[np.float64]:
    """(K,) P(looked at) of each slot, the first one's set to 1, from counts of what was shown and clicked.

    A slot without an impression gets 1: nothing is known against it. So does every slot where nothing in the first one was ever clicked.
    Raises ValueError for counts that cannot be.
    """
    n, c = np.asarray(shown_KG, dtype=np.float64), np.asarray(clicked_KG, dtype=np.float64)
    if n.ndim != 2 or n.shape != c.shape or (c < 0).any() or (c > n).any():
        raise ValueError(f"clicks must be counts within those of impressions, by slot and group: {n.shape} and {c.shape}")
    looked_K = np.ones(len(n))
    if not c[0].sum():
        return looked_K
    for _ in range(ROUNDS):
        liked_G = _share(c.sum(0), looked_K @ n)
        after_K = _share(c.sum(1), n @ liked_G)
        after_K = np.where(n.sum(1) > 0, after_K / max(after_K[0], 1e-12), 1.0)  # the scale of the two factors is free
        moved, looked_K = float(np.abs(after_K - looked_K).max()), after_K
        if moved < ENOUGH:
            break
    return looked_K


def inverse_weights(examination_K: ArrayLike, most: float) -> NDArray[np.float64]:
    """(K,) what a click in each slot counts: 1 / P(looked at), at most `most` (Joachims et al., 2017; clipping: Strehl et al., 2010)."""
    looked_K = np.asarray(examination_K, dtype=np.float64)
    return np.minimum(1.0 / np.maximum(looked_K, 1e-12), most)


def weighted_grade(grade: float, weight: float) -> float:
    """The grade whose gain 2^g - 1 is `weight` times that of `grade`: graded rewards and NDCG then weigh clicks as they are."""
    return math.log2(1.0 + weight * (2.0**grade - 1.0))


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
