"""A table that an older contract made, brought up to the contract of today (DESIGN contract 16).

Columns that may be null are added; anything else (another type, another layout, a column that is gone) needs the table to be replaced
whole, in the one commit that also brings the rows: until then readers see the old table. Rows of insert-only tables are never rewritten.
"""

from collections.abc import Collection

from pyspark.sql.types import StructType

from gr2.context import Context
from gr2.errors import AuditError
from gr2.pipeline import builder_of
from schemas.base import Table
from spark_jobs.session import alter, read


def migrate(ctx: Context, table: Table, wanted: StructType, properties: dict[str, str], whole: bool) -> bool:
    """Adds what can be added. Returns whether the coming write must replace the layout too (only if `whole`).

    Raises AuditError where the table must be replaced whole, and is not about to be.
    """
    opened = ctx.lake.open(table.name)
    had = {f.name: f.dataType for f in read(ctx, table.name).schema.fields}
    meta = opened.metadata()
    new = [f for f in wanted.fields if f.name not in had]
    other = [f.name for f in wanted.fields if f.name in had and had[f.name].simpleString() != f.dataType.simpleString()]
    other += [name for name in had if name not in wanted.fieldNames()] + [f.name for f in new if not f.nullable]
    if other or list(meta.partition_columns) != list(table.partition_by):
        if table.mode == "insert" or not whole:
            raise AuditError(_refusal(table, str(meta.configuration.get("gr2.version")), other))
        if "delta.constraints.laws" in meta.configuration:  # it may name a column that goes; the next publish sets it again
            alter(ctx, table.name, "DROP CONSTRAINT laws")
        return True
    for field in new:
        comment = (field.metadata or {}).get("comment", "").replace("'", "''")
        alter(ctx, table.name, f"ADD COLUMNS ({field.name} {field.dataType.simpleString()} COMMENT '{comment}')")
    due = {k: v for k, v in properties.items() if meta.configuration.get(k) != v}
    if due:
        said = ", ".join(f"'{k}' = '{v}'" for k, v in due.items())
        alter(ctx, table.name, f"SET TBLPROPERTIES ({said})")
    return False


def _refusal(table: Table, version: str, columns: Collection[str]) -> str:
    what = f"columns {', '.join(sorted(columns))}" if columns else "the partitioning"
    remedy = (
        "its rows are never rewritten: keep the old folder, and ingest again under a new data root"
        if table.mode == "insert"
        else f"replace it whole: `gr2 stage {builder_of(table.name)}` without --date"
    )
    return f"{table.name} was written under contract {version}, and {what} differ from {table.version}: {remedy}"
