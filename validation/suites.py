"""Great Expectations suites, derived from the contracts in `schemas/`.

The rules of a table are evaluated in one pass over the written rows; its suite then judges the aggregates, so that the gate
costs one aggregation however many expectations there are (per-row expectations on Spark cost a job each).
"""

import contextlib
import io
import json
import logging
import re
import threading
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from gr2.errors import InputError
from schemas.base import Table

LOCK = threading.Lock()  # two tables may be judged side by side; the library's context is one


def rules(table: Table, partition: Mapping[str, str | Collection[str]] | None = None) -> dict[str, str]:
    """Rule name -> SQL predicate that every row must meet: laws, nulls, closed value sets, and the partition being replaced."""
    found = dict(table.laws)
    for column in table.columns:
        if not column.nullable:
            found[f"not_null({column.name})"] = f"{column.name} IS NOT NULL"
        if column.values:
            values = ", ".join(f"'{v}'" for v in column.values)
            found[f"known_value({column.name})"] = f"{column.name} IN ({values})"
        if pa.types.is_list(column.type):
            found[f"no_null_in({column.name})"] = f"NOT exists({column.name}, x -> x IS NULL)"
        if pa.types.is_floating(column.type):
            found[f"finite({column.name})"] = f"NOT isnan({column.name})"
    for name, wanted in (partition or {}).items():
        found[f"in_partition({name})"] = membership(name, wanted)
    return found


def membership(column: str, wanted: str | Collection[str]) -> str:
    """SQL: the column has the value, or one of the values. They are held to a narrow alphabet: raises InputError for any other."""
    values = sorted([wanted] if isinstance(wanted, str) else wanted)
    for value in values:
        if not re.fullmatch(r"[A-Za-z0-9_.:@+-]+", value):
            raise InputError(f"partition value {value!r} has characters other than letters, digits and _.:@+-")
    return f"{column} IN ({', '.join(repr(v) for v in values)})"


def validate(table: Table, observed: dict[str, Any], folder: Path) -> list[str]:
    """Names of the broken rules, by the table's suite on the aggregates.

    The outcome is kept as JSON in `folder`, a broken one as a page of Data Docs too.
    """
    import great_expectations as gx
    import pandas as pd

    frame = pd.DataFrame([{k: float(v) for k, v in observed.items()}])
    expectations = [
        gx.expectations.ExpectColumnValuesToBeBetween(
            column=name, min_value=table.min_rows if name == "rows" else 0, max_value=None if name == "rows" else 0
        )
        for name in frame.columns
    ]
    with LOCK, contextlib.redirect_stderr(io.StringIO()):  # progress bars of a one-row frame
        batch = _context().data_sources.get("aggregates").get_asset("written").get_batch_definition("whole").get_batch({"dataframe": frame})
        outcome = batch.validate(gx.ExpectationSuite(name=f"{table.name}-{table.version}", expectations=expectations))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{table.name}.json").write_text(json.dumps(outcome.to_json_dict(), indent=1, default=str))
    broken = [r.expectation_config.kwargs["column"] for r in outcome.results if not r.success]
    if broken:
        from great_expectations.render.renderer import ValidationResultsPageRenderer
        from great_expectations.render.view import DefaultJinjaPageView

        page = DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(outcome))
        (folder / f"{table.name}.html").write_text(page)
    return broken


@cache
def _context() -> Any:
    import great_expectations as gx

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    context = gx.get_context(mode="ephemeral")
    context.data_sources.add_pandas(name="aggregates").add_dataframe_asset(name="written").add_batch_definition_whole_dataframe("whole")
    return context
