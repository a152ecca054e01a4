"""Codes, tokens and the trie against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gr2 import sids

pytestmark = pytest.mark.unit

CODES = st.lists(st.integers(0, 100_000), min_size=1, max_size=sids.MAX_LEVELS)


@st.composite
def code_tables(draw: st.DrawFn) -> np.ndarray:
    """Distinct rows of codes, in any order, from so few codes that prefixes are shared."""
    levels, codes = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rows = draw(hnp.arrays(np.int64, (draw(st.integers(1, 40)), levels), elements=st.integers(0, codes - 1)))
    order = draw(st.randoms(use_true_random=False))
    unique = [list(r) for r in {tuple(row) for row in rows.tolist()}]
    order.shuffle(unique)
    return np.array(unique)


@given(CODES, CODES)
def test_different_codes_have_different_text(one: list[int], other: list[int]) -> None:
    assert (sids.to_text(one) == sids.to_text(other)) == (one == other)


def test_written_form() -> None:
    assert sids.to_text([12, 240, 7, 3]) == "<a_12><b_240><c_7><d_3>"
    tokens = sids.sid_tokens(3, 5)
    assert len(set(tokens)) == 15
    assert tokens[2 * 5 + 4] == sids.token(2, 4) == "<c_4>"


@pytest.mark.parametrize("codes", [[], [-1], [0] * 11])
def test_to_text_refuses(codes: list[int]) -> None:
    with pytest.raises(ValueError, match="code"):
        sids.to_text(codes)


@given(code_tables())
def test_trie_equals_brute_force(codes_NL: np.ndarray) -> None:
    trie = sids.Trie.build(codes_NL)
    levels, width = codes_NL.shape[1], int(codes_NL.max()) + 1
    prefixes = [sorted({tuple(row[:d]) for row in codes_NL.tolist()}) for d in range(levels + 1)]
    for depth in range(levels):
        nodes = np.arange(len(prefixes[depth]))[::-1]  # any order of nodes
        rows, codes, children = trie.children(depth, nodes)
        found = [(prefixes[depth][nodes[r]], c, prefixes[depth + 1][k]) for r, c, k in zip(rows, codes, children, strict=True)]
        expected = [(prefixes[depth][n], p[-1], p) for n in nodes for p in prefixes[depth + 1] if p[:-1] == prefixes[depth][n]]
        assert found == expected
        pairs_n, pairs_c = (a.ravel() for a in np.meshgrid(nodes, np.arange(width + 2), indexing="ij"))
        for node, code, child in zip(pairs_n, pairs_c, trie.child(depth, pairs_n, pairs_c), strict=True):
            path = (*prefixes[depth][node], int(code))
            assert child == (prefixes[depth + 1].index(path) if path in prefixes[depth + 1] else -1)


@given(code_tables())
def test_lookup_finds_each_item_and_nothing_else(codes_NL: np.ndarray) -> None:
    trie = sids.Trie.build(codes_NL)
    assert trie.lookup(codes_NL).tolist() == list(range(len(codes_NL)))
    shape = (int(codes_NL.max()) + 2,) * codes_NL.shape[1]
    every = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=1)
    assert (trie.lookup(every) >= 0).sum() == len(codes_NL)
    assert trie.lookup(np.full((1, codes_NL.shape[1]), -1)).tolist() == [-1]


def test_trie_refuses_shared_codes_and_bad_shapes() -> None:
    with pytest.raises(ValueError, match="1 items share all codes"):
        sids.Trie.build(np.array([[1, 2], [0, 1], [1, 2]]))
    with pytest.raises(ValueError, match="items by levels"):
        sids.Trie.build(np.zeros((0, 4), dtype=int))
    with pytest.raises(ValueError, match="start at 0"):
        sids.Trie.build(np.array([[0, -1]]))
