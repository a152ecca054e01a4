"""Trackers mirror metrics.jsonl, number for number, also over a kill, and tell no secret."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gr2.config import load
from gr2.context import Context
from gr2.errors import EnvironmentProblem
from tests.e2e.loop_world import FAST, Stop, run, stop_after
from training.trackers import open_tracker

pytestmark = pytest.mark.e2e


def context(root: Path, kind: str) -> Context:
    return Context(load("demo", [f"paths.root={root}", f"tracker={kind}"]))


def tensorboard(ctx: Context) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (ctx.root / "logs" / "tensorboard").iterdir()
    assert folder.name == "sft-a"
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def mlflow(ctx: Context) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{ctx.root}/logs/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("gr2-demo").experiment_id])
    assert (found.info.run_name, found.info.status) == ("sft-a", "FINISHED")
    told = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    return {name: sorted({(m.step, m.value) for m in values}) for name, values in told.items() if name != "seconds"}


@pytest.mark.parametrize("read", [tensorboard, mlflow])
def test_a_tracker_mirrors_the_curve_over_a_kill(tokenizer: Any, tmp_path: Path, read: Callable[..., Any]) -> None:
    ctx, home = context(tmp_path / "root", read.__name__), tmp_path / "checkpoint"
    settings = FAST.model_copy(update={"max_steps": 6, "checkpoint_every": 2})
    more: dict[str, Any] = {"checkpoint": home, "fingerprint": "a", "label": "sft", "ctx": ctx}
    with pytest.raises(Stop):
        run(tokenizer, tmp_path / "out", settings, loss=stop_after(5), **more)
    run(tokenizer, tmp_path / "out", settings, **more)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = read(ctx)
    assert {"loss", "grad_norm", "lr", "tokens"} <= found.keys() <= lines[0].keys()
    for name in found.keys() - {"seconds"}:
        assert [step for step, _ in found[name]] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in found[name]] == pytest.approx([line[name] for line in lines], rel=1e-6)


def test_without_a_tracker_nothing_is_written(tokenizer: Any, tmp_path: Path) -> None:
    ctx = context(tmp_path / "root", "none")
    run(tokenizer, tmp_path / "out", FAST.model_copy(update={"max_steps": 1}), ctx=ctx)
    open_tracker(context(tmp_path / "root", "tensorboard"), "sft-a", 0, first=False).log({"step": 1, "loss": 1.0})
    assert not (tmp_path / "root" / "logs" / "tensorboard").exists()


def test_a_store_that_fails_costs_the_mirror_alone_and_tells_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ctx = context(tmp_path, "mlflow")
    tracker: Any = open_tracker(ctx, "sft-a", 0)
    tracker.client.delete_run(tracker.run)
    for step in (1, 2):
        tracker.log({"step": step, "loss": 1.0})
    tracker.close()
    assert capsys.readouterr().err.count("goes on without it") == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(EnvironmentProblem, match="could not be opened") as caught:
        open_tracker(ctx, "sft-a", 0)
    assert "hunter2" not in str(caught.value) + capsys.readouterr().err
    assert "hunter2" not in (tmp_path / "logs" / "gr2.log").read_text()


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow"])
def test_a_store_that_is_gone_at_the_end_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    tracker: Any = open_tracker(context(tmp_path, kind), "sft-a", 0)
    tracker.log({"step": 1, "loss": 1.0})

    def gone(*_: Any) -> None:
        raise OSError("gone")

    held, name = (tracker.writer, "close") if kind == "tensorboard" else (tracker.client, "set_terminated")
    monkeypatch.setattr(held, name, gone)
    tracker.close()
    assert capsys.readouterr().err.count("goes on without it") == 1


def test_a_run_that_tells_all_its_steps_anew_is_the_same_run(tmp_path: Path) -> None:
    """RL repeats its stored steps after a kill."""
    runs: list[Any] = [open_tracker(context(tmp_path, "mlflow"), name, 0) for name in ("rl-a", "rl-b", "rl-a")]
    assert runs[0].run == runs[2].run != runs[1].run


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow")])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentProblem, match=f"--extra {kind}"):
        open_tracker(context(tmp_path, kind), "sft-a", 0)
