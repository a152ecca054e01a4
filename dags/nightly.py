"""One night: the raw logs of a day to re-scored candidates, drift and a release; one task a stage, each `gr2 stage NAME --date DAY`.

    airflow dags test nightly 2026-01-28                                        that day, of the profile GR2_PROFILE (else demo)
    airflow dags trigger nightly --conf '{"profile": "demo", "date": "2026-01-28"}'
    airflow backfill create --dag-id nightly --from-date 2026-01-20 --to-date 2026-01-28 --max-active-runs 2

A run's logical date is the day that it processes, from its midnight: a backfill does its first day, its last one, and those between. What
the schedule starts, when the day is over, waits for the last logs (LATE), and is of the profile that the variable GR2_PROFILE names. Days
may run in any order, twice, and two at a time: the tables end alike. If the inputs moved (stage `drift`), the asset `gr2://retrain/wanted`
is updated, which starts the DAG `retrain` with this run's profile and settings; runs of a backfill never ask for it.
"""

import datetime as dt
from typing import Any

from airflow.sdk import CronDataIntervalTimetable, Param, dag, task

from dags.stages import DAY, DEFAULTS, LISTS, PROFILE, SETTINGS, WANTED, chain_by_tables, type_of

LATE = dt.timedelta(hours=2)  # logs of a day may come so long after it


@dag(
    dag_id="nightly",
    schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"),
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

    @task.sensor(mode="reschedule", poke_interval=300)
    def logs_are_in(data_interval_end: dt.datetime | None = None, dag_run: object = None) -> bool:
        """Whether the day's last logs had time to come. Who asks for a day, by hand or in a backfill, does not wait."""
        return type_of(dag_run) != "scheduled" or data_interval_end is None or dt.datetime.now(dt.UTC) >= data_interval_end + LATE

    @task.short_circuit(ignore_downstream_trigger_rules=False)
    def drifted(said: str, dag_run: object = None) -> bool:
        """Whether drift calls for new models. A backfill looks at days that are long gone: it never does."""
        return "retraining is called for" in said and type_of(dag_run) != "backfill"

    @task(outlets=[WANTED])
    def ask_for_retraining(params: dict[str, Any] | None = None, outlet_events: Any = None) -> None:
        """Updates the asset that `retrain` waits for, with the profile and settings that are to be retrained."""
        outlet_events[WANTED].extra = {name: (params or {})[name] for name in ("profile", "settings")}

    logs_are_in() >> tasks["events"]
    drifted(tasks["drift"]) >> ask_for_retraining()


nightly()
