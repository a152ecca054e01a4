"""Fixtures shared by all tiers: a context on a folder of its own, with one Spark session for the whole run."""

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gr2.environment import set_defaults

set_defaults()

from gr2.config import load  # noqa: E402
from gr2.context import Context  # noqa: E402


@pytest.fixture
def make_ctx(tmp_path: Path) -> Callable[..., Context]:
    """`make_ctx(["rl.group=4"], profile="demo")`: a context whose root is this test's own folder."""

    def make(overrides: list[str] | None = None, profile: str = "demo") -> Context:
        lists = ["candidates.n=10"] if profile == "demo" else []  # as long as those of the tests' worlds
        return Context(load(profile, [f"paths.root={tmp_path / 'root'}", *lists, *(overrides or [])]))

    return make


@pytest.fixture
def ctx(make_ctx: Callable[..., Context]) -> Context:
    """A context of the demo profile."""
    return make_ctx()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Gives a port of this machine that nobody listens on."""

    def find() -> int:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            return int(found.getsockname()[1])

    return find


@pytest.fixture(scope="session", autouse=True)
def _stop_spark() -> Iterator[None]:
    yield
    from pyspark.sql import SparkSession

    if session := SparkSession.getActiveSession():
        logging.getLogger("py4j").setLevel(logging.ERROR)  # its farewell would go to a stream that pytest has closed
        session.stop()
