"""Tables as a test gives them, written without a JVM and without audits: for tests of what reads them."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake

import schemas
from gr2.context import Context


def put(ctx: Context, name: str, rows: list[dict[str, Any]], partition: Mapping[str, str] | None = None) -> None:
    """A table by its contract's columns, or one partition of it; what was there is replaced."""
    contract = schemas.get(name)
    table = pa.Table.from_pylist(rows, schema=contract.arrow())
    where = " AND ".join(f"{column} = '{value}'" for column, value in (partition or {}).items())
    write_deltalake(
        ctx.table_path(name), table, mode="overwrite", partition_by=list(contract.partition_by) or None,
        predicate=where if where and ctx.lake.exists(name) else None,
    )  # fmt: skip
