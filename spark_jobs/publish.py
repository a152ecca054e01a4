"""Write, audit, publish: the one way a table changes (DESIGN contract 4).

A job's frame is written to a staging folder; what was *written* is audited against the table's contract in one pass, then one
atomic Delta commit publishes it. A failed audit publishes nothing, keeps the staged rows and raises with the rule and examples.
Content that equals what is published makes no new version, so a rerun leaves even the versions as they were.
"""

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from delta.tables import DeltaTable
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import ArrayType, StructType

import schemas
from gr2.context import Context
from gr2.errors import AuditError, GR2Error
from schemas.base import Table
from spark_jobs.migrations import migrate
from spark_jobs.session import alter, frame_of, remove, together
from validation import suites

if TYPE_CHECKING:
    from spark_jobs.increments import Built

Partition = Mapping[str, str | Collection[str]]  # column -> its value, or its values
PROPERTIES = {  # keep tables readable by delta-rs, DuckDB and Polars
    "delta.enableDeletionVectors": "false",
    "delta.checkpointInterval": "20",
}
RETRIES = 8


class Overtaken(GR2Error):
    """Another run published a table while a build of it was under way: what was built is not put on top of it."""


def reached(point: str, name: str) -> None:
    """The named points of a publish: begun, staged, audited, committed, cleaned. Tests kill a job at them, or hold it there."""


def publish(
    ctx: Context, name: str, frame: DataFrame, partition: Partition | None = None, built: "Built | None" = None, moving: bool = False
) -> int:
    """Publishes `frame` as table `name` (or as some of its partitions) and pins the version. Returns rows published (insert: added).

    `built`: what the rows were made from; it goes into the commit, and the rows go onto the version that the build started from or nowhere.
    `moving`: a row that is there may lie in another partition than it has now; its key is looked for in all of them.
    Raises AuditError if the frame's columns are not the contract's, or if the written rows break a law, the key or the suite; Overtaken
    if another run published the table since.
    """
    table = schemas.get(name)
    where = _predicate(partition) if partition else None  # first of all: it refuses values that are no plain names
    reached("begun", name)
    staged = f"{ctx.place}/staging/{name}-{uuid.uuid4().hex[:8]}"
    conform(table, frame).write.parquet(staged)
    reached("staged", name)
    written = ctx.spark.read.schema(spark_schema(table)).parquet(staged)
    observed, there = together(lambda: _audit(ctx, table, written, partition, staged), lambda: _published(ctx, table, where))
    reached("audited", name)
    target, reshaped = _ensure(ctx, table, whole=partition is None)
    if table.mode == "insert":
        count = _insert(table, target, written, {} if moving else {c: observed[f"values({c})"] for c in table.partition_by})
    else:
        if reshaped or there != (int(observed["rows"]), str(observed["content"] or 0)):
            _replace(ctx, table, written, where, built, reshaped)
        count = int(observed["rows"])
    reached("committed", name)
    remove(ctx, staged)
    version = ctx.lake.version(name)
    ctx.pin("tables", name, version)
    reached("cleaned", name)
    ctx.log(f"published {name} v{version}: {count} rows{' added' if table.mode == 'insert' else ''}{_told(partition)}")
    return count


def publish_rows(
    ctx: Context, name: str, rows: Iterable[dict[str, Any]], partition: Partition | None = None, built: "Built | None" = None
) -> int:
    """`publish` of rows that are at hand."""
    table = pa.Table.from_pylist(list(rows), schema=schemas.get(name).arrow())
    return publish(ctx, name, frame_of(ctx, table), partition, built)


def _told(partition: Partition | None) -> str:
    """The partitions in a line of the log."""
    parts = [f"{c} {v}" if isinstance(v, str) else f"{len(v)} of {c}" for c, v in (partition or {}).items()]
    return f" in {', '.join(parts)}" if parts else ""


def properties(table: Table) -> dict[str, str]:
    """Delta's properties of a table: those of all, the change feed where nights follow it, statistics of columns to filter by."""
    bare = [c for c in table.columns if not pa.types.is_nested(c.type) and not pa.types.is_boolean(c.type)]
    kept = [c.name for c in bare if not c.long and c.name not in table.partition_by]
    own = {"gr2.version": table.version, "delta.dataSkippingStatsColumns": ",".join(kept)}
    feed = {"delta.enableChangeDataFeed": "true"} if table.change_feed else {}
    few = {"delta.autoOptimize.optimizeWrite": "true"} if table.partition_by else {}  # else a file for each partition and task
    return {**PROPERTIES, **own, **feed, **few}


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
    row = frame.agg(F.count(F.lit(1)).alias("rows"), rows_hash(*content_of(table)).alias("content")).collect()[0]
    return int(row["rows"]), str(row["content"] or 0)


def content_of(table: Table) -> list[Column]:
    """What a hash of a row must see: the stable columns, and, since Spark's hash skips nulls and runs arrays together, which values are
    missing and how long each array is."""
    columns = [c for c in table.columns if c.name in table.stable()]
    lengths = [F.coalesce(F.size(c.name), F.lit(-1)) for c in columns if pa.types.is_nested(c.type)]
    missing = [F.isnull(c.name) for c in columns if c.nullable and not pa.types.is_nested(c.type)]
    return [*(F.col(c.name) for c in columns), *lengths, *missing]


def rows_hash(*columns: Column | str) -> Column:
    """An order-free hash of all rows, an aggregate."""
    return F.sum(F.xxhash64(*columns).cast("decimal(38,0)"))


def _audit(ctx: Context, table: Table, written: DataFrame, partition: Partition | None, staged: str) -> dict[str, Any]:
    """One aggregation over what was written, its keys counted beside it; then the table's suite over the aggregates."""
    told = {"content": rows_hash(*content_of(table))}  # no rule, but asked for in the same pass
    if table.mode == "insert":
        told |= {f"values({c})": F.collect_set(F.col(c).cast("string")) for c in table.partition_by}
    aggregates = [F.count(F.lit(1)).alias("rows"), *(column.alias(name) for name, column in told.items())]
    for rule, predicate in suites.rules(table, partition).items():
        aggregates.append(F.count_if(~F.coalesce(F.expr(predicate), F.lit(True))).alias(rule))
    keys = (table.key, *table.unique)
    hashed = (written.select(F.xxhash64(*columns)).distinct().count for columns in keys)  # eight bytes a row to shuffle
    rows, *distinct = together(written.agg(*aggregates).collect, *hashed)
    observed = rows[0].asDict()
    for columns, count in zip(keys, distinct, strict=True):
        if count < observed["rows"]:  # equal keys, or, once in a great while, equal hashes
            count = written.select(*columns).distinct().count()
        observed[f"duplicates({', '.join(columns)})"] = observed["rows"] - count
    broken = suites.validate(table, {k: v for k, v in observed.items() if k not in told}, ctx.root / "docs" / "suites")
    if broken:
        rule = broken[0]
        wanted = suites.rules(table, partition).get(rule)
        examples = [r.asDict() for r in written.where(~F.expr(wanted)).limit(3).collect()] if wanted else []
        raise AuditError(
            f"{table.name}: nothing published, {len(broken)} rule(s) broken: "
            + "; ".join(f"{r}: {observed[r]} rows" for r in broken)
            + f"; such as {examples or 'see the staged rows'}; kept in {staged.removeprefix(f'{ctx.place}/')}; "
            f"Data Docs: {(ctx.root / 'docs' / 'suites' / f'{table.name}.html').resolve().as_uri()}"
        )
    return observed


def _ensure(ctx: Context, table: Table, whole: bool) -> tuple[DeltaTable, bool]:
    """The Delta table, and whether its layout must be replaced.

    It is created by its contract if it is not there: comments, NOT NULL, laws as a CHECK constraint, properties. One that an older
    contract made is brought up to this one (`migrations`); `whole`: all its rows are about to be replaced.
    """
    path = ctx.table_path(table.name)
    if not ctx.lake.exists(table.name):
        builder = (
            DeltaTable.createIfNotExists(ctx.spark)
            .location(path)
            .addColumns(spark_schema(table))
            .comment(f"{table.grain}; key: {', '.join(table.key)}")
        )
        if table.partition_by:
            builder = builder.partitionedBy(*table.partition_by)
        for key, value in properties(table).items():
            builder = builder.property(key, value)
        builder.execute()
    reshaped = migrate(ctx, table, spark_schema(table), properties(table), whole)
    found = DeltaTable.forPath(ctx.spark, path)
    if table.laws and not reshaped and "delta.constraints.laws" not in ctx.lake.open(table.name).metadata().configuration:
        predicate = " AND ".join(f"({law})" for law in table.laws.values())  # from the contract, never from input
        alter(ctx, table.name, f"ADD CONSTRAINT laws CHECK ({predicate})")
    return found, reshaped


def _published(ctx: Context, table: Table, where: str | None) -> tuple[int, str] | None:
    """`content_hash` of what is about to be replaced; nothing where nothing was published, or by a contract of other columns."""
    if table.mode == "insert" or not ctx.lake.exists(table.name) or ctx.lake.version(table.name) == 0:
        return None
    current = ctx.spark.read.format("delta").load(ctx.table_path(table.name))
    if not set(table.stable()) <= set(current.columns):
        return None
    return content_hash(table, current.where(where) if where else current)


def _replace(ctx: Context, table: Table, written: DataFrame, where: str | None, built: "Built | None", reshaped: bool) -> None:
    path = ctx.table_path(table.name)
    if table.sort_by:
        written = written.repartitionByRange(*table.sort_by).sortWithinPartitions(*table.sort_by)
    writer = written.write.format("delta").mode("overwrite")
    if table.sort_by:
        writer = writer.option("optimizeWrite", "false")  # its shuffle would mix the ranges
    if reshaped:
        writer = writer.option("overwriteSchema", "true").partitionBy(*table.partition_by)
    if where:
        writer = writer.option("replaceWhere", where)
    if built is None:
        _with_retry(lambda: writer.save(path))
        return
    _not_overtaken(ctx, table.name, built.base, ctx.lake.version(table.name))
    try:
        writer.option("userMetadata", built.metadata()).save(path)
    except PySparkException as error:
        raise (Overtaken(f"{table.name}: another run changed the same partitions") if _conflict(error) else error) from None
    mine = next((c for c in ctx.lake.commits(table.name) if c.get("userMetadata") == built.metadata()), None)
    if mine:  # no rows over no rows commit nothing
        _not_overtaken(ctx, table.name, built.base, mine["readVersion"])  # one may have come between the look above and the commit


def _not_overtaken(ctx: Context, name: str, base: int, found: int) -> None:
    if base >= 0 and not ctx.lake.same_content(name, base, found):
        raise Overtaken(f"{name}: version {found} was published since version {base} was read")


def _insert(table: Table, target: DeltaTable, written: DataFrame, only: Partition) -> int:
    """Adds the rows whose key is new. `only`: the partitions that they lie in; without them a key is looked for in all.

    Two writers of one key conflict in Delta's log; the later one retries and then finds it.
    """
    keys = list(table.key)
    on = " AND ".join(f"old.{k} = new.{k}" for k in [*keys, *(c for c in only if c not in keys)])
    if not all(only.values()):
        return 0
    if only:  # as values: only so are the other partitions left unread
        on = f"{on} AND {_predicate(only, 'old.')}"
    merge = target.alias("old").merge(written.alias("new"), on).whenNotMatchedInsertAll()
    return int(_with_retry(merge.execute).collect()[0]["num_inserted_rows"])  # none: then nothing is committed


def _predicate(partition: Partition, prefix: str = "") -> str:
    """`replaceWhere` and MERGE take text only. Raises InputError for a value that is no plain name."""
    return " AND ".join(suites.membership(f"{prefix}{column}", wanted) for column, wanted in partition.items())


def _conflict(error: PySparkException) -> bool:
    return "CONCURRENT" in str(error).upper()


def _with_retry(commit: Callable[[], Any]) -> Any:
    """Retries a commit that lost a race; anything else passes through."""
    for attempt in range(RETRIES):
        try:
            return commit()
        except PySparkException as error:
            if not _conflict(error) or attempt == RETRIES - 1:
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")
