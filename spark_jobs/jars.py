"""Fetches the seven Delta jars once into the project's cache, with the Ivy that pyspark ships; checks their SHA-256.

Run by `make setup`: `python -m spark_jobs.jars`. Later sessions start without a network.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from gr2.environment import CACHE, JARS
from gr2.errors import EnvironmentProblem

DELTA, UNITY = "4.4.0", "0.6.0"
SHA256 = {
    "delta-kernel-api-4.4.0.jar": "ee9b5a14ac3b7efdff4d61a58478fe8eb0e5a3fbca43889dca7290795fe79a11",
    "delta-kernel-defaults-4.4.0.jar": "225c975199e4718b38ee5b7e6da7f19e9585024262b2cec2656b32151a856b0b",
    "delta-kernel-unitycatalog-4.4.0.jar": "cea22dfb4ac562b3cd27bf652697750e8336009d73fb06631363aaaad5345ffa",
    "delta-spark_4.2_2.13-4.4.0.jar": "27d4fd8b1f879535c573ed1c718177d6a27f24d3e626ba02e216369725721ead",
    "delta-storage-4.4.0.jar": "c46735481fa8e326b0957be02b4420cbcab4b325bb08009b7f2045a95133f1cc",
    "unitycatalog-client-0.6.0.jar": "48257499a86b801a3e2372cec55ac226ca1c1c7eabe5c118e7302f29a1fdbc19",
    "unitycatalog-hadoop-0.6.0.jar": "c47b63c961c87102b9e1d63809a0915ba4c86b7652f57c8d39ca3a05b441a150",
}
ARTIFACTS = (
    ("io.delta", "delta-spark_4.2_2.13", DELTA), ("io.delta", "delta-storage", DELTA), ("io.delta", "delta-kernel-api", DELTA),
    ("io.delta", "delta-kernel-defaults", DELTA), ("io.delta", "delta-kernel-unitycatalog", DELTA),
    ("io.unitycatalog", "unitycatalog-client", UNITY), ("io.unitycatalog", "unitycatalog-hadoop", UNITY),
)  # fmt: skip


def fetch() -> list[Path]:
    """Paths of the seven jars, downloaded where missing. Raises EnvironmentProblem if one is missing or not what it should be.

    Exactly these seven: Delta's full list of 33 holds an older Jackson that crashes Spark when it comes first on the class path.
    """
    wanted = [JARS / name for name in SHA256]
    if not all(p.exists() for p in wanted):
        retrieve(ARTIFACTS)
    for path in wanted:
        if not path.exists():
            raise EnvironmentProblem(f"{path.name} could not be fetched: is Maven Central reachable? Try `make setup` again")
        if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[path.name]:
            raise EnvironmentProblem(f"{path.name} is not the published file: delete {path} and run `make setup` again")
    return wanted


def retrieve(artifacts: tuple[tuple[str, str, str], ...], folder: Path = JARS) -> None:
    """Downloads jars (organisation, name, version), without what they depend on. Raises EnvironmentProblem with what Ivy said."""
    import pyspark

    ivy = next((Path(pyspark.__file__).parent / "jars").glob("ivy-*.jar"))
    home = CACHE / "ivy"
    home.mkdir(parents=True, exist_ok=True)
    lines = [f'<dependency org="{o}" name="{n}" rev="{v}" conf="default->master" transitive="false"/>' for o, n, v in artifacts]
    recipe = home / "ivy.xml"
    recipe.write_text(
        '<ivy-module version="2.0"><info organisation="gr2" module="jars"/><dependencies>' + "".join(lines) + "</dependencies></ivy-module>"
    )
    command = ["java", "-jar", str(ivy), "-ivy", str(recipe), "-cache", str(home), "-types", "jar", "-m2compatible"]
    done = subprocess.run([*command, "-retrieve", f"{folder}/[artifact]-[revision].[ext]"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentProblem(f"jars could not be fetched: {done.stdout[-500:]}{done.stderr[-500:]}")


if __name__ == "__main__":
    try:
        fetch()
    except EnvironmentProblem as problem:
        sys.exit(str(problem))
