"""Profiles: every file loads, typos are named, overrides reach their place, nothing is accepted silently."""

import pytest
from pydantic import BaseModel

from gr2.config import Config, load, profiles
from gr2.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("profile", profiles())
def test_every_profile_loads_and_says_how_to_run_it(profile):
    from gr2 import PROJECT

    assert load(profile).profile == profile
    assert f"--profile {profile}" in (PROJECT / "conf" / f"{profile}.yaml").read_text().split("\n\n")[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.grup=4", "rl.grup: unknown key: did you mean 'group'"),
        ("rl.student.stepps=4", "did you mean 'max_steps'"),
        ("paths.rot=x", "did you mean 'root'"),
        ("tokeniser.codes=4", "did you mean 'tokenizer'"),
        ("rl.group=many", "rl.group"),
        ("rl.group=0", "greater than 0"),
        ("candidates.n=21", "at most 20"),
        ("rl.student.processes=2", "one process"),
        ("opd.train.processes=2", "one process"),
        ("rl.student.checkpoint_every=5", "go on from their rollouts"),
        ("sasrec.train.zero_stage=3", "leave out lora and ZeRO stage 3"),
        ("sasrec.train.lora={}", "leave out lora and ZeRO stage 3"),
        ("scoring.models={latents: [think]}", "no thought"),
        ("scoring={structured: true, models: {latents: [score]}}", "structured or latents"),
        ("scoring.live={}", "scoring.live: Dictionary should have at least 1 item"),
        ("scoring.live={rl: []}", "scoring.live.rl: Tuple should have at least 1 item"),
        ("scoring={splits: [valid], models: {rl: [think]}}", "scoring.models must have rl: .score."),
        ("scoring={splits: [valid], models: {fast: [score]}}", "scoring.models must have rl: .score."),
        ("latents.train.processes=2", "leave out processes"),
        ("prompt.template=rerank_v55", "did you mean 'rerank_v5'"),
        ("traces.template=rerank_llm", "did you mean 'rerank_llm_v1'"),
        ("data.windows=[0.9, 0.5, 0.2]", "data.windows must not fall"),
        ("candidates.n=2", "a drill has at least 3 candidates"),
        ("candidates.n=10 ", None),
        ("paths.lake=s3a://key:secret@bucket/gr2", "paths.lake: String should match"),
        ("seed", "write key=value"),
        ("seed.x=1", "seed: Input should be a valid integer"),
        ("profile.x=1", "'profile' is a value"),
        ("__class__.x=1", "__class__: unknown key"),
        ("a b=1", "write key=value"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    if message is None:
        assert load("demo", [override]).candidates.n == 10
        return
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load("demo", [override, "candidates.beam=30"])


def test_an_unknown_profile_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        load("dmeo")
    with pytest.raises(ConfigError, match="no profile"):
        load("../../etc/passwd")


def test_the_variable_gives_the_data_folder_and_the_override_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("GR2_DATA", str(tmp_path))
    assert load("demo").data.path == tmp_path
    assert str(load("demo", ["data.path=/elsewhere"]).data.path) == "/elsewhere"


def test_an_override_changes_one_place_of_a_section_that_the_file_names_twice():
    loaded = load("beauty", ["midtrain.refit.epochs=0.5", "midtrain.refit.lr=0.1"]).midtrain
    assert (loaded.refit.epochs, loaded.refit.lr) == (0.5, 0.1)
    assert loaded.student == load("beauty").midtrain.student


def test_digest_follows_content_not_place():
    base = load("demo")
    assert base.digest() == load("demo", ["paths.root=/elsewhere"]).digest()
    assert base.digest() == load("demo", ["data.path=/elsewhere"]).digest()
    assert base.digest("rl") != load("demo", ["rl.group=4"]).digest("rl")
    assert base.digest("sft") == load("demo", ["rl.group=4"]).digest("sft")
    assert base.digest() == load("demo", ["sft.student.checkpoint_every=7"]).digest()
    assert base.digest("sft") != load("demo", ["sft.student.accumulation=7"]).digest("sft")


def test_no_section_has_more_than_25_settings_and_all_are_frozen():
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            assert len(section.model_fields) <= 25, name
    with pytest.raises(ValueError, match="frozen"):
        load("demo").rl.group = 3  # type: ignore[misc]


@pytest.mark.parametrize("profile", ["demo", "beauty"])
def test_models_from_scratch_have_heads_that_vllm_serves_on_a_cpu(profile):
    models = load(profile).models
    for size in filter(None, (models.student, models.teacher)):
        assert size.hidden % size.heads == 0
        assert size.hidden // size.heads in (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
