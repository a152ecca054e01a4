"""`gr2 airflow`: a local Airflow on SQLite with this project's DAGs, for one person's machine."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from gr2 import PROJECT


def settings(root: Path, port: int = 8080) -> dict[str, str]:
    """Environment of a local Airflow whose home lies under the data root."""
    return {
        "AIRFLOW_HOME": str(root.resolve() / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(PROJECT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",  # else tasks look for port 8080
        "AIRFLOW__API__HOST": "127.0.0.1",  # the default is every interface
        "AIRFLOW__API__PORT": str(port),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")])),
    }


def start(root: Path, profile: str, port: int) -> None:
    """Runs `airflow standalone` until Ctrl-C, then ends its whole group: its own children outlive a signal to it alone."""
    own = settings(root, port)
    environment = {**os.environ, **own, "GR2_PROFILE": profile}
    airflow = str(Path(sys.executable).parent / "airflow")
    subprocess.run([airflow, "db", "migrate"], env=environment, check=True, stdout=subprocess.DEVNULL)
    pool = [airflow, "pools", "set", "gpu", "1", "stages that train, or ask a model"]
    subprocess.run(pool, env=environment, check=True, stdout=subprocess.DEVNULL)
    print(f"Airflow on http://127.0.0.1:{port} (no password), home {root / 'airflow'}.")
    print(
        f"Unpause and trigger `retrain`, then `nightly` with a day that has logs. Their profile is {profile!r}, unless a run names another."
    )
    print("For `airflow` in another shell, there: " + shlex.join(["export", *(f"{k}={v}" for k, v in own.items())]))
    print("Ctrl-C ends it.")
    process = subprocess.Popen([airflow, "standalone"], env=environment, start_new_session=True)

    def end(*_: object) -> None:
        os.killpg(process.pid, signal.SIGTERM)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
