"""Probabilities by counting, against the definition in plain loops."""

import numpy as np
import pytest

from scoring.followers import LOOKBACK, UNSEEN, Followers

ITEMS = 7
PAIRS = {(0, 1): 3, (0, 2): 1, (1, 2): 2, (2, 0): 5, (3, 4): 4}


@pytest.fixture
def followers() -> Followers:
    earlier_P, later_P = np.array(list(PAIRS)).T
    return Followers(ITEMS, earlier_P, later_P, np.array(list(PAIRS.values())), back=0.5, decay=0.25)


def by_hand(history: list[int], exclude: list[int]) -> list[float]:
    def both(a: int, b: int) -> float:
        return PAIRS.get((a, b), 0) + 0.5 * PAIRS.get((b, a), 0)

    latest = history[::-1][:LOOKBACK]
    votes = [0.25**step for step in range(len(latest))]
    found = [0.0] * ITEMS
    for vote, item in zip(votes, latest, strict=True):
        total = sum(both(item, other) for other in range(ITEMS)) + UNSEEN
        for other in set(range(ITEMS)) - set(exclude):
            found[other] += vote / sum(votes) * both(item, other) / total
    return found


def test_equals_the_definition(followers: Followers) -> None:
    histories = [[0], [3, 0, 1], [6], [], [2, 5, 5, 5, 5, 5, 5, 5, 5, 1]]  # the last one: 2 lies too far back to vote
    exclude = [[], [0, 1, 3], [6], [], [1, 2]]
    found_BN = followers.after(histories, exclude).toarray()
    np.testing.assert_allclose(found_BN, [by_hand(h, e) for h, e in zip(histories, exclude, strict=True)], atol=1e-12)
    assert (found_BN.sum(axis=1) <= 1).all()
    assert found_BN[3].sum() == 0 == found_BN[2].sum(), "who has no history, or one that nothing followed, leaves all to the network"


def test_an_item_seen_often_is_trusted_more(followers: Followers) -> None:
    """Counts are shrunk: the rarer the item, the more is left to the network."""
    sums = followers.after([[2], [4]], [[], []]).sum(axis=1)
    assert sums[0] > sums[1]
