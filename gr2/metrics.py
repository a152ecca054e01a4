"""Ranking metrics, one value a request, and bootstrap intervals. Vectorised numpy; checked against ir-measures and ranx in the tests.

Shapes: B requests, N places. `ranks_B`: place of the single target from 1; 0 or NaN where it is not in the list (a miss scores 0).
`grades_BN`: relevance along an order, best place first, padded with 0.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
NAMES = ("recall@1", "recall@3", "recall@5", "recall@10", "ndcg@3", "ndcg@5", "ndcg@10", "mrr")


def values(name: str, ranks_B: ArrayLike) -> Floats:
    """One value a request of `recall@k`, `ndcg@k` or `mrr`, from target ranks. Raises ValueError for another name."""
    metric, k = _parse(name)
    if metric == "mrr":
        return mrr(ranks_B)
    return recall_at(ranks_B, k) if metric == "recall" else ndcg_at(ranks_B, k)


def recall_at(ranks_B: ArrayLike, k: int) -> Floats:
    """1 where the target stands in the first k places."""
    ranks = _ranks(ranks_B)
    return (ranks <= k).astype(np.float64)


def ndcg_at(ranks_B: ArrayLike, k: int) -> Floats:
    """1 / log2(1 + rank) within the first k places; the ideal is 1 for a single target."""
    ranks = _ranks(ranks_B)
    return np.where(ranks <= k, 1.0 / np.log2(1.0 + ranks), 0.0)


def mrr(ranks_B: ArrayLike) -> Floats:
    """Reciprocal rank."""
    return 1.0 / _ranks(ranks_B)


def graded_values(name: str, grades_BN: ArrayLike) -> Floats:
    """The same metrics over graded lists: recall is the share of relevant items in the first k, mrr that of the first relevant one.

    NDCG's gain is 2^g - 1 and its ideal the best order of the same list. A list without relevance scores 0.
    """
    metric, k = _parse(name)
    grades = np.asarray(grades_BN, dtype=np.float64)
    if metric == "ndcg":
        return _ratio(_dcg(grades, k), _dcg(-np.sort(-grades, axis=1), k))
    relevant = grades > 0
    if metric == "recall":
        return _ratio(relevant[:, :k].sum(axis=1), relevant.sum(axis=1))
    return np.where(relevant.any(axis=1), 1.0 / (1.0 + relevant.argmax(axis=1)), 0.0)


def kendall_tau(order_a: Sequence[Hashable], order_b: Sequence[Hashable]) -> float:
    """Kendall's tau of two orders of the same things: 1 equal, -1 reversed; 1 for fewer than two things.

    Raises ValueError if they do not order the same distinct things.
    """
    place = {thing: i for i, thing in enumerate(order_b)}
    if len(order_a) != len(order_b) or len(place) < len(order_b) or set(order_a) != set(place):
        raise ValueError("Kendall's tau needs two orders of the same distinct things")
    if len(order_a) < 2:
        return 1.0
    ranks = np.array([place[thing] for thing in order_a])
    signs = np.sign(ranks[None, :] - ranks[:, None])[np.triu_indices(len(ranks), 1)]
    return float(signs.mean())


def bootstrap_mean(values_B: ArrayLike, n: int, seed: int, users_B: ArrayLike | None = None) -> tuple[float, float, float]:
    """(mean, low, high) of a percentile bootstrap with n resamples: of requests, or of whole users where `users_B` names each one's.

    Values that are differences of two systems on the same requests give the paired interval at 95 %. NaN for no request.
    Requests of one user are alike, so drawing them one by one would make the interval too narrow: a user is drawn with the sum and the
    count of its values, and a resample's mean is the ratio of sums. Metrics of short lists take few distinct values, so the resamples are
    drawn as counts of distinct values: the same distribution as drawing one by one, at a cost that hardly grows with B.
    """
    found = np.asarray(values_B, dtype=np.float64)
    if not len(found):
        return float("nan"), float("nan"), float("nan")
    sums: Floats = found
    sizes: Floats = np.ones(len(found))
    if users_B is not None:
        users = np.unique(np.asarray(users_B), return_inverse=True)[1]
        order = np.lexsort((found, users))  # so that equal values add up to equal sums
        sums = np.bincount(users[order], weights=found[order]).astype(np.float64)
        sizes = np.bincount(users).astype(np.float64)
    distinct, counts = np.unique(sums + 1j * sizes, return_counts=True)  # pairs, in the order of their sums
    sums, sizes = distinct.real.copy(), distinct.imag.copy()
    generator = np.random.default_rng(seed)
    share, size = counts / counts.sum(), max(1, 4_000_000 // len(distinct))  # draws at once: bounded memory for continuous values
    drawn = (generator.multinomial(counts.sum(), share, size=min(size, n - start)) for start in range(0, n, size))
    means = np.concatenate([some @ sums / (some @ sizes) for some in drawn])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(found.mean()), float(low), float(high)


def _parse(name: str) -> tuple[str, int]:
    metric, _, k = name.partition("@")
    if (metric in ("recall", "ndcg") and k.isdecimal() and int(k) > 0) or name == "mrr":
        return metric, int(k or 0)
    raise ValueError(f"no metric {name!r}; there are recall@k, ndcg@k and mrr")


def _ranks(ranks_B: ArrayLike) -> Floats:
    """Misses at an infinite rank."""
    ranks = np.asarray(ranks_B, dtype=np.float64)
    return np.where(np.isnan(ranks) | (ranks < 1), np.inf, ranks)


def _dcg(grades_BN: Floats, k: int) -> Floats:
    top = grades_BN[:, :k]
    return (np.exp2(top) - 1.0) @ (1.0 / np.log2(np.arange(2, top.shape[1] + 2)))


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> Floats:
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
