"""What a table's contract is made of."""

from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

STRING, LONG, INT, DOUBLE, FLOAT, BOOL = pa.string(), pa.int64(), pa.int32(), pa.float64(), pa.float32(), pa.bool_()
DATE, TIMESTAMP = pa.date32(), pa.timestamp("us", tz="UTC")


def list_of(kind: pa.DataType) -> pa.DataType:
    """A list whose elements are never null."""
    return pa.list_(pa.field("element", kind, nullable=False))


@dataclass(frozen=True)
class Column:
    """One column: its type, what it means (with the unit), and whether a rerun may change it."""

    name: str
    type: pa.DataType
    comment: str
    nullable: bool = False
    volatile: bool = False  # differs between equal runs (seconds, clocks): left out when contents are compared
    values: tuple[str, ...] = ()  # the closed set of values of a string column
    long: bool = False  # a text that nobody filters by: files keep no statistics of it


@dataclass(frozen=True)
class Table:
    """A table's contract. `mode` says how it is published:

    replace: partitions (or the whole table) are replaced by what a job wrote; a rerun leaves equal content
    insert:  rows whose key is new are added, rows whose key exists are left as they are; a rerun adds nothing
    """

    name: str
    version: str  # major.minor: a breaking change needs a new major and a migration
    grain: str  # "one ..."
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    partition_by: tuple[str, ...] = ()
    mode: Literal["replace", "insert"] = "replace"
    laws: dict[str, str] = field(default_factory=dict)  # name -> SQL predicate over one row, enforced by Delta and by the audit
    unique: tuple[tuple[str, ...], ...] = ()  # further sets of columns that are unique together
    min_rows: int = 0  # fewer published rows fail the audit
    change_feed: bool = False  # later stages read what changed since they last ran
    sort_by: tuple[str, ...] = ()  # files hold disjoint ranges of these columns and are sorted by them: for readers of ranges
    layout: str = ""  # why its files lie as they do

    def arrow(self) -> pa.Schema:
        """The Arrow schema, comments as field metadata."""
        return pa.schema([pa.field(c.name, c.type, c.nullable, {"comment": c.comment}) for c in self.columns])

    def names(self) -> list[str]:
        """Column names, in order: the last `select` of every job that builds this table."""
        return [c.name for c in self.columns]

    def stable(self) -> list[str]:
        """Columns whose content a rerun leaves equal."""
        return [c.name for c in self.columns if not c.volatile]
