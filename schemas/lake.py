"""Delta tables without a JVM: what trainers, evaluation in memory, `gr2 sql` and analysts read with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as fs
from deltalake import DeltaTable

import schemas
from gr2.errors import EnvironmentProblem, MissingInputError
from gr2.pipeline import builder_of

UPKEEP = ("OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "ADD CONSTRAINT", "DROP CONSTRAINT", "ADD COLUMNS")
HISTORY = 100  # commits that are looked through


def dataset_of(table: DeltaTable) -> ds.Dataset:
    """An opened table as an Arrow dataset.

    A folder is read by Arrow itself: through delta-rs's file system, which is Python, Arrow's threads may still let files go while the
    interpreter ends, and that aborts a process that had done its work (apache/arrow#34314).
    """
    if not table.table_uri.startswith("file://"):
        return table.to_pyarrow_dataset()
    local, folder = fs.FileSystem.from_uri(table.table_uri)
    return table.to_pyarrow_dataset(filesystem=fs.SubTreeFileSystem(folder, local))


class Lake:
    """The tables under `root`, a folder or a URL, each at its latest version, or at the pinned one."""

    def __init__(self, root: Path | str, pins: dict[str, int] | None = None) -> None:
        self.root = root
        self.pins = pins or {}

    def path(self, name: str) -> str:
        """Folder or URL of a table."""
        schemas.get(name)
        return f"{self.root}/tables/{name}"

    def exists(self, name: str) -> bool:
        """Whether the table was ever published. Raises EnvironmentProblem if its place cannot be reached."""
        try:
            return DeltaTable.is_deltatable(self.path(name))
        except OSError as error:
            raise EnvironmentProblem(f"{self.root} cannot be reached: {' '.join(str(error).split())[:200]}") from None

    def open(self, name: str) -> DeltaTable:
        """The table. Raises MissingInputError naming the stage that builds it."""
        if not self.exists(name):
            raise MissingInputError(f"table {name!r} does not exist under {self.root}: run `gr2 stage {builder_of(name)}` first")
        return DeltaTable(self.path(name), version=self.pins.get(name))

    def version(self, name: str) -> int:
        """Version that `read` gives."""
        return self.open(name).version()

    def commits(self, name: str) -> list[dict[str, Any]]:
        """The last commits up to the version that `read` gives, the latest first. Raises MissingInputError as `open` does."""
        table = self.open(name)
        read = table.version()
        if name in self.pins:  # of an earlier version delta-rs gives the latest commits, numbered as if they were its own
            table = DeltaTable(self.path(name))
        return [c for c in table.history(HISTORY + table.version() - read) if c["version"] <= read]

    def content_commit(self, name: str) -> dict[str, Any]:
        """The last commit that changed rows: what OPTIMIZE, VACUUM and settings commit is the same content to a stage."""
        commits = self.commits(name)
        return next((c for c in commits if c.get("operation") not in UPKEEP), commits[-1])

    def same_content(self, name: str, one: int, later: int) -> bool:
        """Whether nothing but upkeep was committed after version `one`, up to `later`."""
        return all(c["operation"] in UPKEEP for c in self.commits(name) if one < c["version"] <= later)

    def content_version(self, name: str) -> int:
        """Its version."""
        return int(self.content_commit(name)["version"])

    def dataset(self, name: str) -> ds.Dataset:
        """The table as an Arrow dataset, for DuckDB and for streaming."""
        return dataset_of(self.open(name))

    def read(self, name: str, columns: list[str] | None = None, order_by: Sequence[str] = (), most: int = 0, **equals: Any) -> pa.Table:
        """Rows whose columns equal the given values, sorted: delta-rs promises no order of rows, so say `order_by` where it matters.

        `most`: only that many, the first in order. Then no more are held in memory, but for the first column of `order_by`, a number.

        `read("item_pairs", ["item_id", "weight"], order_by=["item_id"], fit="train")`. A list as a value means membership. A column that
        a table of an older contract lacks is null where it may be; else raises MissingInputError naming the stage that builds it again.
        """
        where = None
        for column, value in equals.items():
            term = ds.field(column).isin(value) if isinstance(value, (list, tuple, set)) else ds.field(column) == value
            where = term if where is None else where & term
        wanted = None if columns is None else list(dict.fromkeys([*columns, *order_by]))
        found = self.dataset(name)
        younger = self._younger(name, found, wanted)
        if most:
            first = ds.field(order_by[0])
            numbers = np.asarray(found.to_table(columns=[order_by[0]], filter=where)[order_by[0]])
            if len(numbers) > most:
                near = first <= int(np.partition(numbers, most - 1)[most - 1])
                where = near if where is None else where & near
        table = found.to_table(columns=wanted and [c for c in wanted if c not in younger], filter=where)
        for column, kind in younger.items():
            table = table.append_column(column, pa.nulls(table.num_rows, kind))
        if order_by:
            table = table.sort_by([(c, "ascending") for c in order_by])[: most or None]
        return table if columns is None else table.select(columns)

    def _younger(self, name: str, found: ds.Dataset, wanted: list[str] | None) -> dict[str, pa.DataType]:
        """Wanted columns of the contract that a table of an older one lacks, all of which may be null."""
        lacking = [c for c in schemas.get(name).columns if c.name in (wanted or ()) and c.name not in found.schema.names]
        if needed := [c.name for c in lacking if not c.nullable]:
            raise MissingInputError(
                f"table {name!r} was written under an older contract, without {', '.join(needed)}: run `gr2 stage {builder_of(name)}` again"
            )
        return {c.name: c.type for c in lacking}
