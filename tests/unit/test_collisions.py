"""Separation gives a bijection, adds the least error, and never touches codes that are given out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2.config import Tokenizer
from gr2.errors import AuditError, ModelError
from training import collisions
from training.codebooks import quantise
from training.collisions import separate, suffix_sums
from validation import sid_health

pytestmark = pytest.mark.unit

MODES = ("nearest_free", "random", "random_last_levels")


def world(items: int, levels: int, codes: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codebooks, points (few distinct ones when spread is small) and their learned codes."""
    rng = np.random.default_rng(seed)
    books = (rng.normal(size=(levels, codes, 3)) / 2 ** np.arange(levels)[:, None, None]).astype(np.float32)
    z = (rng.normal(size=(items, 3)) * spread).astype(np.float32)
    return books, z, quantise(z, books)


def config(mode: str, **more: int) -> Tokenizer:
    return Tokenizer(collisions=mode, **more)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10**6), st.sampled_from(MODES), st.sampled_from([0.01, 0.3, 1.0]))
def test_codes_become_a_bijection_and_only_suffixes_change(items: int, seed: int, mode: str, spread: float) -> None:
    books, z, learned = world(items, 3, 4, seed, spread)  # 64 places for up to 60 items: prefixes fill up
    codes = separate(learned, z, books, config(mode, random_levels=3), seed)
    assert len(np.unique(codes, axis=0)) == items
    assert codes.min() >= 0
    assert codes.max() < 4
    assert np.array_equal(codes, separate(learned, z, books, config(mode, random_levels=3), seed))
    if mode != "random_last_levels":  # each learned code that anyone had still names one of those who had it
        for row in np.unique(learned, axis=0):
            group = (learned == row).all(axis=1)
            assert (codes[group] == row).all(axis=1).sum() == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 25), st.integers(1, 25), st.integers(0, 10**6), st.sampled_from(MODES))
def test_inserts_change_no_old_code(before: int, added: int, seed: int, mode: str) -> None:
    books, z, learned = world(before + added, 3, 4, seed, 0.2)
    old = separate(learned[:before], z[:before], books, config(mode, random_levels=3), seed)
    kept = old.copy()
    new = separate(learned[before:], z[before:], books, config(mode, random_levels=3), seed, taken_ML=old)
    assert np.array_equal(old, kept)
    assert len(np.unique(np.concatenate([old, new]), axis=0)) == before + added


def test_nearest_free_takes_the_least_added_error() -> None:
    books, z, learned = world(2, 2, 8, 5, 0.0)
    z[1] += 0.01  # both on one code; the first fits worse or better, the other moves to the next nearest last-level code
    learned = quantise(z, books)
    assert np.array_equal(learned[0], learned[1])
    codes = separate(learned, z, books, config("nearest_free"), 0)
    error = ((z - books[[0, 1], learned].sum(axis=1)) ** 2).sum(axis=1)
    mover = int(error.argmax())
    rest = z[mover] - books[0, learned[mover, 0]]
    order = np.argsort(((rest - books[1]) ** 2).sum(axis=1))
    assert order[0] == learned[mover, 1]
    assert codes[mover].tolist() == [learned[mover, 0], order[1]]
    assert np.array_equal(codes[1 - mover], learned[1 - mover])


def test_many_look_alikes_are_looked_through_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    books, z, learned = world(60, 3, 4, 1, 0.05)
    codes = separate(learned, z, books, config("nearest_free"), 0)
    monkeypatch.setattr(collisions, "BLOCK", 2)
    assert np.array_equal(codes, separate(learned, z, books, config("nearest_free"), 0))


def test_full_prefix_moves_on_to_the_last_two_levels() -> None:
    books, z, learned = world(6, 3, 4, 1, 0.0)  # six equal points, four places under their prefix
    codes = separate(learned, z, books, config("nearest_free"), 0)
    same = (codes[:, :2] == learned[0, :2]).all(axis=1)
    assert same.sum() == 4
    assert (codes[:, 0] == learned[0, 0]).all()
    pairs = suffix_sums(books[1:]).reshape(4, 4, 3)
    cost = ((z[0] - books[0, learned[0, 0]] - pairs) ** 2).sum(axis=2)
    cost[learned[0, 1]] = np.inf  # that prefix is full
    best = {tuple(int(v) for v in np.unravel_index(i, (4, 4))) for i in np.argsort(cost.ravel())[:2]}
    assert {tuple(row[1:].tolist()) for row in codes[~same]} == best


def test_full_tree_is_an_error_that_says_what_to_do() -> None:
    books, z, learned = world(17, 2, 4, 1)
    with pytest.raises(ModelError, match="1 items find no free code"):
        separate(learned, z, books, config("nearest_free"), 0)
    with pytest.raises(ModelError, match=r"raise tokenizer\.random_levels"):
        separate(learned * 0, z, books, config("random_last_levels", random_levels=1), 0)


def test_many_items_are_told_apart() -> None:
    books, z, learned = world(12_000, 4, 64, 3, 0.4)
    assert sid_health.uniqueness(learned)[0] < 0.98
    codes = separate(learned, z, books, config("nearest_free"), 0)
    assert sid_health.uniqueness(codes) == (1.0, 1.0)


def test_health_figures_by_hand() -> None:
    learned = np.array([[0, 1], [0, 1], [0, 2], [3, 1]])
    codes = np.array([[0, 1], [0, 0], [0, 2], [3, 1]])
    found = sid_health.figures(learned, codes, np.array([0.1, 0.2, 0.3, 0.0]), 4)
    assert found["learned distinct/items"] == 0.75
    assert found["learned share alone"] == 0.5
    assert found["published distinct/items"] == found["published share alone"] == 1.0
    assert found["separated share"] == 0.25
    assert found["mean residual"] == pytest.approx(0.15)
    assert found["level 0 use"] == 0.5
    assert found["level 0 entropy"] == pytest.approx(0.75 * np.log2(4 / 3) + 0.25 * 2)
    assert found["level 1 perplexity"] == pytest.approx(2 ** found["level 1 entropy"])


def test_agreement_is_a_lift_over_chance() -> None:
    learned = np.array([[0, 0, 1], [0, 0, 2], [0, 1, 0], [1, 0, 0]])
    found = sid_health.agreement(learned, np.array([[0, 1], [1, 2], [0, 3]]))
    assert found["pairs sharing 1 code lift"] == pytest.approx((2 / 3) / (9 / 16 + 1 / 16))
    assert found["pairs sharing 2 codes lift"] == pytest.approx((1 / 3) / (4 / 16 + 2 / 16))
    assert sid_health.agreement(learned, np.empty((0, 2), dtype=int)) == {}


def test_gate_names_the_figure_and_a_remedy() -> None:
    learned = np.array([[0, 1], [0, 1], [0, 2]])
    rows = sid_health.audits(sid_health.figures(learned, learned, np.zeros(3), 4), 0.9)
    assert {r["subject"] for r in rows if not r["passed"]} == {
        "learned distinct/items",
        "published distinct/items",
        "published share alone",
    }
    with pytest.raises(AuditError, match=r"learned distinct/items is 0\.6667, at least 0\.9000 is asked.*tokenizer\.dim"):
        sid_health.gate(rows, "rqvae")
    sid_health.gate(sid_health.audits(sid_health.figures(learned[1:], learned[1:], np.zeros(2), 4), 0.9), "rqvae")
