"""Lineage through the real client to a file: versions read and written, failures with their reason, silence where nobody listens."""

import json

import pytest

from gr2 import lineage
from gr2.errors import AuditError


@pytest.fixture
def events(monkeypatch, tmp_path):
    """Reads what was told so far."""
    path = tmp_path / "lineage.jsonl"
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "file")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", str(path))
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__APPEND", "true")
    return lambda: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def tables(monkeypatch, ctx):
    """Versions of tables, as a run finds and leaves them."""
    there = {"events": 3, "interactions": 7}
    monkeypatch.setattr(type(ctx.lake), "exists", lambda self, name: name in there)
    monkeypatch.setattr(type(ctx.lake), "version", lambda self, name: there[name])
    return there


def test_a_run_tells_the_versions_that_it_read_and_wrote(ctx, tables, events):
    with lineage.told("interactions", ctx, ("events", "items"), ("interactions", "histories")):
        tables |= {"interactions": 8, "histories": 1, "events": 4}
    start, done = events()
    assert (start["eventType"], done["eventType"]) == ("START", "COMPLETE")
    assert start["run"]["runId"] == done["run"]["runId"]
    assert done["job"]["name"] == "demo.interactions"
    versions = [{d["name"]: d["facets"]["version"]["datasetVersion"] for d in done[side]} for side in ("inputs", "outputs")]
    assert versions == [{"tables/events": "3"}, {"tables/interactions": "8", "tables/histories": "1"}]


def test_a_failure_is_told_with_its_reason_and_passes_through(ctx, tables, events):
    with pytest.raises(AuditError), lineage.told("interactions", ctx, ("events",), ("interactions",)):
        raise AuditError("nothing published")
    failed = events()[-1]
    assert failed["eventType"] == "FAIL"
    assert failed["run"]["facets"]["errorMessage"]["message"] == "AuditError: nothing published"
    assert failed["outputs"] == []


def test_nobody_listens_nothing_is_told_and_an_unreachable_listener_fails_nothing(ctx, tables, monkeypatch, capsys):
    with lineage.told("interactions", ctx, ("events",), ()):
        pass
    assert "lineage" not in capsys.readouterr().err
    monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__RETRY__TOTAL", "0")
    with lineage.told("interactions", ctx, ("events",), ()):
        pass
    assert "not told" in capsys.readouterr().err
