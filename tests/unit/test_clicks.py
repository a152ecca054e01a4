"""The position-based model finds how often slots are looked at, also where better items stand higher; its weights undo the bias."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr2.clicks import examination, inverse_weights, weighted_grade

LOOKED = np.array([1.0, 0.7, 0.5, 0.3])


def log(seed: int, confounded: bool, requests: int = 60_000) -> tuple[np.ndarray, np.ndarray]:
    """Counts by slot and group of a policy that puts what it likes higher, if `confounded`."""
    rng = np.random.default_rng(seed)
    liked_G = np.array([0.02, 0.1, 0.3, 0.6])
    share_KG = np.array([[1, 2, 3, 6], [2, 3, 3, 4], [4, 3, 3, 2], [6, 3, 2, 1]]) if confounded else np.full((4, 4), 3)
    shown_KG = requests * share_KG / share_KG.sum(axis=1, keepdims=True)
    return shown_KG.round(), rng.binomial(shown_KG.round().astype(int), LOOKED[:, None] * liked_G)


@pytest.mark.parametrize("confounded", [False, True])
def test_examination_is_found(confounded: bool) -> None:
    shown_KG, clicked_KG = log(1, confounded)
    np.testing.assert_allclose(examination(shown_KG, clicked_KG), LOOKED, atol=0.03)


def test_without_groups_the_policys_taste_is_taken_for_the_slot() -> None:
    shown_KG, clicked_KG = log(1, True)
    naive_K = examination(shown_KG.sum(axis=1, keepdims=True), clicked_KG.sum(axis=1, keepdims=True))
    assert naive_K[3] < LOOKED[3] - 0.1, "what stands low is liked less, and that is not the slot's fault"


def test_empty_slots_and_groups_say_nothing() -> None:
    shown_KG, clicked_KG = (np.pad(a, ((0, 1), (0, 1))) for a in log(2, True))
    found_K = examination(shown_KG, clicked_KG)
    np.testing.assert_allclose(found_K[:4], LOOKED, atol=0.03)
    assert found_K[4] == 1.0
    assert examination(np.zeros((2, 1)), np.zeros((2, 1))).tolist() == [1.0, 1.0]


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="within those of impressions"):
        examination([[1.0]], [[2.0]])
    with pytest.raises(ValueError, match="slot and group"):
        examination([1.0], [1.0])


def test_inverse_weights_undo_the_bias_up_to_their_cap() -> None:
    np.testing.assert_allclose(LOOKED * inverse_weights(LOOKED, 10.0), 1.0)
    assert inverse_weights([1.0, 0.05, 0.0], 4.0).tolist() == [1.0, 4.0, 4.0]


@given(st.integers(0, 4), st.floats(1.0, 20.0))
def test_a_weighted_grade_has_the_weighted_gain(grade: int, weight: float) -> None:
    assert 2 ** weighted_grade(grade, weight) - 1 == pytest.approx(weight * (2**grade - 1))
    assert weighted_grade(grade, 1.0) == grade
    assert math.isfinite(weighted_grade(grade, weight))
