"""Metrics against by-hand figures, ir-measures and ranx; intervals against theory and against the resampling of requests."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2 import metrics

pytestmark = pytest.mark.unit
RANKS = np.array([1, 2, 3, 4, 10, 11, 0, np.nan])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("recall@1", [1, 0, 0, 0, 0, 0, 0, 0]),
        ("recall@3", [1, 1, 1, 0, 0, 0, 0, 0]),
        ("recall@10", [1, 1, 1, 1, 1, 0, 0, 0]),
        ("ndcg@3", [1, 1 / math.log2(3), 0.5, 0, 0, 0, 0, 0]),
        ("mrr", [1, 1 / 2, 1 / 3, 1 / 4, 1 / 10, 1 / 11, 0, 0]),
    ],
)
def test_by_hand(name: str, expected: list[float]) -> None:
    np.testing.assert_allclose(metrics.values(name, RANKS), expected)


@pytest.mark.parametrize("name", ["recall", "recall@", "recall@0", "ndcg@-1", "mrr@5", "precision@3", "recall@1.5"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no metric"):
        metrics.values(name, RANKS)
    with pytest.raises(ValueError, match="no metric"):
        metrics.graded_values(name, [[1]])


@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.sampled_from(metrics.NAMES))
def test_a_single_target_is_a_graded_list_with_one_relevant_item(ranks: list[int], name: str) -> None:
    grades = np.array([[int(place == rank) for place in range(1, 13)] for rank in ranks])
    np.testing.assert_allclose(metrics.values(name, ranks), metrics.graded_values(name, grades))


def lists(seed: int, count: int = 200, length: int = 12) -> np.ndarray:
    """Graded lists, some without relevance."""
    generator = np.random.default_rng(seed)
    return generator.choice(4, p=[0.8, 0.1, 0.06, 0.04], size=(count, length))


def judgements(grades_BN: np.ndarray) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    qrels = {f"q{i:03}": {f"d{j}": int(g) for j, g in enumerate(row)} for i, row in enumerate(grades_BN)}
    run = {f"q{i:03}": {f"d{j}": float(-j) for j in range(grades_BN.shape[1])} for i in range(len(grades_BN))}
    return qrels, run


def test_equal_to_ir_measures() -> None:
    """NDCG with gains 2^g - 1 given to it as judgements, since its own gain is linear."""
    import ir_measures
    from ir_measures import RR, R, nDCG

    grades = lists(1)
    qrels, run = judgements(grades)
    exponential = {q: {d: 2**g - 1 for d, g in row.items()} for q, row in qrels.items()}
    for measure, name, judged in [
        *((R @ k, f"recall@{k}", qrels) for k in (1, 3, 5, 10)),
        *((nDCG @ k, f"ndcg@{k}", exponential) for k in (3, 5, 10)),
        (RR, "mrr", qrels),
    ]:
        theirs = {m.query_id: m.value for m in ir_measures.iter_calc([measure], judged, run)}
        ours = metrics.graded_values(name, grades)
        relevant = (grades > 0).any(axis=1)
        np.testing.assert_allclose(
            ours[relevant], np.array([theirs[f"q{i:03}"] for i in np.flatnonzero(relevant)]), atol=1e-6, err_msg=name
        )
        assert not ours[~relevant].any()


def test_equal_to_ranx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # compiling takes ranx 50 s, computing this takes it none
    import ranx

    grades = lists(2)
    grades = grades[(grades > 0).any(axis=1)]
    qrels, run = judgements(grades)
    judged = ranx.Qrels({q: {d: g for d, g in row.items() if g} for q, row in qrels.items()})
    names = {"recall@1": "recall@1", "recall@5": "recall@5", "ndcg_burges@3": "ndcg@3", "ndcg_burges@10": "ndcg@10", "mrr": "mrr"}
    found = ranx.evaluate(judged, ranx.Run(run), list(names), return_mean=False)
    for theirs, ours in names.items():
        np.testing.assert_allclose(found[theirs], metrics.graded_values(ours, grades), atol=1e-9, err_msg=ours)


@given(st.integers(1, 8).flatmap(lambda n: st.permutations(range(n))), st.data())
def test_kendall_tau(order: list[int], data: st.DataObject) -> None:
    from scipy.stats import kendalltau

    other = data.draw(st.permutations(order))
    tau = metrics.kendall_tau(order, other)
    assert metrics.kendall_tau(other, order) == pytest.approx(tau)
    assert metrics.kendall_tau(order, order) == 1.0
    if len(order) > 1:
        places = [[o.index(thing) for thing in order] for o in (order, other)]
        assert tau == pytest.approx(kendalltau(*places).statistic)
        assert metrics.kendall_tau(order, order[::-1]) == -1.0


@pytest.mark.parametrize(("a", "b"), [("AB", "AC"), ("AB", "ABC"), ("AA", "AA"), ("AB", "")])
def test_kendall_tau_refuses_different_things(a: str, b: str) -> None:
    with pytest.raises(ValueError, match="same distinct things"):
        metrics.kendall_tau(a, b)


def test_bootstrap_is_seeded_and_paired() -> None:
    generator = np.random.default_rng(5)
    a, noise = generator.random(500), generator.normal(0, 0.001, 500)
    diff, low, high = metrics.bootstrap_mean(a + 0.01 + noise - a, 1000, seed=1)
    assert (diff, low, high) == metrics.bootstrap_mean(a + 0.01 + noise - a, 1000, seed=1)
    assert (low, high) != metrics.bootstrap_mean(a + 0.01 + noise - a, 1000, seed=2)[1:]
    assert diff == pytest.approx(0.01 + noise.mean())
    assert 0.0098 < low < diff < high < 0.0102  # the large common variance of a does not widen it


@pytest.mark.parametrize("kind", ["few distinct values", "continuous"])
def test_interval_is_that_of_resampled_requests(kind: str) -> None:
    generator = np.random.default_rng(6)
    ranks = generator.integers(1, 30, 400)
    found = metrics.values("ndcg@10", ranks) if kind == "few distinct values" else generator.exponential(1, 400)
    mean, low, high = metrics.bootstrap_mean(found, 20_000, seed=3)
    naive = found[generator.integers(0, 400, (20_000, 400))].mean(axis=1)
    spread = found.std() / math.sqrt(400)
    assert mean == pytest.approx(found.mean())
    np.testing.assert_allclose([low, high], np.quantile(naive, [0.025, 0.975]), atol=0.1 * spread)
    np.testing.assert_allclose([low, high], [mean - 1.96 * spread, mean + 1.96 * spread], atol=0.3 * spread)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    hits = 0
    for trial in range(400):
        _, low, high = metrics.bootstrap_mean((generator.random(200) < 0.3).astype(float), 400, seed=trial)
        hits += low <= 0.3 <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_whole_users_are_drawn() -> None:
    """As a plain bootstrap of users gives it: four alike requests of a user are worth about one. One request each: as without users."""
    generator = np.random.default_rng(8)
    users = np.repeat(np.arange(150), generator.integers(1, 8, 150))
    found = (generator.random(150) < 0.4)[users] + 0.1 * generator.integers(0, 3, len(users))
    mean, low, high = metrics.bootstrap_mean(found, 20_000, seed=3, users_B=[f"u{u}" for u in users])
    sums, sizes = np.bincount(users, weights=found), np.bincount(users)
    drawn = generator.integers(0, 150, (20_000, 150))
    naive = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    assert mean == pytest.approx(found.mean())
    np.testing.assert_allclose([low, high], np.quantile(naive, [0.025, 0.975]), atol=0.1 * naive.std())
    plain = metrics.bootstrap_mean(found, 20_000, seed=3)
    assert high - low > 1.5 * (plain[2] - plain[1])
    assert metrics.bootstrap_mean(found, 500, 3, users_B=generator.permutation(len(found))) == metrics.bootstrap_mean(found, 500, 3)


def test_edges() -> None:
    assert all(math.isnan(v) for v in metrics.bootstrap_mean([], 10, 0))
    assert metrics.bootstrap_mean([0.5] * 9, 10, 0) == (0.5, 0.5, 0.5)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.integers(0, 100))
@settings(max_examples=50)
def test_interval_stays_within_the_values(found: list[float], seed: int) -> None:
    mean, low, high = metrics.bootstrap_mean(found, 50, seed)
    assert min(found) - 1e-9 <= low <= high <= max(found) + 1e-9
    assert mean == pytest.approx(np.mean(found))
