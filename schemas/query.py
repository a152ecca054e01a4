"""`gr2 tables` and `gr2 sql`: DuckDB over the Delta tables, at the promoted release."""

import csv
import json
import sys
from typing import Any

import duckdb
import pyarrow as pa

import schemas
from gr2.context import Context
from gr2.errors import InputError
from schemas.lake import Lake, dataset_of

SHOWN = 100  # rows of a table on a terminal


def connect(lake: Lake) -> duckdb.DuckDBPyConnection:
    """A connection with a view for each table that exists; external access is off, so a query reaches nothing else."""
    connection = duckdb.connect()
    for name in schemas.NAMES:
        if lake.exists(name):
            connection.register(name, lake.dataset(name))
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def query(ctx: Context, text: str, latest: bool = False) -> pa.Table:
    """The result of one query, no two of its columns named alike. Raises InputError with DuckDB's own message for a bad one."""
    lake = Lake(ctx.place, {} if latest else ctx.promoted.get("tables"))
    try:
        found = connect(lake).sql(text).to_arrow_table()
    except (duckdb.Error, AttributeError) as error:
        raise InputError(f"the query failed: {error}") from None
    return found.rename_columns(_distinct(found.column_names))


def _distinct(names: list[str]) -> list[str]:
    """Names with a number where they came before: rows are read as mappings, which hold each name once."""
    taken: list[str] = []
    for name in names:
        own, count = name, 1
        while own in taken:
            count += 1
            own = f"{name}_{count}"
        taken.append(own)
    return taken


def print_query(ctx: Context, text: str, output: str, latest: bool) -> None:
    """Prints a query's result as a table, CSV or JSON lines."""
    result = query(ctx, text, latest)
    if output == "json":
        for row in result.to_pylist():
            print(json.dumps(row, default=str))
    elif output == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(result.column_names)
        writer.writerows(list(row.values()) for row in result.to_pylist())
    else:
        _print_table(result.column_names, [[_cell(v) for v in row.values()] for row in result.slice(0, SHOWN).to_pylist()])
        if result.num_rows > SHOWN:
            print(f"the first {SHOWN} of {result.num_rows:,} rows; --format csv or json prints all", file=sys.stderr)


def print_tables(ctx: Context) -> None:
    """Prints every table: rows, version, grain, key."""
    rows = []
    for table in schemas.all_tables():
        if ctx.lake.exists(table.name):
            opened = ctx.lake.open(table.name)
            rows.append([table.name, f"{dataset_of(opened).count_rows():,}", str(opened.version()), table.grain, ", ".join(table.key)])
        else:
            rows.append([table.name, "-", "-", table.grain, ", ".join(table.key)])
    _print_table(["table", "rows", "version", "grain: one row is", "key"], rows)


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
