"""Rollouts on disk become rows once."""

import pytest

from gr2 import artifacts
from gr2.errors import InputError, MissingInputError
from spark_jobs import rollouts
from training.rollouts import Rollout, store

pytestmark = pytest.mark.spark


def policy(ctx, name: str, run: str) -> None:
    with artifacts.publish_folder(ctx.root, name, {"fingerprint": run}) as folder:
        (folder / "config.json").write_text(f'"{run}"')


def left(ctx, run_id: str, step: int, count: int = 4) -> None:
    """What a training step leaves behind."""
    rows = [
        Rollout(f"{run_id}/{step}/p/{i}", run_id, step, "p", i, '<think></think>["A"]', "ok", 0.5, 0.5, 0.0, 0.1, True, 1.0, None, 1.0, 3,
                (1, 2, 3), (-0.5, -0.25, -0.125), (9,))
        for i in range(count)
    ]  # fmt: skip
    store(rows, ctx.work("rollouts", run_id) / f"step-{step:05d}.arrow")


def test_rollouts_of_the_current_policies_are_added_once(ctx):
    with pytest.raises(MissingInputError, match="gr2 stage rl"):
        rollouts.run(ctx.cfg, ctx)
    policy(ctx, "rl", "aaa")
    left(ctx, "rl-aaa", 1)
    left(ctx, "rl-aaa", 2)
    left(ctx, "rl-old", 1)  # of a model that is no longer current
    assert rollouts.run(ctx.cfg, ctx).rows_out == 8
    assert rollouts.run(ctx.cfg, ctx).rows_out == 0
    policy(ctx, "opd+rl", "bbb")
    left(ctx, "opd+rl-bbb", 1)
    result = rollouts.run(ctx.cfg, ctx)
    assert (result.rows_in, result.rows_out) == (12, 4)
    table = ctx.lake.read("rollouts", order_by=["rollout_id"])
    assert set(table["run"].to_pylist()) == {"rl-aaa", "opd+rl-bbb"}
    assert "token_ids" not in table.column_names


def test_lost_files_are_named_unless_their_rows_are_published(ctx):
    policy(ctx, "rl", "aaa")
    with pytest.raises(InputError, match="rl-aaa are gone"):
        rollouts.run(ctx.cfg, ctx)
    left(ctx, "rl-aaa", 1)
    rollouts.run(ctx.cfg, ctx)
    (ctx.work("rollouts", "rl-aaa") / "step-00001.arrow").unlink()
    assert rollouts.run(ctx.cfg, ctx).rows_out == 0
