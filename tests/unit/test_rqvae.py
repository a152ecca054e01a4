"""RQ-VAE: its quantiser against vector-quantize-pytorch, its losses by hand, its switches, its error."""

import numpy as np
import pytest
import torch
from vector_quantize_pytorch import ResidualVQ

from gr2.config import Tokenizer
from training import rqkmeans, rqvae
from training.codebooks import quantise
from validation.sid_health import uniqueness

pytestmark = pytest.mark.unit

SMALL = {"levels": 3, "codes": 16, "dim": 6, "hidden": 32, "steps": 200, "batch": 128}


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    """Points near a curved surface: an encoder has something to learn."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(3, 24))
    vectors = np.tanh(rng.normal(size=(1000, 3)) @ basis) + 0.05 * rng.normal(size=(1000, 24))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_codes_and_sums_equal_residual_vq_for_equal_codebooks() -> None:
    torch.manual_seed(0)
    z, books = torch.randn(200, 6), torch.randn(3, 16, 6) * torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    reference = ResidualVQ(dim=6, num_quantizers=3, codebook_size=16).eval()
    for layer, book in zip(reference.layers, books, strict=True):
        layer._codebook.embed.data.copy_(book[None])
    quantised, codes, _ = reference(z[None])
    ours = rqvae.ResidualQuantiser(books, ema=0.9)(z)
    assert torch.equal(ours.codes_BL, codes[0])
    assert torch.allclose(ours.quantised_BD, quantised[0], atol=1e-5)
    assert np.array_equal(quantise(z.numpy(), books.numpy()), codes[0].numpy())


def test_error_is_at_most_that_of_residual_vq() -> None:
    torch.manual_seed(0)
    z = torch.from_numpy(np.random.default_rng(1).normal(size=(1000, 6)).astype(np.float32))
    reference = ResidualVQ(dim=6, num_quantizers=3, codebook_size=16, kmeans_init=True, decay=0.97)
    ours = rqvae.ResidualQuantiser(torch.from_numpy(rqkmeans.residual_kmeans(z.numpy(), 3, 16, 0)), ema=0.97)
    for _ in range(100):
        reference(z[None])
        ours.learn(z, ours(z).codes_BL)
    theirs = (z - reference.eval()(z[None])[0][0]).pow(2).sum(dim=1).mean()
    assert (z - ours(z).quantised_BD).pow(2).sum(dim=1).mean() <= theirs * 1.02


def test_moving_averages_tend_to_the_means() -> None:
    z = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0]])
    quantiser = rqvae.ResidualQuantiser(torch.tensor([[[1.0, 1.0], [9.0, 0.0]]]), ema=0.5)
    for _ in range(40):
        quantiser.learn(z, quantiser(z).codes_BL)
    assert torch.allclose(quantiser.books_LKD[0], torch.tensor([[0.0, 1.0], [10.0, 0.0]]), atol=1e-3)
    unused = rqvae.ResidualQuantiser(torch.tensor([[[1.0, 1.0], [50.0, 50.0]]]), ema=0.5)
    for _ in range(200):
        unused.learn(z[:2], torch.zeros((2, 1), dtype=torch.long))
    assert torch.allclose(unused.books_LKD[0], torch.tensor([[0.0, 1.0], [0.0, 0.0]]), atol=1e-3)  # smoothing: it fades, not NaN


def test_losses_by_hand() -> None:
    z = torch.tensor([[1.0, 0.0], [0.0, 3.0]], requires_grad=True)
    found = rqvae.ResidualQuantiser(torch.tensor([[[0.0, 0.0], [0.0, 2.0]]]), ema=0.0)(z, soft=True)
    assert found.codes_BL.tolist() == [[0], [1]]
    assert float(found.commitment.detach()) == float(found.codebook.detach()) == pytest.approx(1.0)
    squared = torch.tensor([[1.0, 5.0], [9.0, 1.0]])
    share = (-squared / (rqvae.TEMPERATURE * 4.0)).softmax(dim=1).mean(dim=0)
    assert float(found.diversity.detach()) == pytest.approx(float(2 * share.pow(2).sum()), rel=1e-4)
    found.commitment.backward()  # moves the encoder only
    assert torch.allclose(z.grad, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def test_idle_codes_are_reset_to_the_worst_reconstructed() -> None:
    quantiser = rqvae.ResidualQuantiser(torch.tensor([[[0.0, 0.0], [99.0, 99.0]]]), ema=0.9)
    z, error = torch.tensor([[0.1, 0.0], [3.0, 4.0]]), torch.tensor([0.1, 5.0])
    codes = quantiser(z).codes_BL
    assert [quantiser.reset_idle(z, codes, error, after=3) for _ in range(3)] == [0, 0, 1]
    assert quantiser.books_LKD[0].tolist() == [[0.0, 0.0], [3.0, 4.0]]
    assert quantiser(z).codes_BL.tolist() == [[0], [1]]


def test_contrast_prefers_partners() -> None:
    z = torch.eye(4)
    assert float(rqvae.info_nce(z, z)) < 0.01 < float(rqvae.info_nce(z, z.roll(1, dims=0)))


def test_fit_is_deterministic_and_learns(x: np.ndarray) -> None:
    rows: list[dict[str, float]] = []
    settings = Tokenizer(**{**SMALL, "steps": 500, "lr": 3e-3})
    one, other = rqvae.fit(x, settings, 5, rows.append), rqvae.fit(x, settings, 5)
    assert np.array_equal(one.books_LKD, other.books_LKD)
    assert np.array_equal(one.encode(x)[0], other.encode(x)[0])
    assert rows[-1]["step"] == 500
    assert rows[-1]["reconstruction"] < 0.5 * rows[0]["reconstruction"]
    assert one.encode(x)[1].mean() < rqkmeans.fit(x, settings, 5).encode(x)[1].mean()  # a learned encoder beats a linear one


@pytest.mark.parametrize(
    "switch",
    [{"ema": 0.0}, {"kmeans_init": False}, {"diversity": 0.01}, {"reset_after": 5}, {"contrastive": 0.1}, {"steps": 1}],
    ids=lambda s: next(iter(s)),
)
def test_each_switch_changes_what_is_learned_and_stays_sound(x: np.ndarray, switch: dict[str, float]) -> None:
    pairs = np.stack([np.arange(999), np.arange(1, 1000)], axis=1)
    plain = rqvae.fit(x, Tokenizer(**{**SMALL, "steps": 60, "lr": 3e-3}), 5, None, pairs)
    books = rqvae.fit(x, Tokenizer(**{**SMALL, "steps": 60, "lr": 3e-3, **switch}), 5, None, pairs)
    assert not np.array_equal(plain.books_LKD, books.books_LKD)
    assert np.isfinite(books.books_LKD).all()
    codes, residual = books.encode(x)
    assert np.isfinite(residual).all()
    assert uniqueness(codes)[0] > 0.05


def test_contrast_pulls_partners_together(x: np.ndarray) -> None:
    order = np.random.default_rng(3).permutation(1000)
    pairs = np.concatenate([order.reshape(-1, 2), order.reshape(-1, 2)[:, ::-1]])  # partners by chance: nothing in x says so

    def closeness(weight: float) -> float:
        books = rqvae.fit(x, Tokenizer(**{**SMALL, "lr": 3e-3, "contrastive": weight}), 5, None, pairs)
        q = books.quantised(books.encode(x)[0])
        q = q / np.linalg.norm(q, axis=1, keepdims=True)
        return float((q[pairs[:, 0]] * q[pairs[:, 1]]).sum(axis=1).mean())

    assert closeness(1.0) > closeness(0.0) + 0.05
