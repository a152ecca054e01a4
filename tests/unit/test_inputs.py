"""What comes from a command or a DAG run is typed and stays inside: fuzzed dates, settings, partitions, paths (DESIGN contract 14)."""

import datetime as dt
import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gr2.config import load
from gr2.context import parse_date
from gr2.errors import ConfigError, InputError, MissingInputError
from spark_jobs.publish import _predicate

NASTY = ["'", '"', "`", "..", "/", "\\", "$(id)", "{{ ds }}", "{%", ";", "--", "\n", "\x00", "%", " OR 1=1", "\u00e9", "\U0001d7da"]
texts = st.one_of(st.text(max_size=20), st.lists(st.sampled_from([*NASTY, "2026-01-05", "a", "-", "="]), max_size=5).map("".join))


@given(texts)
@example("2026-02-30")
@example("2023-02-29")
@example("2024-1-1")
@example("2024-02-29")
@example("\uff12\uff10\uff12\uff16-01-05")  # digits of another alphabet
@example("2026-01-05\n")
def test_only_a_day_of_the_calendar_is_a_date(text):
    try:
        found = parse_date(text)
    except InputError:
        return
    assert found is not None
    assert str(found) == text
    assert dt.date.fromisoformat(text) == found


@given(texts)
@example("2026-01-05' OR '1'='1")
def test_a_partition_is_a_plain_name_or_refused(text):
    try:
        found = _predicate({"period": text})
    except InputError:
        return
    assert re.fullmatch(r"period IN \('[A-Za-z0-9_.:@+-]+'\)", found)


@given(texts, texts)
@example("paths.root", "/etc")
@example("rl.group", "!!python/object/apply:os.system ['id']")
def test_a_setting_is_valid_or_named(key, value):
    assume(not key.startswith("paths"))
    try:
        cfg = load("demo", [f"{key}={value}"])
    except ConfigError:
        return
    except Exception as error:
        pytest.fail(f"{key}={value!r} ended in {type(error).__name__}: {error}")
    assert cfg.profile == "demo"


@given(texts)
@example("../demo")
@example("/etc/passwd")
@example("demo\x00")
def test_a_profile_is_a_file_in_conf(name):
    assume(name not in ("demo", "beauty", "production"))
    with pytest.raises(ConfigError, match="no profile"):
        load(name)


@given(st.lists(texts.filter(lambda t: "\x00" not in t and len(t.encode()) < 200), min_size=1, max_size=3))
@example(["..", "..", "etc"])
@example(["/etc"])
def test_work_stays_under_the_root(tmp_path_factory, parts):
    root = tmp_path_factory.getbasetemp() / "inputs"
    ctx = _context(root)
    try:
        path = ctx.work(*parts)
    except InputError:
        return
    assert path.is_relative_to((root / "work").resolve())


def test_a_link_that_leads_out_of_the_root_is_refused(tmp_path):
    ctx = _context(tmp_path / "root")
    ctx.work("x")
    (tmp_path / "root" / "work" / "out").symlink_to(tmp_path)
    with pytest.raises(InputError, match="leaves the data root"):
        ctx.work("out", "y")


@given(texts)
def test_a_model_that_is_none_is_named(name):
    assume("\x00" not in name and len(name.encode()) < 200)
    with pytest.raises((MissingInputError, InputError)):
        _context(None).model(name)


def _context(root):
    from gr2.context import Context

    return Context(load("demo", [f"paths.root={root or '/nonexistent/gr2'}"]))
