"""One night: the raw logs of a day to re-scored candidates, drift and a release; one task a stage, each `gr2 stage NAME --date DAY`.

    airflow dags test nightly 2026-01-28                                        the demo profile, that day
    airflow dags trigger nightly --conf '{"profile": "demo", "date": "2026-01-28"}'
    airflow backfill create --dag-id nightly --from-date 2026-01-20 --to-date 2026-01-28 --max-active-runs 2

A run's logical date is the day that it processes (the interval's beginning), so a run starts after its day is over. Days may run in any
order, twice, and two at a time: the tables end alike. If the inputs moved (stage `drift`), the asset `gr2://retrain/wanted` is updated,
which starts the DAG `retrain`; runs of a backfill never ask for it.
"""

import datetime as dt

from airflow.sdk import CronDataIntervalTimetable, Param, dag, task

from dags.stages import DAY, DEFAULTS, LISTS, PROFILE, SETTINGS, WANTED, chain_by_tables, type_of


@dag(
    dag_id="nightly",
    schedule=CronDataIntervalTimetable("0 2 * * *", timezone="UTC"),
    start_date=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    catchup=False,
    is_paused_upon_creation=True,
    max_active_runs=1,
    max_active_tasks=1,  # every stage uses all the cores that it finds
    params={
        "profile": PROFILE,
        "date": Param("run", type="string", pattern=f"^(run|{DAY})$", description="The day: run is the run's own (its logical date)."),
        "settings": SETTINGS,
    },
    default_args=DEFAULTS,
    tags=["gr2"],
    doc_md=__doc__,
)
def nightly() -> None:
    """Stages in the order in which they read each other's tables."""
    tasks = chain_by_tables("night", {"rerank_scores": [LISTS]})

    @task.short_circuit(ignore_downstream_trigger_rules=False)
    def drifted(said: str, dag_run: object = None) -> bool:
        """Whether drift calls for new models. A backfill looks at days that are long gone: it never does."""
        return "retraining is called for" in said and type_of(dag_run) != "backfill"

    @task(outlets=[WANTED])
    def ask_for_retraining() -> None:
        """Updates the asset that `retrain` waits for."""

    drifted(tasks["drift"]) >> ask_for_retraining()


nightly()
