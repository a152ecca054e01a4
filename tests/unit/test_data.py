"""Packing loses nothing and mixes nothing; the loader resumes anywhere, over any number of ranks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2.errors import ConfigError, InputError
from training.data import Example, Loader, batches, pack, to_batch

pytestmark = pytest.mark.unit


def make(lengths: list[tuple[int, int, int]]) -> list[Example]:
    """Examples of (prompt, first segment, second segment) tokens; a token's id says where it comes from."""
    made = []
    for i, (prompt, first, second) in enumerate(lengths):
        ids = [1000 * i + k for k in range(prompt + first + second)]
        segments = [(ids[prompt : prompt + first], 0.25), (ids[prompt + first :], 1.0)]
        made.append(Example(ids[:prompt], segments, {"advantage": [float(t) for t in ids[prompt:]]}))
    return made


part = st.integers(0, 12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(part, part, st.integers(1, 12)), min_size=1, max_size=40), st.integers(36, 64), st.integers(0, 3))
def test_every_token_is_packed_once_with_its_own_weight_and_position(lengths: list[tuple[int, int, int]], size: int, seed: int) -> None:
    examples = make(lengths)
    rows = pack(examples, size, seed)
    for i, example in enumerate(examples):
        where = rows.segment_ids == i
        assert len(set(np.nonzero(where)[0])) == 1  # one row
        whole = [*example.prompt_ids, *example.segments[0][0], *example.segments[1][0]]
        assert rows.input_ids[where].tolist() == whole
        assert rows.position_ids[where].tolist() == list(range(example.tokens))
        prompt, first, second = lengths[i]
        assert rows.weights[where].tolist() == [0.0] * prompt + [0.25] * first + [1.0] * second
        assert rows.extra["advantage"][where].tolist() == [0.0] * prompt + whole[prompt:]
    assert rows.tokens == sum(example.tokens for example in examples)
    assert (rows.weights[rows.segment_ids < 0] == 0).all()
    again = pack(examples, size, seed)
    assert (again.input_ids == rows.input_ids).all()


def test_mask_is_causal_and_never_crosses_examples() -> None:
    rows = pack(make([(2, 1, 3), (0, 4, 4), (3, 2, 2), (1, 0, 5)]), 16)
    batch = to_batch(rows, slice(None))
    mask, segments, positions = batch.mask_B1TT()[:, 0].numpy(), rows.segment_ids, rows.position_ids
    for b, q, k in itertools.product(range(len(rows)), range(16), range(16)):
        same = segments[b, q] == segments[b, k]
        inside = same and (segments[b, q] < 0 or positions[b, k] <= positions[b, q])
        assert mask[b, q, k] == (inside and k <= q)
    assert mask.any(axis=2).all()  # no token without anything to look at: its softmax would not be a number


def test_first_token_of_an_example_is_never_learned() -> None:
    batch = to_batch(pack(make([(0, 3, 2), (0, 2, 2)]), 9), slice(None))
    assert int(batch.learned_BT.sum()) == 4 + 3
    assert batch.norm == pytest.approx(2 * 0.25 + 2 + 0.25 + 2)


def test_packing_is_dense() -> None:
    rng = np.random.default_rng(0)
    rows = pack(make([(int(p), int(q), 1) for p, q in rng.integers(1, 60, size=(3000, 2))]), 512)
    assert rows.fill > 0.98


def test_long_examples_are_named_or_counted() -> None:
    examples = make([(3, 3, 3), (10, 10, 1), (2, 2, 2)])
    with pytest.raises(InputError, match="example 1 has 21 tokens"):
        pack(examples, 16)
    rows = pack(examples, 16, drop_long=True)
    assert rows.dropped == 1
    assert set(rows.segment_ids.reshape(-1)) == {-1, 0, 2}
    with pytest.raises(InputError, match="no example"):
        pack(examples[1:2], 16, drop_long=True)
    with pytest.raises(InputError, match="advantage"):
        pack([Example([1], [([2, 3], 1.0)], {"advantage": [1.0]})], 16)


def seen(loader: Loader, count: int) -> list[list[int]]:
    return [batch.input_ids_BT[:, 0].tolist() for batch in itertools.islice(loader, count)]


def test_loader_gives_each_row_once_an_epoch_in_another_order() -> None:
    rows = pack(make([(4, 4, 4)] * 30), 12)
    loader = batches(rows, 12 * 5, seed=1)
    assert (loader.steps(2.0), loader.steps(2.0, accumulation=3)) == (12, 4)
    first, second = seen(loader, 6), seen(loader, 6)
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == sorted(rows.input_ids[:, 0].tolist())
    assert first != second
    assert seen(batches(rows, 12 * 5, seed=2), 6) != first


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(1, 7))
def test_loader_resumes_at_the_exact_batch(stop: int, rows_per_batch: int) -> None:
    rows = pack(make([(4, 4, 4)] * 11), 12)
    whole = seen(Loader(rows, rows_per_batch, 5), stop + 6)
    first = Loader(rows, rows_per_batch, 5)
    seen(first, stop)
    resumed = Loader(rows, rows_per_batch, 5)
    resumed.load_state_dict(first.state_dict())
    assert seen(resumed, 6) == whole[stop:]


def test_ranks_share_the_batches_of_one_process() -> None:
    rows = pack(make([(4, 4, 4)] * 10), 12)
    whole = seen(Loader(rows, 4, 5), 7)
    ranks = [seen(Loader(rows, 4, 5, rank, 2), 7) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in whole]
    with pytest.raises(ConfigError, match="shared by 3"):
        Loader(rows, 4, 5, 0, 3)
    with pytest.raises(InputError, match="other training rows"):
        Loader(rows, 4, 6).load_state_dict(Loader(rows, 4, 5).state_dict())
