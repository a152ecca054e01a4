"""New models from all the data there are: every stage, without a date, up to a release that is promoted only if it is better.

    airflow dags trigger retrain --conf '{"profile": "beauty"}'

It also starts when the asset `gr2://retrain/wanted` is updated, with the profile and settings that the update names (`nightly` names its
own); what none names is the default, the profile that of the variable GR2_PROFILE, else demo. Such a run has no logical date, and needs
none: it reads what the nights have brought together. Several updates while one run is under way start one further run; if they ask for
different things it fails and says so, rather than do one of them. Stage `release` promotes the new models if they beat those that are out
on the validation lists of both (`release.gate`); else the release that is out stays.
"""

import datetime as dt

from airflow.sdk import dag

from dags.stages import DEFAULTS, PROFILE, RELEASE, SETTINGS, WANTED, chain_by_tables


@dag(
    dag_id="retrain",
    schedule=[WANTED],
    start_date=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
    catchup=False,
    is_paused_upon_creation=True,
    max_active_runs=1,
    max_active_tasks=1,
    params={"profile": PROFILE, "settings": SETTINGS},
    default_args=DEFAULTS,
    tags=["gr2"],
    doc_md=__doc__,
)
def retrain() -> None:
    """Stages in the order in which they read each other's tables and models."""
    chain_by_tables("build", {"release": [RELEASE]})


retrain()
