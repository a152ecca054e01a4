"""The trees on the evidence program: they learn what a sum cannot say, give probabilities, and keep a user's own lists out."""

import json

import numpy as np
import pytest
from test_evidence_engine import COLUMNS, lists, view_of

from scoring.boosted import Boosted, boost, listwise
from scoring.evidence_engine import FOLDS, fit, fold_of

pytestmark = pytest.mark.unit
World = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def crossed(count: int, seed: int) -> World:
    """Lists whose target has a transition or a likeness to the last item, but not both. (raw, there, grades, folds)"""
    raw_RNC, there_RN, _, _ = lists(count, seed)
    rng = np.random.default_rng(seed)
    one, other = (rng.integers(0, 2, there_RN.shape) for _ in range(2))
    raw_RNC[:, :, COLUMNS.index("pair_next")], raw_RNC[:, :, COLUMNS.index("text_similarity")] = 3.0 * one, 0.9 * other
    score_RN = 3.0 * (one ^ other) + rng.gumbel(size=there_RN.shape)
    return raw_RNC, there_RN, (score_RN == score_RN.max(axis=1, keepdims=True)).astype(float), np.arange(count) % FOLDS


def fitted(world: World, rounds: int = 60) -> Boosted:
    """Weights and trees."""
    return boost(fit(*world), *world, seed=1, rounds=rounds)


def likelihood(logp_RN: np.ndarray, world: World) -> float:
    """Mean log-probability of the targets."""
    return float(logp_RN[world[2] > 0].mean())


def test_trees_learn_what_the_sum_of_features_cannot_say() -> None:
    world, new = crossed(500, seed=1), crossed(300, seed=2)
    judge = fitted(world)
    scores_RN = judge.program.standard(*new[:2]) @ judge.program.weights_KF[0]
    sum_alone = likelihood(scores_RN - np.logaddexp.reduce(scores_RN, axis=1, keepdims=True), new)
    assert sum_alone < -2.1, "the logit alone should know little more than chance (-2.3)"
    with_trees = judge.judged(new[0], new[1], np.zeros(300, dtype=int))
    assert likelihood(with_trees, new) > sum_alone + 0.08
    np.testing.assert_allclose(np.exp(with_trees).sum(axis=1), 1.0)


def test_a_users_own_lists_teach_nothing_that_judges_them() -> None:
    world = crossed(200, seed=3)
    mine = world[3] == 2
    poisoned = world[2].copy()
    poisoned[mine] = np.roll(poisoned[mine], 3, axis=1)
    one, other = fitted(world, rounds=10), fitted((world[0], world[1], poisoned, world[3]), rounds=10)
    for fold, same in ((2, True), (0, False)):
        folds = np.full(200, fold)
        assert np.array_equal(one.judged(*world[:2], folds), other.judged(*world[:2], folds)) is same
    np.testing.assert_array_equal(fitted(world, rounds=10).judged(*world[:2], world[3]), one.judged(*world[:2], world[3]))


def test_what_json_keeps_judges_to_the_last_digit_as_what_was_fitted() -> None:
    world, new = crossed(200, seed=3), crossed(50, seed=5)
    judge = fitted(world, rounds=10)
    again = Boosted.told(json.loads(json.dumps(judge.texts())))
    for folds in (new[3], None):
        np.testing.assert_array_equal(again.judged(*new[:2], folds), judge.judged(*new[:2], folds))


def test_of_lists_that_taught_nobody_every_fold_has_a_say() -> None:
    world, new = crossed(200, seed=3), crossed(50, seed=5)
    judge = fitted(world, rounds=10)
    each = [judge.judged(*new[:2], np.full(50, fold)) for fold in range(FOLDS)]
    assert not np.allclose(each[0], each[1])
    mean_RN = np.mean(each, axis=0)
    np.testing.assert_allclose(judge.judged(*new[:2]), mean_RN - np.logaddexp.reduce(mean_RN, axis=1, keepdims=True), atol=1e-12)


def test_half_a_dozen_lists_are_enough_to_go_on_with() -> None:
    world = crossed(6, seed=3)
    assert np.isfinite(fitted(world).judged(*world[:2], world[3])).all()


def test_lists_of_any_length_are_judged_together_as_alone() -> None:
    world = crossed(120, seed=4)
    judge = fitted(world, rounds=10)
    shown = [view_of(raw_NC[:size], f"r{n}").candidates for n, (raw_NC, size) in enumerate(zip(world[0], (10, 3, 1, 7, 10), strict=False))]
    users = [f"u{n}" for n in range(len(shown))]
    assert len({fold_of(user) for user in users}) > 1
    together = judge.log_probabilities(shown, users)
    assert [len(logp_N) for logp_N in together] == [10, 3, 1, 7, 10]
    for candidates, user, logp_N in zip(shown, users, together, strict=True):
        np.testing.assert_allclose(logp_N, judge.log_probabilities([candidates], [user])[0], atol=1e-12)
    assert judge.log_probabilities([], []) == []


def test_slope_and_curvature_are_those_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    sizes_R, step = np.array([4, 1, 6]), 1e-4
    share_M, scores_M = rng.uniform(size=11), rng.normal(size=11)

    def loss(scores: np.ndarray) -> float:
        parts = zip(np.split(scores, [4, 5]), np.split(share_M, [4, 5]), strict=True)
        return -sum(float(share @ (s - np.logaddexp.reduce(s))) for s, share in parts)

    slope_M, curve_M = listwise(share_M, sizes_R)(scores_M, None)
    for n in range(11):
        moved = [scores_M + side * step * (np.arange(11) == n) for side in (-1, 0, 1)]
        below, here, above = (loss(m) for m in moved)
        assert slope_M[n] == pytest.approx((above - below) / (2 * step), abs=1e-5)
        assert curve_M[n] == pytest.approx(max((above - 2 * here + below) / step**2, 1e-3), abs=1e-4)
