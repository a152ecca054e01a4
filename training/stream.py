"""A Delta table of any size -> windows that fit in memory -> batches, shared by the ranks and resumable at the exact batch.

    windows = Windows(lake.dataset("midtrain_examples"), Text, ("ordinal", "example_id"), where, size=250_000, lanes=16)
    draws = Draws(windows, windows.lanes, seed, encode)
    make = lambda number: pack(draws[number], row_tokens, seed + number)
    loader = Epochs(make, 65536, seed, rank=rank, world=world, lanes=windows.lanes, windows=len(windows))

The table is cut by ranges of its ordinal, which is a hash of the key. So a window is a random sample of the rows, it is the same however
files lie, and where files are sorted by the ordinal reading one costs one window's bytes. Windows belong to lanes; a lane packs one window
at a time and gives its share of rows to each global batch. Ranks divide the lanes among them, so a rank reads, tokenises, packs and holds
only its own, and the batches do not depend on how many ranks there are. A table that fits one window is one lane, which all ranks read.

Delta gives a dataset as of one version: rows committed later are not seen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from operator import and_
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow.dataset as ds
from numpy.typing import NDArray

from gr2.errors import ConfigError, InputError
from training.data import Batch, Loader, Rows, join, rows_per_batch, to_batch
from training.loop import sum_over_ranks

T = TypeVar("T")
E = TypeVar("E")
BUCKETS = 20  # bits of the ordinal that rows are counted by: windows are whole buckets
READ = {"batch_size": 16_384, "batch_readahead": 2, "fragment_readahead": 1}  # else Arrow holds millions of rows in flight


class Windows(Sequence[list[T]], Generic[T]):
    """The rows of a dataset, or those where `where` holds, as lists of the dataclass `row`, at most `size // lanes` in each.

    `order_by`: a column of uniformly spread integers (of `bits` bits: 64 with a sign, fewer from 0), then what breaks ties. Rows come in
    this order. `lanes` is 1 where all rows fit `size`, else what was asked for. Raises ConfigError where no window is that small.
    """

    def __init__(
        self, dataset: ds.Dataset, row: type[T], order_by: Sequence[str], where: ds.Expression | None, size: int, lanes: int, bits: int = 64
    ) -> None:
        self.dataset, self.row, self.order_by, self.where, self.bits = dataset, row, list(order_by), where, bits
        self.columns = [field.name for field in fields(row)]  # type: ignore[arg-type]
        self.total = dataset.count_rows(filter=where)
        self.lanes = 1 if self.total <= size else lanes
        self.edges: list[int] = [] if self.total <= size else self._cut(size)

    def __len__(self) -> int:
        return len(self.edges) + 1

    def __getitem__(self, window: Any) -> Any:
        if not 0 <= window < len(self):
            raise IndexError(window)
        return self.between(*self.bounds(window))

    def bounds(self, window: int) -> tuple[int | None, int | None]:
        """Ordinals of a window: the first, and the first beyond it; None: open."""
        edges = [None, *self.edges, None]
        return edges[window], edges[window + 1]

    def between(self, first: int | None, beyond: int | None) -> list[T]:
        """The rows whose ordinal lies between, in order."""
        ordinal = ds.field(self.order_by[0])
        terms = [self.where, None if first is None else ordinal >= first, None if beyond is None else ordinal < beyond]
        where = reduce(and_, (term for term in terms if term is not None), ds.scalar(True))
        columns = list(dict.fromkeys([*self.columns, *self.order_by]))
        table = self.dataset.to_table(columns=columns, filter=where, **READ).sort_by([(c, "ascending") for c in self.order_by])
        return [self.row(**values) for values in table.select(self.columns).to_pylist()]

    def _cut(self, size: int) -> list[int]:
        """The ordinals between windows, as many for each lane, at whole buckets. One pass over one column."""
        shift, counts = self.bits - BUCKETS, np.zeros(2**BUCKETS, dtype=np.int64)
        below = len(counts) // 2 if self.bits == 64 else 0  # buckets of negative ordinals
        for batch in self.dataset.to_batches(columns=self.order_by[:1], filter=self.where, **{**READ, "batch_size": 2**BUCKETS}):
            ordinals = np.asarray(batch.column(0)).astype(np.int64)
            counts += np.bincount((ordinals >> shift) + below, minlength=len(counts))
        room = size - self.lanes * int(counts.max())  # a window may have a bucket more than its equal part
        if room <= 0:
            raise ConfigError(f"{self.lanes} lanes of {size} examples are too few for a table of {self.total}: raise the window's examples")
        windows = self.lanes * -(-self.total // room)
        edges = np.searchsorted(counts.cumsum(), self.total * np.arange(1, windows) / windows, side="right")
        return [(int(edge) - below) << shift for edge in edges]


class Draws(Generic[T, E]):
    """Windows as `encode` makes tokens of them, by the number of a draw (its turn times the lanes, and the lane).

    Each lane goes through its windows (lane, lane + lanes, ...) in an order of its own, another one each epoch. A table of one window is
    encoded once.
    """

    def __init__(self, windows: Sequence[Sequence[T]], lanes: int, seed: int, encode: Callable[[Sequence[T]], E]) -> None:
        self.windows, self.lanes, self.seed, self.encode = windows, lanes, seed, encode
        self._only: E | None = None

    def __getitem__(self, number: int) -> E:
        turn, lane = divmod(number, self.lanes)
        epoch, place = divmod(turn, len(self.windows) // self.lanes)
        order = np.random.default_rng([self.seed, lane, epoch]).permutation(len(self.windows) // self.lanes)
        return self.encoded(int(order[place]) * self.lanes + lane)

    def encoded(self, window: int) -> E:
        """The tokens of one window."""
        if len(self.windows) > 1:
            return self.encode(self.windows[window])
        if self._only is None:
            self._only = self.encode(self.windows[0])
        return self._only


class _Lane:
    """One stream of packed rows. A window is packed when rows are asked for, and let go before the next."""

    def __init__(self, make: Callable[[int], Rows], lane: int, lanes: int, share: int, seed: int) -> None:
        self.make, self.lane, self.lanes, self.share, self.seed = make, lane, lanes, share, seed
        self.turn, self.at = 0, 0
        self.rows: Rows | None = None

    def go(self, turn: int, at: int) -> None:
        """To a place of a window."""
        if turn != self.turn:
            self.rows = None
        self.turn, self.at = turn, at

    def ready(self) -> Rows:
        """The rows of the window at hand."""
        if self.rows is None:
            self.rows = self.make(self.turn * self.lanes + self.lane)
        return self.rows

    def take(self) -> tuple[Rows, NDArray[np.int64]]:
        """The lane's share of the next batch: rows, and their places."""
        if self.at + self.share > len(self.ready()):
            self.go(self.turn + 1, 0)
        rows = self.ready()
        order = np.random.default_rng([self.seed, self.turn * self.lanes + self.lane]).permutation(len(rows))
        self.at += self.share
        return rows, order[self.at - self.share : self.at]


class Epochs(Loader):
    """An endless stream of batches whose rows are packed anew each time, window after window: `make(turn * lanes + lane)` gives them.

    With several lanes each row of a batch is a lane's, and every example is read once an epoch of its lane. With one, rows that do not fill
    the last batch of an epoch are left out, others each time. `windows` of all lanes make an epoch; its size is estimated from the first.
    """

    def __init__(
        self,
        make: Callable[[int], Rows],
        tokens_per_batch: int,
        seed: int,
        kind: type[Batch] = Batch,
        rank: int = 0,
        world: int = 1,
        lanes: int = 1,
        windows: int = 1,
    ) -> None:
        first = make(0)
        per_batch = rows_per_batch(tokens_per_batch, first.input_ids.shape[1], world)
        if lanes == 1:
            per_batch = max(world, min(per_batch, len(first) // world * world))
        elif lanes != per_batch:
            raise ConfigError(f"{lanes} lanes for batches of {per_batch} rows: each lane gives one")
        super().__init__(first, per_batch, seed, rank, world)
        self.kind, self.lanes = kind, lanes
        self.own = [_Lane(make, lane, lanes, per_batch // lanes, seed) for lane in range(rank % lanes, lanes, world)]
        if self.own[0].lane == 0:
            self.own[0].rows = first
        self.tokens, self.dropped, self.fill, self.count = first.tokens * windows, first.dropped * windows, first.fill, len(first) * windows
        del self.rows  # a lane's own, which changes

    def __iter__(self) -> Iterator[Batch]:
        mine = slice(self.rank, None, self.world) if self.lanes == 1 else slice(None)
        while True:
            batch = to_batch(join([(rows, places[mine]) for rows, places in (lane.take() for lane in self.own)]), slice(None))
            yield self.kind(**vars(batch))

    def steps(self, epochs: float, accumulation: int = 1) -> int:
        """Optimizer steps that the epochs give."""
        return max(1, round(epochs * self.count / (self.rows_per_batch * accumulation)))

    def state_dict(self) -> dict[str, Any]:
        """Where all lanes stand, those of other ranks too: with several lanes every rank must ask."""
        stand = {f"{name} {lane}": 0.0 for lane in range(self.lanes) for name in ("turn", "at", "rows")}
        for lane in self.own:
            for name, value in (("turn", lane.turn), ("at", lane.at), ("rows", len(lane.rows or ()))):
                stand[f"{name} {lane.lane}"] = value
        return {"seed": self.seed, "lanes": sum_over_ranks(stand) if self.lanes > 1 else stand}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` stood. Raises InputError if it is of other rows, of another seed, or of another number of lanes."""
        stand, fits = state["lanes"], state["seed"] == self.seed
        if len(stand) != 3 * self.lanes:
            raise InputError(
                f"the saved position is one in {len(stand) // 3} lanes of rows, and {self.world} processes read {self.lanes}: "
                "go on with as many processes as before, or remove the checkpoint folder to start again"
            )
        for lane in self.own if fits else ():
            turn, at, rows = (int(stand[f"{name} {lane.lane}"]) for name in ("turn", "at", "rows"))
            lane.go(turn, at)
            fits = fits and (not rows or len(lane.ready()) == rows)  # 0: not opened yet
        if not fits:
            raise InputError("the saved position belongs to other training rows: remove the checkpoint folder to start again")
