"""An Arrow table reaches Spark whole, however it was put together."""

import pyarrow as pa
import pytest

from spark_jobs.session import frame_of

pytestmark = pytest.mark.spark


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0, 2), (0, 0, 3, 0, 1), (0,)])
def test_no_row_is_lost_behind_an_empty_chunk(ctx, sizes):
    schema = pa.schema([("x", pa.int64()), ("words", pa.list_(pa.string()))])
    parts = [pa.Table.from_pylist([{"x": i, "words": ["a"] * i} for i in range(n)], schema=schema) for n in sizes]
    whole = pa.concat_tables(parts)
    assert sorted(frame_of(ctx, whole).toArrow().to_pylist(), key=str) == sorted(whole.to_pylist(), key=str)
