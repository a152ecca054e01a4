"""The training loop: packing and accumulation change nothing, a stopped training goes on bit for bit, what comes out is a plain model."""

import json
import os
import random
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gr2 import PROJECT
from gr2.config import Training
from gr2.errors import ConfigError, ModelError
from scoring.model import build_model, load
from tests.e2e.loop_world import FAST, TINY, Stop, examples, loss_fn, plain_logits, run, same_weights, stop_after
from training import checkpoints, loop
from training.data import Batch, pack, to_batch
from training.loop import Engine, learned_states, state_logprobs, token_logprobs

pytestmark = pytest.mark.e2e


def test_packed_logprobs_equal_separate_runs(tokenizer: Any) -> None:
    model, alone = build_model(TINY, tokenizer, None, seed=7).eval(), examples(25)
    rows = pack(alone, 64)
    batch = to_batch(rows, slice(None))
    with torch.no_grad():
        packed_BT = token_logprobs(model, batch)
        for i, example in enumerate(alone):
            ids = torch.tensor([[*example.prompt_ids, *example.segments[0][0], *example.segments[1][0]]])
            logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            ours = packed_BT[torch.from_numpy(rows.segment_ids == i)]
            learned = slice(len(example.prompt_ids), None)
            torch.testing.assert_close(ours[learned], logps[len(example.prompt_ids) - 1 :], atol=1e-5, rtol=0)
            assert (ours[: len(example.prompt_ids)] == 0).all()


def test_an_example_does_not_feel_its_neighbours(tokenizer: Any) -> None:
    model = build_model(TINY, tokenizer, None, seed=7).eval()
    batch = to_batch(pack(examples(12), 96), slice(None))
    others_BT = batch.segment_ids_BT != 3
    changed = replace(batch, input_ids_BT=torch.where(others_BT, (batch.input_ids_BT + 17) % 250, batch.input_ids_BT))
    with torch.no_grad():
        before, after = token_logprobs(model, batch), token_logprobs(model, changed)
    torch.testing.assert_close(before[~others_BT], after[~others_BT], atol=1e-6, rtol=0)
    assert not torch.allclose(before[others_BT], after[others_BT])


def test_chunks_of_the_head_change_neither_values_nor_gradients_and_save_memory(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grads, values, kept = [], [], []
    for chunk in (7, 4096):
        monkeypatch.setattr(loop, "CHUNK", chunk)
        model = build_model(TINY, tokenizer, None, seed=7).eval()
        states = learned_states(model, to_batch(pack(examples(6), 64), slice(None)))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x):
            logps_M = state_logprobs(model, *states)
        logps_M.sum().backward()
        grads.append(model.get_input_embeddings().weight.grad)
        values.append(logps_M.detach())
        kept.append(sum(sizes))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    assert kept[0] < kept[1] / 3, "logits of all chunks are kept for the way back"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation_changes_nothing(tokenizer: Any, stage: int) -> None:
    rows = pack(examples(), 48)
    results = []
    for parts in (1, 8):
        model = build_model(TINY.model_copy(update={"dropout": 0.0}), tokenizer, None, seed=7)
        engine = Engine(model, FAST.model_copy(update={"zero_stage": stage, "weight_decay": 0.1}), total_steps=3)
        lines = []
        for step in range(3):
            pieces = [to_batch(rows, list(range(step * 8 + p * (8 // parts), step * 8 + (p + 1) * (8 // parts)))) for p in range(parts)]
            lines.append(engine.backward_and_step(loss_fn, pieces))
        engine.close()
        results.append((lines, model))
    for one, many in zip(results[0][0], results[1][0], strict=True):
        assert one == pytest.approx(many, rel=2e-4)
    for a, b in zip(results[0][1].parameters(), results[1][1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
        assert a.shape == b.shape


def test_stages_agree_and_learn(tokenizer: Any, tmp_path: Path) -> None:
    curves = {stage: run(tokenizer, tmp_path / str(stage), FAST.model_copy(update={"zero_stage": stage}))[1] for stage in (0, 1, 3)}
    assert curves[1][-1]["loss"] < curves[1][0]["loss"] - 0.3
    for stage in (0, 3):
        assert [line["loss"] for line in curves[stage]] == pytest.approx([line["loss"] for line in curves[1]], rel=1e-3)
    assert curves[1][-1]["step"] == 12
    assert curves[1][-1]["tokens"] > curves[1][-2]["tokens"] > 0


@pytest.mark.parametrize(
    ("stage", "average", "optimizer"), [(0, 0.0, "adamw"), (0, 0.9, "muon"), (1, 0.9, "adamw"), (2, 0.0, "adamw"), (3, 0.0, "adamw")]
)
def test_a_stopped_training_goes_on_bit_for_bit(tokenizer: Any, tmp_path: Path, stage: int, average: float, optimizer: str) -> None:
    settings = FAST.model_copy(
        update={
            "zero_stage": stage, "average": average, "optimizer": optimizer, "checkpoint_every": 4, "accumulation": 2, "precision": "bf16"
        }
    )  # fmt: skip
    whole, curve = run(tokenizer, tmp_path / "whole", settings)
    home = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        run(tokenizer, tmp_path / "stopped", settings, loss=stop_after(2 * 10 + 1), checkpoint=home, fingerprint="a")
    kept = checkpoints.latest(home)
    assert kept is not None
    assert kept.name == "step-000008"
    assert [p.name for p in home.iterdir() if p.is_dir()] == ["step-000008"]
    resumed, again = run(tokenizer, tmp_path / "resumed", settings, checkpoint=home, fingerprint="a")
    assert again == curve
    assert same_weights(resumed, whole)
    assert checkpoints.latest(home) == kept  # until the model is published


@pytest.mark.parametrize(("first", "then", "average"), [(1, 2, 0.9), (2, 3, 0.0), (3, 1, 0.0), (1, 0, 0.9)])
def test_a_stopped_training_goes_on_at_another_stage(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, then: int, average: float
) -> None:
    monkeypatch.setattr(checkpoints, "SHARD", 20_000)  # several files
    settings = FAST.model_copy(update={"max_steps": 24, "checkpoint_every": 4, "average": average, "zero_stage": first})
    whole, curve = run(tokenizer, tmp_path / "whole", settings)
    home = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        run(tokenizer, tmp_path / "stopped", settings, loss=stop_after(5), checkpoint=home, fingerprint="a")
    assert len(list(home.glob("step-000004/state-*.safetensors"))) > 3
    other, again = run(tokenizer, tmp_path / "on", settings.model_copy(update={"zero_stage": then}), checkpoint=home, fingerprint="a")
    assert again[:4] == curve[:4]
    assert [line["loss"] for line in again[4:]] == pytest.approx([line["loss"] for line in curve[4:]], rel=1e-3)
    for a, b in zip(other.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_a_broken_checkpoint_is_refused_and_a_foreign_one_ignored(tokenizer: Any, tmp_path: Path) -> None:
    settings, home = FAST.model_copy(update={"checkpoint_every": 2}), tmp_path / "checkpoint"
    with pytest.raises(Stop):
        run(tokenizer, tmp_path / "stopped", settings, loss=stop_after(5), checkpoint=home, fingerprint="a")
    kept = checkpoints.latest(home)
    assert kept is not None
    victim = kept / "state-00001.safetensors"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ModelError, match="differs from its manifest"):
        run(tokenizer, tmp_path / "broken", settings, checkpoint=home, fingerprint="a")
    victim.write_bytes(content)
    (kept / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"extra\.safetensors"):
        checkpoints.verify(kept)
    (kept / "extra.safetensors").unlink()
    with pytest.raises(ModelError, match=r"not of this model \(.*/average\)"):
        run(tokenizer, tmp_path / "averaged", settings.model_copy(update={"average": 0.9}), checkpoint=home, fingerprint="a")
    _, curve = run(tokenizer, tmp_path / "other", settings, checkpoint=home, fingerprint="b")
    assert curve[0]["step"] == 1
    assert len(curve) == 12


def test_a_kill_while_saving_leaves_the_last_good_one(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, home = FAST.model_copy(update={"checkpoint_every": 3}), tmp_path / "checkpoint"
    _, curve = run(tokenizer, tmp_path / "whole", settings)
    digests, calls = checkpoints._digests, iter(range(1))

    def killed(folder: Path) -> dict[str, str]:
        if next(calls, None) is None:
            raise Stop
        return digests(folder)

    monkeypatch.setattr(checkpoints, "_digests", killed)
    with pytest.raises(Stop):
        run(tokenizer, tmp_path / "stopped", settings, checkpoint=home, fingerprint="a")
    monkeypatch.undo()
    assert sorted(p.name for p in home.iterdir() if p.is_dir()) == [".draft-step-000006", "step-000003"]
    _, again = run(tokenizer, tmp_path / "resumed", settings, checkpoint=home, fingerprint="a")
    assert again == curve


def test_what_is_exported_are_the_averaged_weights_of_a_plain_model(tokenizer: Any, tmp_path: Path) -> None:
    plain, _ = run(tokenizer, tmp_path / "plain")
    averaged, _ = run(tokenizer, tmp_path / "averaged", FAST.model_copy(update={"average": 0.9}))
    assert not same_weights(plain, averaged)
    printed = plain_logits(averaged, tokenizer, tmp_path)
    model, vocabulary = load(tmp_path / "export")
    assert printed == pytest.approx(model(**vocabulary("some words", return_tensors="pt")).logits.double().sum().item(), abs=1e-3)
    assert same_weights(model, averaged)


def test_bf16_trains_like_fp32_on_fp32_weights(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoring.model.multiplies_bf16", lambda kind: True)  # also where a processor emulates it
    model, low = run(tokenizer, tmp_path / "bf16", FAST.model_copy(update={"precision": "bf16"}))
    _, full = run(tokenizer, tmp_path / "fp32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert low[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=0.02)
    assert low[0]["loss"] != full[0]["loss"]


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_every_deepspeed_file_trains_and_goes_on_bit_for_bit(tokenizer: Any, tmp_path: Path, name: str) -> None:
    """In bf16 throughout, but for the fp32 weights that DeepSpeed keeps: a checkpoint must hold these."""
    own = FAST.model_copy(update={"zero_stage": int(name[4]), "precision": "bf16"})
    settings = own.model_copy(update={"deepspeed": f"{name}.json", "checkpoint_every": 4})
    model, curve = run(tokenizer, tmp_path / "whole", settings)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    built_in = run(tokenizer, tmp_path / "own", own)[1]
    assert [line["loss"] for line in curve] == pytest.approx([line["loss"] for line in built_in], rel=0.02)
    home = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        run(tokenizer, tmp_path / "stopped", settings, loss=stop_after(6), checkpoint=home, fingerprint="a")
    resumed, again = run(tokenizer, tmp_path / "resumed", settings, checkpoint=home, fingerprint="a")
    assert again == curve
    assert same_weights(resumed, model)


def test_validation_joins_the_curve(tokenizer: Any, tmp_path: Path) -> None:
    _, curve = run(tokenizer, tmp_path, validate=lambda model: {"training": float(model.training)}, validate_every=5)
    assert [line["step"] for line in curve if "valid_training" in line] == [5, 10, 12]
    assert {line["valid_training"] for line in curve if "valid_training" in line} == {0.0}


@pytest.mark.parametrize("stage", [0, 2])
def test_what_is_validated_is_what_would_be_exported(tokenizer: Any, tmp_path: Path, stage: int) -> None:
    def weigh(model: Any) -> dict[str, float]:
        return {"weight": float(model.get_input_embeddings().weight.double().abs().sum())}

    settings = FAST.model_copy(update={"average": 0.9, "zero_stage": stage})
    _, plain = run(tokenizer, tmp_path / "plain", settings)
    model, curve = run(tokenizer, tmp_path / "validated", settings, validate=weigh, validate_every=5)
    assert curve[-1]["valid_weight"] == weigh(model)["weight"]
    assert [line["loss"] for line in curve] == [line["loss"] for line in plain], "training goes on with its own weights"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_comes_into_no_checkpoint(tokenizer: Any, tmp_path: Path, stage: int) -> None:
    def broken(model: Any, batch: Batch) -> Any:
        loss, floats = loss_fn(model, batch)
        return loss + torch.sqrt(0.0 * loss), floats  # adds nothing, with a gradient of infinity times zero

    settings, home = FAST.model_copy(update={"zero_stage": stage, "checkpoint_every": 1}), tmp_path / "checkpoint"
    with pytest.raises(ModelError, match=r"gradient's norm is (nan|inf) at step 1"):
        run(tokenizer, tmp_path, settings, loss=broken, checkpoint=home)
    assert checkpoints.latest(home) is None


def test_impossible_settings_are_refused(tokenizer: Any) -> None:
    model = build_model(TINY, tokenizer, None, seed=7)
    with pytest.raises(ConfigError, match="no DeepSpeed configuration"):
        Engine(model, FAST.model_copy(update={"deepspeed": "absent"}), 1)
    with pytest.raises(ConfigError, match="another ZeRO stage"):
        Engine(model, FAST.model_copy(update={"deepspeed": "zero3", "zero_stage": 1}), 1)
    with pytest.raises(ConfigError, match="zero_stage 2 or less"):
        Engine(model, FAST.model_copy(update={"average": 0.9, "zero_stage": 3}), 1)
    with pytest.raises(ValueError, match="set zero_stage to 0"):
        Training(optimizer="muon", zero_stage=1)
    broken = build_model(TINY, tokenizer, None, seed=7)
    broken.model.norm.weight.data.fill_(float("nan"))
    engine = Engine(broken, FAST, 1)
    with pytest.raises(ModelError, match="loss is nan"):
        engine.backward_and_step(loss_fn, [to_batch(pack(examples(4), 64), slice(None))])


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from tests.e2e import test_loop as t
from scoring.model import build_model
from training import checkpoints, loop
from training.loop import planned_steps, rank, train, world
from training.data import batches, pack
from transformers import AutoTokenizer

folder, vocabulary, stage, every, deadly, optimizer = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
calls = iter(range(10**6))
loop.CHUNK = 16  # fewer than a micro-batch learns, and not the same number on two ranks

def loss_fn(model, batch):
    if deadly == f"batch-{next(calls)}":
        die()
    return t.loss_fn(model, batch)

if deadly.startswith("saving-"):  # the second time that a checkpoint gets to this point
    name, place = deadly.removeprefix("saving-"), iter(range(10**6))
    module = os if name == "replace" else checkpoints
    own = getattr(module, name)
    setattr(module, name, lambda *args: die() if next(place) == 1 else own(*args))
settings = t.FAST.model_copy(update={"zero_stage": stage, "checkpoint_every": every, "optimizer": optimizer})
model = build_model(t.TINY.model_copy(update={"dropout": 0.0}), AutoTokenizer.from_pretrained(vocabulary), None, seed=7)
loader = batches(pack(t.examples(), 48), 192, seed=9, rank=rank(), world=world())
folder.mkdir(exist_ok=True)
home = folder / "checkpoint" if every else None
train(model, loader, loss_fn, settings, folder=folder, total_steps=24, seed=1, checkpoint=home, fingerprint="a")
if home and rank() == 0:
    checkpoints.clear(home)  # as a stage does whose model is published
"""


class Launcher:
    """Trains in processes of their own, which may die."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self.folder, self.script = folder, folder / "train.py"
        tokenizer.save_pretrained(folder / "vocabulary")
        self.script.write_text(SCRIPT)

    def __call__(
        self, name: str, stage: int, count: int = 1, every: int = 0, deadly: str = "never", optimizer: str = "adamw"
    ) -> list[dict[str, float]]:
        """The curve, as far as it came, without the seconds."""
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        env |= {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        words = [str(self.folder / name), str(self.folder / "vocabulary"), str(stage), str(every), deadly, optimizer]
        done = subprocess.run(
            [sys.executable, *launch, str(self.script), *words], env=env, capture_output=True, text=True, timeout=500, cwd=PROJECT
        )
        assert (done.returncode == 0) == (deadly == "never"), done.stderr[-3000:]
        lines = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture
def launch(tokenizer: Any, tmp_path: Path) -> Launcher:
    return Launcher(tokenizer, tmp_path)


def test_killed_anywhere_a_training_comes_to_the_curve_of_an_unkilled_one(launch: Launcher) -> None:
    whole = launch("whole", stage=1)
    rng = random.Random(os.environ.get("GR2_SEED", "4"))
    first, last = rng.randrange(1, 12), rng.randrange(1, 8)
    for deadly in (f"batch-{first}", "saving-_digests", "saving-replace", f"batch-{last}"):  # one training, killed four times
        died = launch("killed", stage=1, every=2, deadly=deadly)
        assert died == whole[: len(died)] != whole, deadly
    assert launch("killed", stage=1, every=2) == whole


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "muon"), (2, "adamw"), (3, "adamw")])
def test_two_processes_train_like_one(launch: Launcher, stage: int, optimizer: str) -> None:
    for one, two in zip(launch("one", stage, optimizer=optimizer), launch("two", stage, count=2, optimizer=optimizer), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert two["tokens"] == one["tokens"]


def test_two_killed_processes_go_on_bit_for_bit(launch: Launcher) -> None:
    whole = launch("whole", stage=3, count=2)
    died = launch("killed", stage=3, count=2, every=4, deadly="batch-6")
    assert died == whole[: len(died)] != whole
    assert launch("killed", stage=3, count=2, every=4) == whole


def test_one_process_goes_on_as_two_and_back(launch: Launcher) -> None:
    whole = launch("whole", stage=1)
    died = launch("killed", stage=1, every=4, deadly="batch-5")
    assert died == whole[:5]
    assert len(launch("killed", stage=2, count=2, every=4, deadly="batch-9")) == 4 + 9
    again = launch("killed", stage=1, every=4)
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [line[name] for line in again] == pytest.approx([line[name] for line in whole], rel=1e-3), name


def test_the_threads_of_a_group_end_before_the_interpreter() -> None:
    """Else one of two processes that have just ended well may abort: 15 of 25 that only joined and summed did."""
    script = """
import atexit
from torch.distributed import is_initialized
from training.loop import start_processes
atexit.register(lambda: print("at the end", is_initialized()))  # runs after what is registered later
start_processes()
print("joined", is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, cwd=PROJECT, check=True)
    assert done.stdout.splitlines()[-2:] == ["joined True", "at the end False"]


def test_a_full_disk_costs_a_checkpoint_and_no_more(tokenizer: Any, tmp_path: Path) -> None:
    settings, home = FAST.model_copy(update={"checkpoint_every": 3}), tmp_path / "checkpoint"
    _, curve = run(tokenizer, tmp_path / "whole", settings)
    before, stopping = resource.getrlimit(resource.RLIMIT_FSIZE), stop_after(10)

    def filling(model: Any, batch: Batch) -> Any:
        if (found := checkpoints.latest(home)) is not None:  # from the second checkpoint on its file has no room
            resource.setrlimit(resource.RLIMIT_FSIZE, ((found / "state-00001.safetensors").stat().st_size - 1, before[1]))
        return stopping(model, batch)

    try:
        with pytest.raises(Stop):
            run(tokenizer, tmp_path / "stopped", settings, loss=filling, checkpoint=home, fingerprint="a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in home.iterdir()) == ["latest.json", "step-000003"], "no half checkpoint fills the disk further"
    _, again = run(tokenizer, tmp_path / "resumed", settings, checkpoint=home, fingerprint="a")
    assert again == curve
