"""RQ-KMeans: k-means on the residuals of each level (METHOD 2; the tokenizer of OneRec, arXiv 2502.18965).

Seeded and in a fixed order of rows, so that equal vectors give equal codebooks. The vectors are first turned onto
`dim` principal axes: with all axes, most of the codes describe noise that few items share.
"""

import numpy as np

from gr2.config import Tokenizer
from training.codebooks import Codebooks, Curve, Floats, codes_in_use, principal_axes, quantise

ITERATIONS = 25
POINTS = 256  # a code


def fit(vectors_NV: Floats, settings: Tokenizer, seed: int, curve: Curve | None = None) -> Codebooks:
    """Fits the codebooks on all rows. `curve` gets one row a level: the mean squared error that it leaves."""
    encoder, decoder = principal_axes(vectors_NV, settings.dim)
    books = Codebooks("rqkmeans", np.zeros((1, 1, 1), np.float32), encoder, decoder)
    z_ND = books.latent(vectors_NV)
    books_LKD = residual_kmeans(z_ND, settings.levels, codes_in_use(len(z_ND), settings.levels, settings.codes), seed)
    if curve:
        for level in range(settings.levels):
            codes_NL = quantise(z_ND, books_LKD[: level + 1])
            left_ND = z_ND - books_LKD[np.arange(level + 1), codes_NL].sum(axis=1)
            curve({"step": level + 1, "loss": float((left_ND**2).sum(axis=1).mean()), "tokens": len(z_ND) * (level + 1)})
    return Codebooks("rqkmeans", books_LKD, encoder, decoder)


def residual_kmeans(z_ND: Floats, levels: int, codes: int, seed: int) -> Floats:
    """(L, K, D) centroids: level by level, k-means on what the levels before leave over.

    Of more than POINTS rows a code, a seeded sample is fitted (faiss's own rule). faiss sums each centroid on one thread in the order of
    rows, so the number of threads changes nothing.
    """
    import faiss

    left_ND = np.array(z_ND, dtype=np.float32, order="C")
    books = []
    for level in range(levels):
        means = faiss.Kmeans(
            left_ND.shape[1], codes, niter=ITERATIONS, seed=seed + level, min_points_per_centroid=1, max_points_per_centroid=POINTS
        )
        means.train(left_ND)
        book_KD = np.array(means.centroids, dtype=np.float32)
        left_ND -= book_KD[quantise(left_ND, book_KD[None])[:, 0]]
        books.append(book_KD)
    return np.stack(books)
