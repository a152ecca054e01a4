"""Write, audit, publish: the one way a table changes (DESIGN contract 4).

A job's frame is written to a staging folder; what was *written* is audited against the table's contract in one pass, then one
atomic Delta commit publishes it. A failed audit publishes nothing, keeps the staged rows and raises with the rule and examples.
Content that equals what is published makes no new version, so a rerun leaves even the versions as they were.
"""

import re
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from delta.tables import DeltaTable
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import ArrayType, StructType

import schemas
from gr2.context import Context
from gr2.errors import AuditError, InputError
from schemas.base import Table
from validation import suites

PROPERTIES = {  # keep tables readable by delta-rs, DuckDB and Polars
    "delta.enableDeletionVectors": "false",
    "delta.checkpointInterval": "20",
}
RETRIES = 8


def publish(ctx: Context, name: str, frame: DataFrame, partition: dict[str, str] | None = None) -> int:
    """Publishes `frame` as table `name` (or as one of its partitions) and pins the version. Returns rows published (insert: added).

    Raises AuditError if the frame's columns are not the contract's, or if the written rows break a law, the key or the suite.
    """
    table = schemas.get(name)
    staged = ctx.root / "staging" / f"{name}-{uuid.uuid4().hex[:8]}"
    conform(table, frame).write.parquet(str(staged))
    written = ctx.spark.read.schema(spark_schema(table)).parquet(str(staged))
    observed = _audit(ctx, table, written, partition, staged)
    target = _ensure(ctx, table)
    if table.mode == "insert":
        count = _insert(ctx, table, target, written)
    else:
        _replace(ctx, table, written, partition, observed)
        count = int(observed["rows"])
    shutil.rmtree(staged, ignore_errors=True)
    version = ctx.lake.version(name)
    ctx.pin("tables", name, version)
    ctx.log(
        f"published {name} v{version}: {count} rows{' added' if table.mode == 'insert' else ''}" + (f" in {partition}" if partition else "")
    )
    return count


def spark_schema(table: Table) -> StructType:
    """Spark types of a contract, comments and nullability included."""
    schema = from_arrow_schema(table.arrow())
    for field, column in zip(schema.fields, table.columns, strict=True):
        field.nullable, field.metadata = column.nullable, {"comment": column.comment}
        if isinstance(
            field.dataType, ArrayType
        ):  # Parquet reads lists back with nullable elements, and MERGE does not narrow: a rule audits them
            field.dataType = ArrayType(field.dataType.elementType, True)
    return schema


def conform(table: Table, frame: DataFrame) -> DataFrame:
    """The frame's columns in the contract's order and types. Raises AuditError for a missing or an undeclared column."""
    missing, extra = set(table.names()) - set(frame.columns), set(frame.columns) - set(table.names())
    if missing or extra:
        raise AuditError(f"{table.name}: columns differ from its contract: missing {sorted(missing)}, undeclared {sorted(extra)}")
    return frame.select([F.col(f.name).cast(f.dataType).alias(f.name) for f in spark_schema(table).fields])


def content_hash(table: Table, frame: DataFrame) -> tuple[int, str]:
    """Rows and an order-free hash of the stable columns: equal for equal content (DESIGN contract 1)."""
    row = frame.agg(F.count(F.lit(1)).alias("rows"), _hash_of(table)).collect()[0]
    return int(row["rows"]), str(row["content"] or 0)


def _hash_of(table: Table) -> Any:
    return F.sum(F.xxhash64(*table.stable()).cast("decimal(38,0)")).alias("content")


def _audit(ctx: Context, table: Table, written: DataFrame, partition: dict[str, str] | None, staged: Path) -> dict[str, float]:
    """One aggregation over what was written; then the table's suite over the aggregates."""
    aggregates = [F.count(F.lit(1)).alias("rows"), _hash_of(table)]
    for rule, predicate in suites.rules(table, partition).items():
        aggregates.append(F.count_if(~F.coalesce(F.expr(predicate), F.lit(True))).alias(rule))
    observed = written.agg(*aggregates).collect()[0].asDict()
    for columns in (table.key, *table.unique):
        distinct = written.select(*columns).distinct().count()
        observed[f"duplicates({', '.join(columns)})"] = observed["rows"] - distinct
    broken = suites.validate(table, {k: v for k, v in observed.items() if k != "content"}, ctx.root / "docs" / "suites")
    if broken:
        rule = broken[0]
        wanted = suites.rules(table, partition).get(rule)
        examples = [r.asDict() for r in written.where(~F.expr(wanted)).limit(3).collect()] if wanted else []
        raise AuditError(
            f"{table.name}: nothing published, {len(broken)} rule(s) broken: "
            + "; ".join(f"{r}: {observed[r]} rows" for r in broken)
            + f"; such as {examples or 'see the staged rows'}; kept in {staged.relative_to(ctx.root)}"
        )
    return observed


def _ensure(ctx: Context, table: Table) -> DeltaTable:
    """The Delta table, created by its contract if it is not there: comments, NOT NULL, laws as a CHECK constraint, properties."""
    path = str(ctx.table_path(table.name))
    if not ctx.lake.exists(table.name):
        builder = (
            DeltaTable.createIfNotExists(ctx.spark)
            .location(path)
            .addColumns(spark_schema(table))
            .comment(f"{table.grain}; key: {', '.join(table.key)}")
        )
        if table.partition_by:
            builder = builder.partitionedBy(*table.partition_by)
        for key, value in {**PROPERTIES, "gr2.version": table.version}.items():
            builder = builder.property(key, value)
        builder.execute()
    found = DeltaTable.forPath(ctx.spark, path)
    if table.laws and "delta.constraints.laws" not in found.detail().collect()[0]["properties"]:
        predicate = " AND ".join(f"({law})" for law in table.laws.values())  # from the contract, never from input
        ctx.spark.sql("ALTER TABLE delta.`{}` ADD CONSTRAINT laws CHECK ({})".format(path.replace("`", "``"), predicate))
    return found


def _replace(ctx: Context, table: Table, written: DataFrame, partition: dict[str, str] | None, observed: dict[str, float]) -> None:
    path = str(ctx.table_path(table.name))
    current = ctx.spark.read.format("delta").load(path)
    where = _predicate(partition) if partition else None
    if where:
        current = current.where(where)
    if content_hash(table, current) == (int(observed["rows"]), str(observed["content"] or 0)) and ctx.lake.version(table.name) > 0:
        return
    writer = written.write.format("delta").mode("overwrite")
    if where:
        writer = writer.option("replaceWhere", where)
    _with_retry(lambda: writer.save(path))


def _insert(ctx: Context, table: Table, target: DeltaTable, written: DataFrame) -> int:
    """Adds the rows whose key is new. Two writers of one key conflict in Delta's log; the later one retries and then finds it."""
    current = ctx.spark.read.format("delta").load(str(ctx.table_path(table.name)))
    keys = list(table.key)
    added = written.join(current.select(keys), on=keys, how="left_anti").count()
    if added:
        on = " AND ".join(f"old.{k} = new.{k}" for k in [*keys, *(c for c in table.partition_by if c not in keys)])
        _with_retry(lambda: target.alias("old").merge(written.alias("new"), on).whenNotMatchedInsertAll().execute())
    return added


def _predicate(partition: dict[str, str]) -> str:
    """`replaceWhere` takes text only: values are held to a narrow alphabet."""
    for value in partition.values():
        if not re.fullmatch(r"[A-Za-z0-9_.:@+-]+", value):
            raise InputError(f"partition value {value!r} has characters other than letters, digits and _.:@+-")
    return " AND ".join(f"{column} = '{value}'" for column, value in partition.items())


def _with_retry(commit: Any) -> None:
    """Retries a commit that lost a race; anything else passes through."""
    for attempt in range(RETRIES):
        try:
            commit()
            return
        except PySparkException as error:
            if "CONCURRENT" not in str(error).upper() or attempt == RETRIES - 1:
                raise
            time.sleep(0.2 * 2**attempt)
