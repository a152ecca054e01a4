"""p(item | history) by counting: what followed a user's latest items in the interactions of the fit. An n-gram model beside the neural one.

    followers = Followers(len(items), earlier_P, later_P, counts_P, back=0.3, decay=0.5)
    probs_BN = followers.after(histories, exclude)

A small network smooths over items; a table of counts remembers single pairs. Their mixture is the oldest interpolation of language models
(Jelinek and Mercer, 1980), and again that of kNN-LM (Khandelwal et al., 2020, arXiv 1911.00172); `scoring.beams` searches it exactly.

Shapes: B histories, N items, P pairs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOOKBACK = 8  # latest items of a history that vote
UNSEEN = 3.0  # count that every item keeps for what never followed it: a row of few counts sums to little


class Followers:
    """Counts of directed pairs as rows of probabilities. `back`: what a pair counts the other way round. `decay`: of each step back."""

    def __init__(
        self,
        items: int,
        earlier_P: NDArray[np.int64],
        later_P: NDArray[np.int64],
        counts_P: NDArray[np.floating],
        back: float,
        decay: float,
    ) -> None:
        from scipy import sparse

        pairs_NN = sparse.csr_array((np.asarray(counts_P, dtype=np.float64), (earlier_P, later_P)), shape=(items, items))
        both_NN = (pairs_NN + back * pairs_NN.T).tocsr()
        self.rows_NN = (sparse.diags_array(1 / (both_NN.sum(axis=1) + UNSEEN)) @ both_NN).tocsr()
        self.decay = decay

    def after(self, histories: Sequence[Sequence[int]], exclude: Sequence[Sequence[int]]) -> Any:
        """(B, N) sparse rows: the mean over a history's latest items, each `decay` times its successor, nothing where excluded.

        A row sums to at most 1. `histories`: rows of items, oldest first.
        """
        from scipy import sparse

        shape = (len(histories), self.rows_NN.shape[0])
        latest = [list(reversed(history[-LOOKBACK:])) for history in histories]
        votes: list[NDArray[np.floating]] = [self.decay ** np.arange(len(items)) for items in latest]
        votes_BN = _rows([vote / vote.sum() if len(vote) else vote for vote in votes], latest, shape)
        probs_BN = votes_BN @ self.rows_NN
        gone_BN = _rows([np.ones(len(items)) for items in exclude], exclude, shape)
        kept_BN = sparse.csr_array(probs_BN - probs_BN.multiply(gone_BN > 0))
        kept_BN.eliminate_zeros()
        return kept_BN


def _rows(values: Sequence[NDArray[np.floating]], columns: Sequence[Sequence[int]], shape: tuple[int, int]) -> Any:
    from scipy import sparse

    starts = np.cumsum([0, *map(len, columns)])
    flat = np.fromiter((column for row in columns for column in row), dtype=np.int64, count=int(starts[-1]))
    return sparse.csr_array((np.concatenate([*values, np.zeros(0)]), flat, starts), shape=shape)
