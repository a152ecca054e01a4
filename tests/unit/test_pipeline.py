"""The table of stages agrees with the contracts, and a stage is up to date exactly when nothing that decides it changed."""

import datetime as dt
import json
import threading
from dataclasses import replace

import pytest

from gr2 import PROJECT, lineage, pipeline
from gr2.config import Config, load
from gr2.context import Context, Result
from gr2.errors import ConfigError
from tests.tables import put

pytestmark = pytest.mark.unit


def test_between_gives_the_stages_from_one_to_another_and_refuses_a_backward_range():
    assert [s.name for s in pipeline.between("sft", "rl")] == ["sft", "rl_prompts", "rl"]
    assert pipeline.between(None, None) == [s for s in pipeline.STAGES if s.name != "drift"]
    assert [s.name for s in pipeline.between("candidates", "release", "night")] == ["candidates", "rerank_scores", "drift", "release"]
    with pytest.raises(ConfigError, match="not part of a night"):
        pipeline.between("sft", None, "night")
    with pytest.raises(ConfigError, match="comes after"):
        pipeline.between("rl", "sft")
    with pytest.raises(ConfigError, match="no stage 'rll'"):
        pipeline.get("rll")


def test_fingerprint_follows_settings_and_inputs_of_the_stage_alone(ctx):
    stage = pipeline.get("evidence")
    before = pipeline.fingerprint(stage, ctx.cfg, ctx)
    other = load("demo", [f"paths.root={ctx.root}", "rl.group=2"])
    assert pipeline.fingerprint(stage, other, ctx) == before
    changed = load("demo", [f"paths.root={ctx.root}", "evidence.window=2"])
    assert pipeline.fingerprint(stage, changed, ctx) != before


def test_a_model_of_an_earlier_build_counts_for_the_stages_that_are_told_to_read_it(ctx, monkeypatch):
    def prints(source: str) -> list[str]:
        cfg = load("demo", [f"paths.root={ctx.root}", f"distill.source={source}", "distill.start=sft"])
        return [pipeline.fingerprint(pipeline.get(name), cfg, ctx) for name in ("distill_examples", "distill")]

    hashes = {"rl": "a", "sft": "a"}
    monkeypatch.setattr(pipeline, "_current", lambda ctx, model: hashes.get(model))
    before = prints("rl"), prints("evidence")
    hashes["rl"] = "b"
    after = prints("rl"), prints("evidence")
    assert [[x == y for x, y in zip(b, a, strict=True)] for b, a in zip(before, after, strict=True)] == [[False, True], [True, True]]
    hashes["sft"] = "b"
    assert not set(prints("rl")) & set(after[0])


def test_code_hash_covers_what_a_stage_imports():
    hashes = {s.name: pipeline.code_hash(s.module) for s in pipeline.STAGES}
    assert len(set(hashes.values())) == len(hashes), "two stages hash alike: their modules were not read"


def test_what_is_loaded_by_its_name_would_be_in_no_hash():
    stages = [path for room in ("validation", "scoring", "training", "spark_jobs") for path in (PROJECT / room).glob("*.py")]
    assert not [path.name for path in stages if "import_module(" in path.read_text()]


def test_a_contract_counts_for_the_stage_that_writes_its_table():
    stage, cfg = pipeline.get("items"), load("demo")
    without = replace(stage, writes=())
    assert pipeline.settings_of(stage, cfg)["code"] != pipeline.settings_of(without, cfg)["code"]


def test_stages_that_draw_by_the_teacher_follow_its_settings_and_its_template():
    plain = load("demo")
    for stage in (pipeline.get("reasoning_traces"), pipeline.get("sft_examples")):
        told = [load("demo", [change]) for change in ("traces.temperature=0.9", "traces.template=rerank_v1", "traces.template=rerank_v5")]
        assert len({json.dumps(pipeline.settings_of(stage, cfg)) for cfg in (plain, *told)}) == 4


def test_raw_files_count_for_the_stages_that_read_them_wherever_they_lie(tmp_path):
    def prints(folder: str, text: str) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "events.jsonl.gz").write_text(text)
        cfg = load("demo", ["data.source=jsonl", f"data.path={tmp_path / folder}", f"paths.root={tmp_path}"])
        return [pipeline.fingerprint(pipeline.get(name), cfg, Context(cfg)) for name in ("events", "items")]

    first = prints("a", "one")
    assert prints("b", "one") == first
    assert not set(prints("b", "three")) & set(first)


def test_execute_keeps_a_record_that_up_to_date_understands(ctx, monkeypatch):
    stage = pipeline.Stage("probe", "tests.unit.test_pipeline", ("rl",))
    print_ = pipeline.fingerprint(stage, ctx.cfg, ctx)
    assert not pipeline.up_to_date(stage, ctx, print_)
    pipeline.execute(stage, ctx.cfg, ctx, print_)
    assert pipeline.up_to_date(stage, ctx, print_)
    assert not pipeline.up_to_date(stage, ctx, "other")
    assert json.loads((ctx.root / "runs" / "probe.json").read_text())["rows_in"] == 3


def test_only_the_first_process_of_several_keeps_a_record(ctx, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    pipeline.execute(pipeline.Stage("probe", "tests.unit.test_pipeline", ()), ctx.cfg, ctx, "x")
    assert pipeline.read_record(ctx, "probe") == {}


def test_processes_are_the_most_that_a_training_names():
    stage = pipeline.get("latents")
    assert pipeline.processes(stage, load("demo")) == 1
    assert pipeline.processes(pipeline.get("sft"), load("demo", ["sft.teacher.processes=4"])) == 4


def run(cfg: Config, ctx: Context) -> Result:
    """This module stands in for a stage of its own."""
    return Result(rows_in=3, detail=lineage.versions(ctx, ("items",)))


def test_a_build_reads_its_draft_and_a_night_what_is_there(ctx):
    """A night publishes between two stages of a build: the later one neither reads that nor is due for it."""
    night = Context(ctx.cfg, dt.date(2026, 1, 2))
    later, first = (pipeline.Stage(name, "tests.unit.test_pipeline", (), ("items",)) for name in ("probe", "evidence"))
    put(ctx, "items", [{"item_id": "a", "categories": [], "text": "", "has_text": False}])
    ctx.pin("tables", "items", 0)
    due = [pipeline.fingerprint(stage, ctx.cfg, ctx) for stage in (later, first)]
    put(ctx, "items", [])
    night.pin("tables", "items", 1)
    assert pipeline.execute(later, ctx.cfg, ctx, "").detail == {"items": 0}
    assert pipeline.execute(later, ctx.cfg, night, "").detail == {"items": 1}
    assert pipeline.execute(first, ctx.cfg, ctx, "").detail == {"items": 1}, "what gathers the data takes up what the night brought"
    assert [pipeline.fingerprint(stage, ctx.cfg, ctx) == was for stage, was in zip((later, first), due, strict=True)] == [True, False]
    assert ctx.lake.version("items") == 1


def test_stages_take_turns_on_s3_and_only_there(tmp_path):
    def entering(ctx: Context, waiting: threading.Event, inside: threading.Event) -> threading.Thread:
        ctx.log = lambda message: waiting.set()  # type: ignore[method-assign]

        def enter() -> None:
            with ctx.sole_writer():
                inside.set()

        thread = threading.Thread(target=enter)
        thread.start()
        return thread

    for place, turns in (("s3a://lake/gr2", True), ("abfss://lake@account/gr2", False), ("", False)):
        first, second = (Context(load("demo", [f"paths.root={tmp_path}", f"paths.lake='{place}'"])) for _ in range(2))
        waiting, inside = threading.Event(), threading.Event()
        with first.sole_writer():
            thread = entering(second, waiting, inside)
            assert (waiting if turns else inside).wait(10)
            assert inside.is_set() != turns
        assert inside.wait(10), "whoever waited goes on"
        thread.join(10)
