"""The pipeline of one night: raw logs to re-scored candidates, release and report; one task a stage.

    airflow dags test nightly 2026-01-28                       the demo profile, all its days
    airflow dags trigger nightly --conf '{"profile": "beauty"}'

One task runs at a time: every stage uses all the cores that it finds.
"""

import datetime as dt

from airflow.sdk import dag

from dags.stages import PARAMS, chain_by_tables


@dag(
    dag_id="nightly",
    schedule="@daily",
    start_date=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    catchup=False,
    is_paused_upon_creation=True,
    max_active_runs=1,
    max_active_tasks=1,
    params=PARAMS,
    default_args={"retries": 0},
    tags=["gr2"],
    doc_md=__doc__,
)
def nightly() -> None:
    """Stages in the order in which they read each other's tables."""
    chain_by_tables()


nightly()
