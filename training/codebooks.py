"""A fitted semantic-ID tokenizer: encoder, residual codebooks, decoder. NumPy only, so that encoding needs no trainer's library.

Both builders (`training.rqvae`, `training.rqkmeans`) give a `Codebooks`; what reads it need not know which. The encoder is a
stack of linear layers with ReLU between them; a single layer is a linear map (RQ-KMeans: principal axes).

Shapes: N items, V width of an item's vector, D width of the quantised space, L levels, K codes a level.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gr2.errors import ConfigError, ModelError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Layers = tuple[tuple[Floats, Floats], ...]  # (weight (in, out), bias (out,)) of each layer
Curve = Callable[[dict[str, float]], None]  # what a builder calls with a row of its training curve

CHUNK = 8192  # rows quantised at once: bounds memory to CHUNK x K distances


@dataclass(frozen=True)
class Codebooks:
    """A frozen tokenizer."""

    builder: str
    books_LKD: Floats
    encoder: Layers
    decoder: Layers

    @property
    def levels(self) -> int:
        """L."""
        return int(self.books_LKD.shape[0])

    @property
    def codes(self) -> int:
        """K: codes in use at each level (fewer than configured for a small catalogue)."""
        return int(self.books_LKD.shape[1])

    def latent(self, vectors_NV: Floats) -> Floats:
        """(N, D) vectors in the quantised space."""
        return _forward(self.encoder, vectors_NV)

    def encode(self, vectors_NV: Floats) -> tuple[Ints, Floats]:
        """Learned codes (N, L), and the squared error of the decoded vector relative to the vector's own squared norm (N,)."""
        width = self.encoder[0][0].shape[0]
        if vectors_NV.shape[1] != width:
            raise ModelError(
                f"item vectors have width {vectors_NV.shape[1]}, the tokenizer was fitted on {width}: run `gr2 stage tokenizer`"
            )
        codes_NL = quantise(self.latent(vectors_NV), self.books_LKD)
        error_N = ((vectors_NV - self.decode(codes_NL)) ** 2).sum(axis=1)
        norm_N = (vectors_NV**2).sum(axis=1)
        return codes_NL, error_N / np.where(norm_N > 0, norm_N, 1.0)

    def quantised(self, codes_NL: Ints) -> Floats:
        """(N, D) sum of the codes' vectors over the levels."""
        return self.books_LKD[np.arange(self.levels), codes_NL].sum(axis=1)

    def decode(self, codes_NL: Ints) -> Floats:
        """(N, V) vectors that codes stand for."""
        return _forward(self.decoder, self.quantised(codes_NL))

    def save(self, folder: Path, config: dict[str, Any]) -> None:
        """Writes `model.safetensors` and `config.json` into a folder."""
        from safetensors.numpy import save_file

        tensors = {"books": self.books_LKD}
        for name, layers in (("encoder", self.encoder), ("decoder", self.decoder)):
            for i, (weight, bias) in enumerate(layers):
                tensors[f"{name}.{i}.weight"], tensors[f"{name}.{i}.bias"] = weight, bias
        save_file({k: np.ascontiguousarray(v, dtype=np.float32) for k, v in tensors.items()}, folder / "model.safetensors")
        text = json.dumps({"builder": self.builder, **config}, indent=1, sort_keys=True)
        (folder / "config.json").write_text(text)

    @classmethod
    def load(cls, folder: Path) -> tuple["Codebooks", dict[str, Any]]:
        """Reads what `save` wrote; also the configuration. Raises ModelError for a folder that holds no tokenizer."""
        from safetensors.numpy import load_file

        if not (folder / "model.safetensors").exists():
            raise ModelError(f"{folder.name} holds no tokenizer: run `gr2 stage tokenizer`")
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")

        def layers(name: str) -> Layers:
            count = sum(k.startswith(f"{name}.") and k.endswith(".weight") for k in tensors)
            return tuple((tensors[f"{name}.{i}.weight"], tensors[f"{name}.{i}.bias"]) for i in range(count))

        return cls(str(config["builder"]), tensors["books"], layers("encoder"), layers("decoder")), config


def quantise(z_ND: Floats, books_LKD: Floats) -> Ints:
    """Greedy residual quantisation: at each level the code nearest to what the levels before left over (ties: the smaller code)."""
    codes_NL = np.empty((len(z_ND), len(books_LKD)), dtype=np.int64)
    for start in range(0, len(z_ND), CHUNK):
        left_ND = z_ND[start : start + CHUNK].copy()
        for level, book_KD in enumerate(books_LKD):
            codes = np.argmin(distances(left_ND, book_KD), axis=1)
            codes_NL[start : start + CHUNK, level] = codes
            left_ND -= book_KD[codes]
    return codes_NL


def distances(points_ND: Floats, book_KD: Floats) -> Floats:
    """(N, K) squared distances, without the points' own norms (they change no order)."""
    return (book_KD**2).sum(axis=1) - 2 * points_ND @ book_KD.T


def codes_in_use(items: int, levels: int, codes: int) -> int:
    """K for a catalogue: as configured, but at most a quarter of the items, so that a code means more than one item.

    At least so many that twice the items fit. Raises ConfigError where the configured codes cannot name all items.
    """
    needed = next(k for k in range(2, 2 * items + 3) if k**levels >= 2 * items)
    if codes**levels < items:
        raise ConfigError(f"{levels} levels of {codes} codes name at most {codes**levels} items, there are {items}: raise tokenizer.codes")
    return min(codes, max(needed, items // 4))


def principal_axes(vectors_NV: Floats, dim: int, power: float = 0.5) -> tuple[Layers, Layers]:
    """A linear encoder onto the first `dim` principal axes and its inverse. The encoded variances are the axes' own to the `power`:

    1 keeps distances, 0 makes all axes weigh alike. Between them, weaker axes tell similar items apart.
    """
    mean_V = vectors_NV.mean(axis=0, dtype=np.float64)
    covariance_VV = np.cov(vectors_NV.astype(np.float64), rowvar=False).reshape(len(mean_V), -1)
    values_V, axes_VV = np.linalg.eigh(covariance_VV)
    keep = [i for i in np.argsort(values_V)[::-1][:dim] if values_V[i] > 1e-9]
    axes_VD, scale_D = axes_VV[:, keep], values_V[keep] ** ((power - 1) / 2)
    axes_VD = axes_VD * np.sign(axes_VD[np.abs(axes_VD).argmax(axis=0), np.arange(len(keep))])  # eigenvectors have no sign of their own
    encode_VD, decode_DV = axes_VD * scale_D, (axes_VD / scale_D).T
    encoder = ((encode_VD.astype(np.float32), (-mean_V @ encode_VD).astype(np.float32)),)
    decoder = ((decode_DV.astype(np.float32), mean_V.astype(np.float32)),)
    return encoder, decoder


def _forward(layers: Layers, values: Floats) -> Floats:
    for i, (weight, bias) in enumerate(layers):
        values = (np.maximum(values, 0.0) if i else values) @ weight + bias
    return values
