"""Offline re-ranking of any days by any model: the lists of each night, and what the model makes of them.

    airflow dags trigger backfill_rerank --conf '{"first": "2026-01-20", "last": "2026-01-28", "model": "opd+rl", "mode": "think"}'
    airflow backfill create --dag-id backfill_rerank --from-date 2026-01-20 --to-date 2026-01-28 --dag-run-conf '{"model": "sft"}'

On its own parameters a run does the days from `first` to `last`; in a backfill each run does its logical date. Lists that are there stay
as they were served; a day without lists gets those of the pre-ranker that is out, which may know what followed. Answers that are there are
not asked again. In the mode score a model is judged by what it scored of the experiment's lists: where that is nothing, the task fails and
says what to run. Nothing here starts another DAG.
"""

import datetime as dt
from typing import Any

from airflow.exceptions import AirflowFailException
from airflow.sdk import Param, dag, task

from dags.stages import DAY, DEFAULTS, GPU_POOL, PROFILE, SETTINGS, call, tell, type_of

MOST = 366  # days of one run


def days_of(params: dict[str, Any], ds: str | None) -> list[str]:
    """The days from `first` to `last`, or the run's own. Raises AirflowFailException for an empty or endless range."""
    first, last = (str(params[name]) if params[name] != "run" else ds for name in ("first", "last"))
    if not first or not last:
        raise AirflowFailException("this run has no logical date: say the days, {'first': 'YYYY-MM-DD', 'last': 'YYYY-MM-DD'}")
    begin, end = dt.date.fromisoformat(first), dt.date.fromisoformat(last)
    if not 0 <= (end - begin).days < MOST:
        raise AirflowFailException(f"{first} to {last}: the last day must not lie before the first, nor more than {MOST} days on")
    return [str(begin + dt.timedelta(days=n)) for n in range((end - begin).days + 1)]


@dag(
    dag_id="backfill_rerank",
    schedule="@daily",  # so that `airflow backfill create` knows its days; what the schedule itself starts does nothing
    start_date=dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
    catchup=False,
    is_paused_upon_creation=True,
    max_active_runs=1,
    max_active_tasks=1,
    params={
        "profile": PROFILE,
        "first": Param("run", type="string", pattern=f"^(run|{DAY})$", description="First day; run: the run's own (its logical date)."),
        "last": Param("run", type="string", pattern=f"^(run|{DAY})$", description="Last day, included."),
        "model": Param(
            "rl", type="string", pattern="^[a-z0-9][a-z0-9_+.-]{0,40}$", description="A model's name, as in `gr2 release list`."
        ),
        "mode": Param("score", type="string", enum=["think", "direct", "score"]),
        "settings": SETTINGS,
    },
    default_args=DEFAULTS,
    tags=["gr2"],
    doc_md=__doc__,
)
def backfill_rerank() -> None:
    """The days one after the other: each makes its lists where data or settings changed since, then asks the model."""

    @task(on_failure_callback=tell)
    def days(params: dict[str, Any] | None = None, ds: str | None = None, dag_run: object = None) -> list[str]:
        """The days to do: none where the schedule started the run, not a person."""
        return [] if type_of(dag_run) == "scheduled" else days_of(params or {}, ds)

    @task(pool=GPU_POOL, on_failure_callback=tell, map_index_template="{{ day }}")
    def rerank(day: str, params: dict[str, Any] | None = None) -> str:
        """Lists and answers of one day."""
        run = params or {}
        own = (f"scoring.live.{run['model']}=[{run['mode']}]", "release.gate=false")  # nothing is released, so nothing need be compared
        call("candidates", run["profile"], day, run["settings"], own)
        return call("rerank_scores", run["profile"], day, run["settings"], own)

    rerank.expand(day=days())


backfill_rerank()
