"""Windows of a table hold each row once and no more than they may; batches over them know neither files nor ranks, and resume anywhere."""

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from deltalake import DeltaTable, WriterProperties, write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2.errors import ConfigError, InputError
from training.data import Example, Rows, pack
from training.stream import Draws, Epochs, Windows

pytestmark = pytest.mark.unit
COUNT, SIZE, LANES, ROW = 6000, 1000, 4, 48
ORDER, TRAIN = ("ordinal", "name"), ds.field("fit") == "train"


def table(first: int, count: int, fit: str = "train") -> pa.Table:
    """Rows whose ordinals are spread as hashes are."""
    names = np.arange(first, first + count)
    ordinals = np.random.default_rng([first, len(fit)]).integers(-(2**63), 2**63 - 1, count)
    return pa.table({"fit": [fit] * count, "name": names, "text": [f"{name:0200}" for name in names], "ordinal": ordinals})


@dataclass
class Row:
    """A row that counts how many of its kind are alive, and what Arrow holds while they are made."""

    name: int
    text: str
    alive: ClassVar[int] = 0
    most: ClassVar[int] = 0
    arrow: ClassVar[int] = 0

    def __post_init__(self) -> None:
        Row.alive += 1
        Row.most, Row.arrow = max(Row.most, Row.alive), max(Row.arrow, pa.total_allocated_bytes())

    def __del__(self) -> None:
        Row.alive -= 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table sorted by its ordinal, in twelve files of several row groups each, beside another fit."""
    folder = tmp_path_factory.mktemp("lake") / "texts"
    rows = table(0, COUNT).sort_by("ordinal")
    for start in range(0, COUNT, 500):
        groups = WriterProperties(max_row_group_size=100)
        write_deltalake(folder, rows[start : start + 500], mode="append", partition_by=["fit"], writer_properties=groups)
    write_deltalake(folder, table(10_000, 100, "refit"), mode="append")
    return folder


def windows_of(folder: Path, size: int = SIZE, lanes: int = LANES) -> Windows[Row]:
    return Windows(DeltaTable(folder).to_pyarrow_dataset(), Row, ORDER, TRAIN, size, lanes)


def names(windows: Windows[Row]) -> list[list[int]]:
    return [[row.name for row in window] for window in windows]


def test_windows_hold_every_row_once_and_few_at_a_time(place: Path) -> None:
    windows = windows_of(place)
    found = names(windows)
    assert sorted(itertools.chain(*found)) == list(range(COUNT))
    assert max(map(len, found)) <= SIZE // LANES
    assert (windows.lanes, len(found) % LANES) == (LANES, 0)
    assert len(found) < 1.2 * LANES * COUNT / SIZE, "windows are nearly full"
    assert list(itertools.chain(*found)) == table(0, COUNT).sort_by("ordinal")["name"].to_pylist()
    whole = windows_of(place, size=COUNT)
    assert (whole.lanes, names(whole)) == (1, [list(itertools.chain(*found))])
    with pytest.raises(ConfigError, match="raise"):
        windows_of(place, size=4)


def test_ordinals_of_fewer_bits_are_cut_as_evenly(tmp_path: Path) -> None:
    short = table(0, COUNT)
    short = short.set_column(3, "ordinal", pa.array(np.random.default_rng(2).integers(0, 2**31, COUNT)))
    write_deltalake(tmp_path / "t", short)
    found = names(Windows(DeltaTable(tmp_path / "t").to_pyarrow_dataset(), Row, ORDER, TRAIN, SIZE, LANES, bits=31))
    assert list(itertools.chain(*found)) == short.sort_by([("ordinal", "ascending"), ("name", "ascending")])["name"].to_pylist()
    assert SIZE // LANES // 2 < min(map(len, found)) <= max(map(len, found)) <= SIZE // LANES


def test_windows_are_the_same_however_files_lie(place: Path, tmp_path: Path) -> None:
    rows = table(0, COUNT).take(np.random.default_rng(1).permutation(COUNT))
    write_deltalake(tmp_path / "other", rows, partition_by=["fit"])
    assert names(windows_of(tmp_path / "other")) == names(windows_of(place))


def test_a_window_reads_few_files_of_a_sorted_table(place: Path) -> None:
    windows = windows_of(place)
    first, beyond = windows.bounds(9)
    range_of = TRAIN & (ds.field("ordinal") >= first) & (ds.field("ordinal") < beyond)
    assert len(list(windows.dataset.get_fragments(filter=range_of))) <= 2


def test_rows_committed_later_are_not_seen(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "t", table(0, 2000), partition_by=["fit"])
    windows = windows_of(tmp_path / "t", size=500)
    write_deltalake(tmp_path / "t", table(2000, 2000), mode="append")
    assert sorted(itertools.chain(*names(windows))) == list(range(2000))
    assert sorted(itertools.chain(*names(windows_of(tmp_path / "t", size=500)))) == list(range(4000))


def examples(rows: list[Row]) -> list[Example]:
    """One a row of the table: its name, then filling."""
    return [Example([1], [([row.name + 2] * (1 + row.name % 9), 1.0)]) for row in rows]


def loader_of(place: Path, rank: int = 0, world: int = 1, seed: int = 3) -> Epochs:
    windows = windows_of(place)
    draws = Draws(windows, windows.lanes, 1, examples)

    def make(number: int) -> Rows:
        return pack(draws[number], ROW, number)

    return Epochs(make, ROW * LANES, seed, rank=rank, world=world, lanes=windows.lanes, windows=len(windows))


def taken(loader: Epochs, count: int) -> list[np.ndarray]:
    return [batch.input_ids_BT.numpy() for batch in itertools.islice(loader, count)]


def merged(parts: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Global batches from those of the ranks: row r, r + world, ... are rank r's."""
    return [np.stack(shares, 1).reshape(LANES, ROW) for shares in zip(*parts, strict=True)]


def state_of(loaders: list[Epochs]) -> dict[str, Any]:
    """What the ranks' states sum up to, which each of them has where they are processes."""
    lanes: Counter[str] = Counter()
    for loader in loaders:
        lanes.update(loader.state_dict()["lanes"])
    return {"seed": loaders[0].seed, "lanes": dict(lanes)}


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 100), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_batches_resume_anywhere_on_any_number_of_ranks(place: Path, stop: int, before: int, after: int) -> None:
    whole = taken(loader_of(place), stop + 5)
    first = [loader_of(place, rank, before) for rank in range(before)]
    assert all((a == b).all() for a, b in zip(merged([taken(loader, stop) for loader in first]), whole, strict=False))
    second = [loader_of(place, rank, after) for rank in range(after)]
    for loader in second:
        loader.load_state_dict(state_of(first))
    assert all((a == b).all() for a, b in zip(merged([taken(loader, 5) for loader in second]), whole[stop:], strict=True))
    if stop:
        with pytest.raises(InputError, match="other training rows"):
            loader_of(place, seed=4).load_state_dict(state_of(first))


def test_a_position_of_another_number_of_lanes_says_so(place: Path) -> None:
    stand = loader_of(place).state_dict()
    fewer = {name: value for name, value in stand["lanes"].items() if not name.endswith(" 3")}
    with pytest.raises(InputError, match="one in 3 lanes of rows, and 2 processes read 4: go on with as many processes as before"):
        loader_of(place, world=2).load_state_dict(stand | {"lanes": fewer})


def test_every_lane_gives_each_of_its_examples_once_an_epoch_in_another_order(place: Path) -> None:
    loader, windows = loader_of(place), names(windows_of(place))
    batches = taken(loader, int(2.1 * loader.steps(1.0)))
    moved = 0
    for lane in range(LANES):
        given = [int(i) - 2 for batch in batches for i in dict.fromkeys(batch[lane]) if i > 1]
        mine = sorted(itertools.chain(*windows[lane::LANES]))
        first, second = given[: len(mine)], given[len(mine) : 2 * len(mine)]
        assert sorted(first) == sorted(second) == mine
        assert first != second
        moved += set(first[: len(windows[0])]) != set(second[: len(windows[0])])
    assert moved > LANES // 2, "windows come in another order, too"


def test_an_epoch_never_holds_more_than_the_window(place: Path) -> None:
    Row.most = Row.arrow = 0
    before, rows = pa.total_allocated_bytes(), table(0, COUNT)
    whole = rows.nbytes
    del rows
    for rank, world in ((0, 1), (1, 2)):
        loader = loader_of(place, rank, world)
        most = 0
        for _ in itertools.islice(loader, loader.steps(1.0)):
            held = [lane.rows for lane in loader.own if lane.rows is not None]
            most = max(most, sum(len(set(rows.segment_ids[k])) - (-1 in rows.segment_ids[k]) for rows in held for k in range(len(rows))))
        assert SIZE / world / 2 < most <= SIZE / world, "a rank packs its lanes and no others"
    assert 0 < Row.most <= SIZE // LANES
    assert Row.arrow - before < whole / 6, (Row.arrow, before, whole)
