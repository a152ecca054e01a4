"""Semantic-ID tokenizers against libraries: RQ-KMeans against plain faiss residual k-means, RQ-VAE against vector-quantize-pytorch.

    python -m benchmarks.tokenizers --items 1000000        # about forty minutes on two cores
    python -m benchmarks.tokenizers --items 100000         # a few minutes

Vectors of 384 numbers: 2,000 centres in a space of 32 axes, turned into 384, with noise. Both sides quantise to 3 x 256 codes and are
judged by the mean squared error that their codes leave of the vectors, on a tenth of them. faiss is taken as anybody would call it (its
own sampling of points, all threads); so are the encoder and decoder of the RQ-VAE around `ResidualVQ` (the same network, batches, steps).
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.stages import header
from gr2.config import Tokenizer
from training import rqkmeans, rqvae
from training.codebooks import quantise

LEVELS, CODES, WIDTH, SEED = 3, 256, 384, 13


def vectors(items: int) -> np.ndarray:
    """(N, 384) vectors of unit length."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((2000, 32), dtype=np.float32)
    inner_N32 = centres[rng.integers(0, len(centres), items)] + 0.3 * rng.standard_normal((items, 32), dtype=np.float32)
    x_NV = inner_N32 @ rng.standard_normal((32, WIDTH), dtype=np.float32) + 0.5 * rng.standard_normal((items, WIDTH), dtype=np.float32)
    return x_NV / np.linalg.norm(x_NV, axis=1, keepdims=True)


def our_kmeans(x_NV: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`training.rqkmeans` on the vectors as they are; gives the reconstruction."""
    books_LKD = rqkmeans.residual_kmeans(x_NV, LEVELS, CODES, SEED)
    return lambda some: books_LKD[np.arange(LEVELS), quantise(some, books_LKD)].sum(axis=1)


def faiss_kmeans(x_NV: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Level by level `faiss.Kmeans` with its defaults."""
    left_NV, means = x_NV.copy(), []
    for level in range(LEVELS):
        level_means = faiss.Kmeans(WIDTH, CODES, niter=rqkmeans.ITERATIONS, seed=SEED + level)
        level_means.train(left_NV)
        left_NV -= np.asarray(level_means.centroids)[level_means.index.search(left_NV, 1)[1][:, 0]]
        means.append(level_means)

    def rebuilt(some: np.ndarray) -> np.ndarray:
        left = some.copy()
        for level_means in means:
            left -= np.asarray(level_means.centroids)[level_means.index.search(left, 1)[1][:, 0]]
        return some - left

    return rebuilt


def settings_of(steps: int) -> Tokenizer:
    """The RQ-VAE of both sides: no switches that the library lacks."""
    return Tokenizer(builder="rqvae", levels=LEVELS, codes=CODES, steps=steps, diversity=0.0, contrastive=0.0, reset_after=0)


def our_rqvae(x_NV: np.ndarray, steps: int) -> Callable[[np.ndarray], np.ndarray]:
    """RQ-VAE of `training.rqvae`."""
    books = rqvae.fit(x_NV, settings_of(steps), SEED)
    return lambda some: books.decode(books.encode(some)[0])


def library_rqvae(x_NV: np.ndarray, steps: int) -> Callable[[np.ndarray], np.ndarray]:
    """The same encoder and decoder around `ResidualVQ`, its own k-means start and moving averages."""
    from vector_quantize_pytorch import ResidualVQ

    settings = settings_of(steps)
    torch.manual_seed(SEED)
    encoder, decoder = rqvae.mlp(WIDTH, settings.hidden, settings.dim), rqvae.mlp(settings.dim, settings.hidden, WIDTH)
    quantiser = ResidualVQ(dim=settings.dim, num_quantizers=LEVELS, codebook_size=CODES, kmeans_init=True, decay=settings.ema or 0.99)
    network = torch.nn.ModuleList([encoder, decoder, quantiser])
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=settings.lr * 0.02)
    x, generator = torch.from_numpy(x_NV), torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        batch = x[torch.randint(len(x), (settings.batch,), generator=generator)]
        quantised, _, commitment = quantiser(encoder(batch)[:, None])
        loss = (batch - decoder(quantised[:, 0])).pow(2).sum(dim=1).mean() + settings.commitment * commitment.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()

    @torch.no_grad()
    def rebuilt(some: np.ndarray) -> np.ndarray:
        return np.asarray(decoder(quantiser(encoder(torch.from_numpy(some))[:, None])[0][:, 0]).numpy())

    return rebuilt


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=2000, help="of both RQ-VAEs")
    chosen = parser.parse_args()
    print(header("tokenizers"))
    x_NV = vectors(chosen.items)
    judged = x_NV[::10]
    print("| builder | seconds | squared error left | of the variance |")
    print("| --- | --- | --- | --- |")
    variance = float(((judged - judged.mean(axis=0)) ** 2).sum(axis=1).mean())
    jobs: list[tuple[str, Any]] = [
        ("faiss residual k-means", lambda: faiss_kmeans(x_NV)),
        ("RQ-KMeans", lambda: our_kmeans(x_NV)),
        ("RQ-VAE on vector-quantize-pytorch", lambda: library_rqvae(x_NV, chosen.steps)),
        ("RQ-VAE", lambda: our_rqvae(x_NV, chosen.steps)),
    ]
    for name, job in jobs:
        started = time.perf_counter()
        rebuilt = job()
        seconds = time.perf_counter() - started
        error = float(F.mse_loss(torch.from_numpy(rebuilt(judged)), torch.from_numpy(judged), reduction="sum")) / len(judged)
        print(f"| {name} | {seconds:.0f} | {error:.4f} | {error / variance:.1%} |", flush=True)


if __name__ == "__main__":
    main()
