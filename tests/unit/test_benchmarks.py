"""What every benchmark's table says of itself."""

import re

from tables import put

from benchmarks.stages import header
from gr2.config import load
from gr2.context import Context


def test_a_figure_stands_under_its_commit_machine_and_tables_versions(tmp_path):
    ctx = Context(load("demo", [f"paths.root={tmp_path / 'one'}"]))
    for _ in range(3):
        put(ctx, "item_stats", [])
    put(ctx, "baselines", [])
    first, *roots = header("ranking", tmp_path / "one", tmp_path / "none").strip("\n").splitlines()
    assert re.fullmatch(r"ranking: commit ([0-9a-f]{7,}|unknown), \d+ cores of .+, with(out)? bf16 units", first)
    assert roots == ["one: baselines v0, item_stats v2", "none: "], "the version that is read, of each table that is there"
