"""What is read back as a checkpoint: only whole folders of our own, every byte as it was written."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gr2.errors import ModelError
from training import checkpoints

pytestmark = pytest.mark.unit


def make(folder: Path, content: bytes = b"weights") -> Path:
    """A checkpoint as `save` leaves it, without an engine."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state-00001.safetensors").write_bytes(content)
    (folder / "state.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps(checkpoints._digests(folder)))
    return folder


def test_a_whole_folder_is_accepted(tmp_path: Path) -> None:
    checkpoints.verify(make(tmp_path / "step-000001"))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(min_size=1, max_size=40), st.data())
def test_any_changed_byte_is_found(tmp_path: Path, content: bytes, data: st.DataObject) -> None:
    folder = make(tmp_path / "step-000001", content)
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytes([content[place] ^ data.draw(st.integers(1, 255))])
    (folder / "state-00001.safetensors").write_bytes(content[:place] + changed + content[place + 1 :])
    with pytest.raises(ModelError, match=r"state-00001\.safetensors"):
        checkpoints.verify(folder)


@pytest.mark.parametrize("harm", ["missing", "added", "no manifest", "empty manifest"])
def test_any_other_set_of_files_is_refused(tmp_path: Path, harm: str) -> None:
    folder = make(tmp_path / "step-000001")
    if harm == "missing":
        (folder / "state-00001.safetensors").unlink()
    elif harm == "added":
        (folder / "state-00002.safetensors").write_bytes(b"x")
    elif harm == "no manifest":
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text("{}")
    with pytest.raises(ModelError, match="remove it to start again"):
        checkpoints.verify(folder)


def test_the_pointer_stays_inside_its_folder(tmp_path: Path) -> None:
    home = tmp_path / "checkpoint"
    home.mkdir()
    assert checkpoints.latest(home) is None
    (home / "latest.json").write_text(json.dumps({"folder": "../elsewhere"}))
    make(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="points outside"):
        checkpoints.latest(home)
    (home / "latest.json").write_text(json.dumps({"folder": "step-000002"}))
    assert checkpoints.latest(home) is None  # removed by hand: start again
    make(home / "step-000002")
    assert checkpoints.latest(home) == home / "step-000002"
