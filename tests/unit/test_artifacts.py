"""Published folders: whole or not at all, equal content is one version, refused file types never get in."""

import json

import pytest

from gr2.artifacts import names, publish_folder, resolve
from gr2.errors import MissingInputError, ModelError

pytestmark = pytest.mark.unit


def put(root, text: str, name: str = "m", curve: str = "curves are not content", **manifest: int) -> None:
    with publish_folder(root, name, {"seed": 1, **manifest}) as folder:
        (folder / "config.json").write_text(text)
        (folder / "metrics.jsonl").write_text(curve)


def test_a_published_model_resolves_with_its_manifest(tmp_path):
    put(tmp_path, "a")
    found = resolve(tmp_path, "m")
    assert found.id == f"m@{found.hash}"
    assert found.manifest["seed"] == 1
    assert names(tmp_path) == ["m"]


def test_equal_content_keeps_the_version_and_changed_content_keeps_the_old_one_readable(tmp_path):
    put(tmp_path, "a")
    first = resolve(tmp_path, "m")
    put(tmp_path, "a")
    assert resolve(tmp_path, "m").hash == first.hash
    put(tmp_path, "b")
    second = resolve(tmp_path, "m")
    assert second.hash != first.hash
    assert (resolve(tmp_path, "m", first.hash).path / "config.json").read_text() == "a"


def test_equal_content_of_another_training_tells_of_that_training(tmp_path):
    put(tmp_path, "a")
    first = resolve(tmp_path, "m")
    put(tmp_path, "a", curve="another", seed=2)
    second = resolve(tmp_path, "m")
    assert (second.hash, second.manifest["seed"]) == (first.hash, 2)
    assert (second.path / "metrics.jsonl").read_text() == "another"
    assert [p.name for p in (tmp_path / "models" / "m").iterdir() if p.is_dir()] == [first.hash]


def test_a_failure_while_writing_publishes_nothing(tmp_path):
    put(tmp_path, "a")
    with pytest.raises(FileNotFoundError), publish_folder(tmp_path, "m", {}) as folder:  # noqa: PT012
        (folder / "config.json").write_text("half")
        (folder / "absent.json").read_text()
    assert (resolve(tmp_path, "m").path / "config.json").read_text() == "a"
    assert sorted(p.name for p in (tmp_path / "models" / "m").iterdir() if p.name.startswith(".draft")) == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "vocab.pkl", "modeling.py"])
def test_file_types_that_can_run_code_are_refused(tmp_path, name):
    with pytest.raises(ModelError, match=name), publish_folder(tmp_path, "m", {}) as folder:
        (folder / name).write_bytes(b"x")
    with pytest.raises(MissingInputError):
        resolve(tmp_path, "m")


def test_what_is_missing_names_the_stage(tmp_path):
    with pytest.raises(MissingInputError, match="gr2 stage midtrain"):
        resolve(tmp_path, "midtrain-refit")
    put(tmp_path, "a")
    with pytest.raises(MissingInputError, match="pinned"):
        resolve(tmp_path, "m", "0" * 12)


def test_the_manifest_is_json(tmp_path):
    put(tmp_path, "a")
    assert json.loads((resolve(tmp_path, "m").path / "manifest.json").read_text())["name"] == "m"
