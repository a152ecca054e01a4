"""Examples -> packed rows -> batches, so that no token is spent on padding and no example sees another.

    rows = pack(examples, row_tokens=512, seed=13)
    loader = batches(rows, tokens_per_batch=4096, seed=13)      # endless; `loader.state_dict()` resumes at the exact batch
    for batch in loader: model(batch.input_ids_BT, position_ids=batch.position_ids_BT, attention_mask=batch.mask_B1TT(), ...)

Rows are filled by best fit of a seeded shuffle. Position ids start again with each example, and the mask is causal within an example.

Shapes: R rows, T tokens of a row, B rows of a batch, E examples.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gr2.errors import ConfigError, InputError

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """A prompt that is read, and segments of `(token ids, weight of their loss)` that are learned. `extra`: one value per learned token."""

    prompt_ids: Sequence[int]
    segments: Sequence[tuple[Sequence[int], float]]
    extra: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Length in tokens."""
        return len(self.prompt_ids) + sum(len(ids) for ids, _ in self.segments)


@dataclass(frozen=True)
class Rows:
    """Packed rows. `segment_ids`: place of the example in the list given to `pack`; -1: filling. `weights` belong to the token itself."""

    input_ids: Ints  # (R, T)
    position_ids: Ints  # (R, T)
    segment_ids: Ints  # (R, T)
    weights: Floats  # (R, T)
    extra: dict[str, Floats]  # name -> (R, T)
    dropped: int = 0  # examples longer than a row, where the caller let them be dropped

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Tokens that are not filling."""
        return int((self.segment_ids >= 0).sum())

    @property
    def fill(self) -> float:
        """Share of the rows that is not filling."""
        return self.tokens / self.input_ids.size


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, one micro-batch of one rank.

    `norm` is what a loss divides its weighted sum by: the sum of the weights of the whole step, over its micro-batches and ranks (the loop
    sets it). So losses of micro-batches add up to the loss of the step, and accumulation changes nothing.
    """

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    segment_ids_BT: torch.Tensor
    weights_BT: torch.Tensor
    extra: dict[str, torch.Tensor]
    norm: float

    @property
    def tokens(self) -> int:
        """Tokens that are not filling."""
        return int((self.segment_ids_BT >= 0).sum())

    @property
    def learned_BT(self) -> torch.Tensor:
        """Which tokens are predicted: those with a weight, never the first of an example."""
        return (self.weights_BT != 0) & (self.position_ids_BT > 0)

    def mask_B1TT(self) -> torch.Tensor:
        """True where a token may look: at itself and at earlier tokens of its own example (filling: at filling)."""
        same_BTT = self.segment_ids_BT[:, :, None] == self.segment_ids_BT[:, None, :]
        return same_BTT.tril()[:, None]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids_BT", "position_ids_BT", "segment_ids_BT", "weights_BT")}
        return replace(self, **moved, extra={name: values.to(device) for name, values in self.extra.items()})


def pack(examples: Sequence[Example], row_tokens: int, seed: int = 0, *, drop_long: bool = False) -> Rows:
    """Packs examples into rows of `row_tokens`, by best fit over a seeded shuffle; every run gives the same rows.

    Raises InputError for no example, and naming the first that is longer than a row, unless `drop_long` (then `dropped` counts them).
    """
    lengths_E = np.array([example.tokens for example in examples], dtype=np.int64)
    long_E = lengths_E > row_tokens
    if long_E.any() and not drop_long:
        first = int(long_E.argmax())
        raise InputError(
            f"{int(long_E.sum())} of {len(examples)} examples do not fit a row: "
            f"example {first} has {lengths_E[first]} tokens, row_tokens is {row_tokens}"
        )
    order = np.random.default_rng(seed).permutation(len(examples))
    order = order[~long_E[order] & (lengths_E[order] > 0)]
    if not len(order):
        raise InputError("no example to train on")
    places, count = _best_fit(lengths_E[order].tolist(), row_tokens)
    return _fill(examples, order.tolist(), places, count, row_tokens, int(long_E.sum()))


def _best_fit(lengths: list[int], size: int) -> tuple[list[tuple[int, int]], int]:
    """`(row, start)` of each length: in the open row with the least room that holds it, else in a new one. O(n log n)."""
    rooms: list[tuple[int, int]] = []  # (room, row), ascending
    places, count = [], 0
    for length in lengths:
        i = bisect_left(rooms, (length, -1))
        if i < len(rooms):
            room, row = rooms.pop(i)
        else:
            room, row, count = size, count, count + 1
        places.append((row, size - room))
        if room > length:
            insort(rooms, (room - length, row))
    return places, count


def _fill(examples: Sequence[Example], order: list[int], places: list[tuple[int, int]], count: int, size: int, dropped: int) -> Rows:
    names = sorted({name for i in order for name in examples[i].extra})
    rows = Rows(
        input_ids=np.zeros((count, size), dtype=np.int32),
        position_ids=np.zeros((count, size), dtype=np.int32),
        segment_ids=np.full((count, size), -1, dtype=np.int32),
        weights=np.zeros((count, size), dtype=np.float32),
        extra={name: np.zeros((count, size), dtype=np.float32) for name in names},
        dropped=dropped,
    )
    positions = np.arange(size, dtype=np.int32)
    for i, (row, start) in zip(order, places, strict=True):
        example, place = examples[i], start + len(examples[i].prompt_ids)
        rows.input_ids[row, start:place] = example.prompt_ids
        first = place
        for ids, weight in example.segments:
            rows.input_ids[row, place : place + len(ids)] = ids
            rows.weights[row, place : place + len(ids)] = weight
            place += len(ids)
        rows.position_ids[row, start:place] = positions[: place - start]
        rows.segment_ids[row, start:place] = i
        for name, values in example.extra.items():
            if len(values) != place - first:
                raise InputError(f"example {i}: extra {name!r} has {len(values)} values for {place - first} learned tokens")
            rows.extra[name][row, first:place] = values
    return rows


def to_batch(rows: Rows, chosen: Sequence[int] | NDArray[np.integer] | slice) -> Batch:
    """Some rows as a batch; `norm` is its own sum of weights until the loop widens it to the step."""
    ids = {name: torch.from_numpy(getattr(rows, name)[chosen].astype(np.int64)) for name in ("input_ids", "position_ids", "segment_ids")}
    batch = Batch(
        input_ids_BT=ids["input_ids"],
        position_ids_BT=ids["position_ids"],
        segment_ids_BT=ids["segment_ids"],
        weights_BT=torch.from_numpy(rows.weights[chosen]),
        extra={name: torch.from_numpy(values[chosen]) for name, values in rows.extra.items()},
        norm=1.0,
    )
    return replace(batch, norm=float(batch.weights_BT[batch.learned_BT].sum()))


def join(picked: Sequence[tuple[Rows, NDArray[np.integer]]]) -> Rows:
    """Rows picked from several packs, as one."""
    names = ("input_ids", "position_ids", "segment_ids", "weights")
    tables = {name: np.concatenate([getattr(rows, name)[places] for rows, places in picked]) for name in names}
    extra = {name: np.concatenate([rows.extra[name][places] for rows, places in picked]) for name in picked[0][0].extra}
    return Rows(**tables, extra=extra)


class Loader:
    """An endless stream of batches: epoch after epoch, each in a seeded order of its own; a batch may span two, so all have one size.

    Its state is one number, and does not depend on the number of ranks: rank r takes rows r, r + world, ... of each global batch.
    """

    def __init__(self, rows: Rows, rows_per_batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if rows_per_batch % world:
            raise ConfigError(f"{rows_per_batch} rows in a batch cannot be shared by {world} processes: change tokens_per_batch")
        self.rows, self.rows_per_batch, self.seed, self.rank, self.world = rows, rows_per_batch, seed, rank, world
        self.taken = 0  # rows given out so far, over all ranks and epochs
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            places = [self._place(self.taken + k) for k in range(self.rank, self.rows_per_batch, self.world)]
            self.taken += self.rows_per_batch
            yield to_batch(self.rows, places)

    def _place(self, k: int) -> int:
        epoch, within = divmod(k, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return int(self._order[within])

    def steps(self, epochs: float, accumulation: int = 1) -> int:
        """Optimizer steps that the epochs give."""
        return max(1, round(epochs * len(self.rows) / (self.rows_per_batch * accumulation)))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"taken": self.taken, "rows": len(self.rows), "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` stood. Raises InputError if it is of other rows or another seed."""
        if (state["rows"], state["seed"]) != (len(self.rows), self.seed):
            raise InputError("the saved position belongs to other training rows: remove the checkpoint folder to start again")
        self.taken = int(state["taken"])


def batches(rows: Rows, tokens_per_batch: int, seed: int, rank: int = 0, world: int = 1) -> Loader:
    """The loader of packed rows: `tokens_per_batch` (filling included) over all ranks make one micro-batch."""
    return Loader(rows, rows_per_batch(tokens_per_batch, rows.input_ids.shape[1], world), seed, rank, world)


def rows_per_batch(tokens_per_batch: int, row_tokens: int, world: int) -> int:
    """Rows of a micro-batch over all ranks, a multiple of their number."""
    per_batch = max(world, tokens_per_batch // row_tokens)
    return per_batch - per_batch % world
