"""RQ-KMeans against plain k-means on residuals, and what both builders' codebooks promise."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2.config import Tokenizer
from gr2.errors import ConfigError, ModelError
from training import rqkmeans
from training.codebooks import Codebooks, codes_in_use, principal_axes, quantise

pytestmark = pytest.mark.unit


def blobs(items: int, width: int, seed: int) -> np.ndarray:
    """Clustered unit vectors."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, width))
    vectors = centres[rng.integers(12, size=items)] + 0.4 * rng.normal(size=(items, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_error_equals_plain_residual_kmeans() -> None:
    x = blobs(1500, 12, 0)
    books = rqkmeans.residual_kmeans(x, 3, 16, seed=1)
    left = x - books[np.arange(3), quantise(x, books)].sum(axis=1)
    plain = x.copy()
    for level in range(3):
        means = faiss.Kmeans(12, 16, niter=25, seed=9 + level)
        means.train(plain)
        plain -= means.centroids[means.index.search(plain, 1)[1][:, 0]]
    ours, theirs = (left**2).sum(), (plain**2).sum()
    assert ours == pytest.approx(theirs, rel=0.05)
    assert ours < 0.5 * (x**2).sum()


def test_neither_threads_nor_the_rest_of_a_large_catalogue_change_what_is_fitted() -> None:
    x, threads = blobs(6000, 48, 2), faiss.omp_get_max_threads()
    made = []
    for count in (1, 2, 3):
        faiss.omp_set_num_threads(count)
        made.append(rqkmeans.residual_kmeans(x, 2, 16, seed=1))  # 6,000 rows for 16 codes: a sample of 4,096 is fitted
    faiss.omp_set_num_threads(threads)
    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[0], made[2])


def test_codes_equal_faiss_residual_quantiser_for_equal_codebooks() -> None:
    x = blobs(400, 8, 1)
    books = rqkmeans.residual_kmeans(x, 3, 16, seed=1)
    reference = faiss.ResidualQuantizer(8, 3, 4)  # 3 levels of 4 bits
    reference.max_beam_size = 1
    reference.is_trained = True
    faiss.copy_array_to_vector(books.reshape(-1), reference.codebooks)
    packed = reference.compute_codes(x)
    unpacked = np.unpackbits(packed, axis=1, bitorder="little")[:, :12].reshape(len(x), 3, 4) @ (1 << np.arange(4))
    assert np.array_equal(quantise(x, books), unpacked)


def test_fit_is_deterministic_and_each_level_lowers_the_error() -> None:
    x, rows = blobs(800, 20, 2), []
    settings_ = Tokenizer(builder="rqkmeans", levels=3, codes=32, dim=8)
    one, other = rqkmeans.fit(x, settings_, 7, rows.append), rqkmeans.fit(x, settings_, 7)
    assert np.array_equal(one.books_LKD, other.books_LKD)
    assert one.books_LKD.shape == (3, 32, 8)
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    codes, residual = one.encode(x)
    assert losses[-1] == pytest.approx(float(((one.latent(x) - one.quantised(codes)) ** 2).sum(axis=1).mean()), rel=1e-4)
    assert 0 < residual.mean() < 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]))
def test_all_principal_axes_lose_nothing(seed: int, power: float) -> None:
    x = np.random.default_rng(seed).normal(size=(40, 5)).astype(np.float32)
    encoder, decoder = principal_axes(x, 5, power)
    books = Codebooks("rqkmeans", np.zeros((1, 1, 5), np.float32), encoder, decoder)
    z = books.latent(x)
    assert np.allclose(z @ decoder[0][0] + decoder[0][1], x, atol=1e-4)
    variances = np.var(z.astype(np.float64), axis=0, ddof=1)
    assert np.allclose(np.cov(z.T), np.diag(variances), atol=1e-3 * variances.max())  # turned onto axes of their own
    if power == 0:
        assert np.allclose(variances, 1, atol=1e-3)


def test_save_and_load_give_equal_codes(tmp_path: Path) -> None:
    x = blobs(200, 10, 3)
    books = rqkmeans.fit(x, Tokenizer(builder="rqkmeans", levels=2, codes=16, dim=4), 1)
    books.save(tmp_path, {"settings": {"seed": 1}})
    loaded, config = Codebooks.load(tmp_path)
    assert config == {"builder": "rqkmeans", "settings": {"seed": 1}}
    for ours, theirs in zip(books.encode(x), loaded.encode(x), strict=True):
        assert np.array_equal(ours, theirs)
    with pytest.raises(ModelError, match="width 9, the tokenizer was fitted on 10"):
        loaded.encode(x[:, :9])
    with pytest.raises(ModelError, match="no tokenizer"):
        Codebooks.load(tmp_path / "absent")


@given(st.integers(1, 50_000), st.integers(2, 5))
def test_small_catalogues_use_fewer_codes_and_always_fit(items: int, levels: int) -> None:
    if 256**levels < items:
        return
    codes = codes_in_use(items, levels, 256)
    assert 2 <= codes <= 256
    assert codes**levels >= items
    assert codes == 256 or codes <= max(items // 4, (2 * items) ** (1 / levels) + 2)


def test_too_many_items_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"raise tokenizer\.codes"):
        codes_in_use(300, 1, 256)
