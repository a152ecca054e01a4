"""Mirrors of `metrics.jsonl` for those who watch: TensorBoard or MLflow, where `tracker` asks for one. The file stays the record.

TensorBoard's files lie under `<root>/logs/tensorboard`. MLflow's store is the one that the environment variable MLFLOW_TRACKING_URI names
(with its credentials, which are never told), else `<root>/logs/mlflow.db`. A store that fails under way costs the mirror, not the training.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from gr2.context import Context
from gr2.errors import EnvironmentProblem


class Tracker:
    """Mirrors nothing; the others mirror every number of a line, at its step."""

    def __init__(self, ctx: Context | None = None) -> None:
        self.ctx = ctx

    def log(self, line: Mapping[str, Any]) -> None:
        """Takes a line of metrics.jsonl; what is no finite number is left out."""
        values = {k: float(v) for k, v in line.items() if k != "step" and isinstance(v, int | float) and math.isfinite(v)}
        self._tried(lambda: self._put(int(line["step"]), values))

    def close(self) -> None:
        """Writes what is still held back, and ends the mirror."""
        self._tried(self._end)

    def _tried(self, what: Callable[[], None]) -> None:
        if self.ctx is None:
            return
        try:
            what()
        except Exception as error:  # whatever a store far away may raise; its text may hold the address, with a password
            self.ctx.log(f"the tracker failed ({type(error).__name__}): training goes on without it")
            self.ctx = None

    def _put(self, step: int, values: dict[str, float]) -> None: ...

    def _end(self) -> None: ...


def open_tracker(ctx: Context | None, run: str, step: int, first: bool = True) -> Tracker:
    """The tracker that the profile asks for, on the first process. A run is known by its name, and goes on after `step`.

    Raises EnvironmentProblem where its library is missing or its store cannot be opened.
    """
    kind = ctx.cfg.tracker if ctx is not None and first else "none"
    if ctx is None or kind == "none":
        return Tracker()
    made = {"tensorboard": TensorBoard, "mlflow": MLflow}[kind]
    try:
        return made(ctx, run, step)
    except ImportError:
        raise EnvironmentProblem(f"tracker {kind} is not installed: `uv sync --extra {kind}`, or set tracker to none") from None
    except Exception as error:
        raise EnvironmentProblem(f"tracker {kind} could not be opened ({type(error).__name__}): see training/trackers.py") from None


class TensorBoard(Tracker):
    """Event files. What a killed run wrote beyond the step where it goes on is not shown."""

    def __init__(self, ctx: Context, run: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(ctx)
        self.writer = SummaryWriter(str(ctx.root / "logs" / "tensorboard" / run), purge_step=step + 1, flush_secs=15)

    def _put(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def _end(self) -> None:
        self.writer.close()


class MLflow(Tracker):
    """A run in the experiment `gr2-<profile>`; one that was killed is taken up again, at step 0 too: RL tells all its steps anew."""

    def __init__(self, ctx: Context, run: str, _: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        super().__init__(ctx)
        store, name = ctx.root / "logs" / "mlflow.db", f"gr2-{ctx.cfg.profile}"
        store.parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store}")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        found = self.client.search_runs([experiment], f"tags.`gr2.run` = '{run}'", max_results=1)
        tags = {"gr2.run": run}
        self.run = (found[0] if found else self.client.create_run(experiment, run_name=run, tags=tags)).info.run_id

    def _put(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def _end(self) -> None:
        self.client.set_terminated(self.run)
