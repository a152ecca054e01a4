"""Item vectors without a neural network: a fitted projection that can be kept, so that new items land in the same space.

Text: TF-IDF of words (one and two) and of character n-grams (3 to 5, within words), then truncated SVD. Collaborative: positive
pointwise mutual information of the symmetrised item pairs (Levy and Goldberg, NIPS 2014, eq. 6, contexts smoothed by 3/4 as in TACL
2015, section 3.1), then truncated SVD. Both of unit length; zero where an item is unknown.

Shapes: N items, F text features, A anchor items (columns of the pair matrix), D width.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from gr2.config import Embeddings

WORDS: dict[str, Any] = {"ngram_range": (1, 2), "sublinear_tf": True, "token_pattern": r"(?u)\b\w+\b", "dtype": np.float32}
CHARACTERS: dict[str, Any] = {"analyzer": "char_wb", "ngram_range": (3, 5), "sublinear_tf": True, "dtype": np.float32}
MAX_WORDS, MAX_CHARACTERS = 30_000, 40_000
CONTEXT_POWER = 0.75

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Embedder:
    """A fitted projection. `words` and `characters` list features by column; `anchors` are the items of the pair matrix's columns."""

    words: list[str]
    characters: list[str]
    idf_F: Floats
    text_FD: Floats
    anchors: list[str]
    pairs_AD: Floats

    def text(self, texts: list[str]) -> Floats:
        """(N, D) unit vectors of texts."""
        split = len(self.words)
        parts = []
        for options, terms, idf in ((WORDS, self.words, self.idf_F[:split]), (CHARACTERS, self.characters, self.idf_F[split:])):
            vectorizer = TfidfVectorizer(vocabulary=terms, **options)
            vectorizer.idf_ = idf
            parts.append(vectorizer.transform(texts))
        return unit(sparse.hstack(parts).tocsr() @ self.text_FD)

    def pairs(self, ids: list[str], first: list[str], second: list[str], weight: NDArray[np.float64]) -> Floats:
        """(N, D) unit vectors of items from weighted pairs; zero for an item without a pair."""
        return unit(association(ids, self.anchors, first, second, weight) @ self.pairs_AD)

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        """Writes `model.safetensors`, `vocabulary.json` and `config.json`."""
        from safetensors.numpy import save_file

        tensors = {"idf": self.idf_F, "text": self.text_FD, "pairs": self.pairs_AD}
        save_file({k: np.ascontiguousarray(v, dtype=np.float32) for k, v in tensors.items()}, folder / "model.safetensors")
        lists = {"words": self.words, "characters": self.characters, "anchors": self.anchors}
        (folder / "vocabulary.json").write_text(json.dumps(lists))
        (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))

    @classmethod
    def load(cls, folder: Path) -> "Embedder":
        """Reads what `save` wrote."""
        from safetensors.numpy import load_file

        tensors, lists = load_file(folder / "model.safetensors"), json.loads((folder / "vocabulary.json").read_text())
        return cls(lists["words"], lists["characters"], tensors["idf"], tensors["text"], lists["anchors"], tensors["pairs"])


def fit(
    settings: Embeddings, seed: int, ids: list[str], texts: list[str], first: list[str], second: list[str], weight: NDArray[np.float64]
) -> Embedder:
    """Fits both projections (text only where no encoder stands in for it). Equal arguments give equal vectors: seeded, signs fixed."""
    words, characters, idf_F, text_FD = _fit_text([] if settings.encoder else texts, settings.text_dim, seed)
    anchors: list[str] = []
    pairs_AD = np.zeros((0, settings.collaborative_dim), np.float32)
    if settings.collaborative_dim and len(first):
        known = set(ids)
        anchors = sorted({i for i in [*first, *second] if i in known})
        pairs_AD = _components(association(anchors, anchors, first, second, weight), settings.collaborative_dim, seed)
    return Embedder(words, characters, idf_F, text_FD, anchors, pairs_AD)


def association(rows: list[str], columns: list[str], first: list[str], second: list[str], weight: NDArray[np.float64]) -> sparse.csr_matrix:
    """Positive pointwise mutual information of items (rows) with items (columns), over pairs taken in both directions.

    Pairs with an item that is not among the rows count in no total; nor do those whose other side is not among the columns.
    """
    row_of, column_of = {item: i for i, item in enumerate(rows)}, {item: i for i, item in enumerate(columns)}
    one, other = [*first, *second], [*second, *first]
    r = np.array([row_of.get(item, -1) for item in one], dtype=np.int64)
    c = np.array([column_of.get(item, -1) for item in other], dtype=np.int64)
    known = (r >= 0) & (c >= 0)
    both = np.concatenate([weight, weight])[known]
    counts = sparse.csr_matrix((both, (r[known], c[known])), shape=(len(rows), len(columns)))  # equal places are summed
    if not counts.nnz:
        return counts
    of_row = np.asarray(counts.sum(axis=1)).ravel()
    of_column = np.asarray(counts.sum(axis=0)).ravel() ** CONTEXT_POWER
    counts = counts.tocoo()
    information = np.log(counts.data * of_column.sum() / (of_row[counts.row] * of_column[counts.col]))
    kept = information > 0
    return sparse.csr_matrix((information[kept], (counts.row[kept], counts.col[kept])), shape=counts.shape)


def unit(vectors_ND: NDArray[np.floating]) -> Floats:
    """Rows of length one; rows of zeros stay."""
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return (vectors_ND / np.where(norms_N1 > 1e-12, norms_N1, 1.0)).astype(np.float32)


def encode_texts(encoder: str, texts: list[str], batch: int = 64, max_tokens: int = 128) -> Floats:
    """(N, D) unit vectors by a Hugging Face encoder (id or path): the mean of the last hidden states. Safetensors only."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(encoder, use_safetensors=True).to(device).eval()
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))  # texts of like length share a batch: less padding
    vectors: dict[int, Floats] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        tokens = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt").to(device)
        with torch.no_grad():
            hidden_BTD = model(**tokens).last_hidden_state
        mask_BT1 = tokens["attention_mask"][:, :, None].to(hidden_BTD)
        mean_BD = (hidden_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).clamp(min=1)
        vectors.update(zip(rows, mean_BD.float().cpu().numpy(), strict=True))
    return unit(np.stack([vectors[i] for i in range(len(texts))]))


def _fit_text(texts: list[str], dim: int, seed: int) -> tuple[list[str], list[str], Floats, Floats]:
    if not texts:
        return [], [], np.zeros(0, np.float32), np.zeros((0, dim), np.float32)
    least = 2 if len(texts) >= 1000 else 1
    matrices, terms, idf = [], [], []
    for options, most in ((WORDS, MAX_WORDS), (CHARACTERS, MAX_CHARACTERS)):
        vectorizer = TfidfVectorizer(min_df=least, max_features=most, **options)
        try:
            matrices.append(vectorizer.fit_transform(texts))
        except ValueError:  # no term stands in two texts: where items have no text these are their ids
            matrices.append(vectorizer.set_params(min_df=1).fit_transform(texts))
        terms.append([str(t) for t in vectorizer.get_feature_names_out()])
        idf.append(vectorizer.idf_)
    components_FD = _components(sparse.hstack(matrices).tocsr(), dim, seed)
    return terms[0], terms[1], np.concatenate(idf).astype(np.float32), components_FD


def _components(matrix: sparse.csr_matrix, dim: int, seed: int) -> Floats:
    """(F, D) right singular vectors, the largest entry of each positive. Fewer than `dim` where the matrix is too small; then zeros."""
    most = min(dim, min(matrix.shape) - 1)
    components_FD = np.zeros((matrix.shape[1], dim), dtype=np.float32)
    if most >= 1 and matrix.nnz:
        with threadpool_limits(1):  # sums in a fixed order, whatever the number of cores
            found_DF = TruncatedSVD(most, n_iter=5, random_state=seed).fit(matrix).components_
        signs_D = np.sign(found_DF[np.arange(most), np.abs(found_DF).argmax(axis=1)])
        components_FD[:, :most] = (found_DF * np.where(signs_D == 0, 1, signs_D)[:, None]).T
    return components_FD
