"""Mid-training on a small world: what is learned generalises, the refit goes on from the student, draws are seeded and resumable."""

import datetime as dt
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from gr2 import PROJECT, artifacts
from gr2.context import Context
from gr2.errors import ConfigError, InputError
from gr2.sids import Trie, to_text
from scoring.beams import beam_search
from scoring.model import load, sid_ids
from scoring.own_vectors import FILE
from tests.tables import put
from training import midtrain
from training.codebooks import Codebooks
from training.data import to_batch
from training.midtrain import Mix, Summed, Text
from training.stream import Epochs

pytestmark = pytest.mark.e2e
ITEMS, CODES = 48, 8
SIZE = "hidden: 48, layers: 2, heads: 2, kv_heads: 2, mlp: 96, dropout: 0.0"
TRAINING = "tokens_per_batch: 512, row_tokens: 64, lr: 0.01, weight_decay: 0.0, average: 0.9"
REFIT = TRAINING.replace("0.01", "0.002")
SMALL = [
    f"models={{vocabulary: 400, student: {{{SIZE}}}, teacher: {{{SIZE}}}}}",
    f"midtrain.student={{epochs: 70, {TRAINING}}}",
    f"midtrain.refit={{epochs: 3, {REFIT}}}",
    f"midtrain.teacher={{max_steps: 2, {TRAINING}}}",
    "midtrain.item_dropout=0",
]


def codes_of(item: int) -> tuple[int, int]:
    return item // CODES, item % CODES


def walk(start: int, length: int) -> str:
    """The user who goes along the ring in threes."""
    return "".join(to_text(codes_of((start + 3 * k) % ITEMS)) for k in range(length))


def ordinal(example_id: str) -> int:
    """A hash, as the table has."""
    return int.from_bytes(hashlib.blake2b(example_id.encode(), digest_size=8).digest(), "big", signed=True)


def world(ctx: Context) -> list[int]:
    """120 users; what they chose last is held out of fit train. Returns where each starts."""
    rng = np.random.default_rng(1)
    eye = np.eye(4, dtype=np.float32)
    books = Codebooks("rqkmeans", rng.normal(size=(2, CODES, 4)).astype(np.float32), ((eye, eye[0]),), ((eye, eye[0]),))
    with artifacts.publish_folder(ctx.root, "tokenizer", {}) as folder:
        books.save(folder, {})
    starts = [int(rng.integers(ITEMS)) for _ in range(120)]
    rows = [
        {"fit": fit, "example_id": f"history:u{u}:0", "task": "history", "prompt": "", "completion": walk(start, 8 + more)}
        for fit, more in (("train", 0), ("refit", 1))
        for u, start in enumerate(starts)
    ]
    rows += [
        {"fit": fit, "example_id": f"lookup:{i}:1", "task": "lookup", "prompt": f"item number {i} is ", "completion": to_text(codes_of(i))}
        for fit in ("train", "refit")
        for i in range(0, ITEMS, 4)
    ]
    put(ctx, "midtrain_examples", [row | {"ordinal": ordinal(row["example_id"])} for row in rows])
    codes = [
        {"tokenizer": ctx.model("tokenizer").id, "item_id": f"i{i}", "codes": codes_of(i), "token_text": to_text(codes_of(i)),
         "learned_codes": codes_of(i), "separated": False, "residual": 0.0, "added_on": dt.date(2026, 1, 1)}
        for i in range(ITEMS)
    ]  # fmt: skip
    put(ctx, "semantic_ids", codes)
    put(ctx, "items", [{"item_id": f"i{i}", "categories": [], "text": f"item number {i}", "has_text": True} for i in range(ITEMS)])
    return starts


def test_the_pre_ranker_learns_what_follows(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx(SMALL)
    starts = world(ctx)
    result = midtrain.run(ctx.cfg, ctx)
    assert result.tokens > 0
    assert set(result.detail) == {"midtrain", "midtrain-refit", "midtrain-teacher"}
    trie = Trie.build(np.array([codes_of(i) for i in range(ITEMS)]))
    for name in ("midtrain", "midtrain-refit"):
        model, tokenizer = load(ctx.model(name).path)
        ids_LK = sid_ids(tokenizer)
        prompts = [[tokenizer.bos_token_id, *tokenizer(walk(s, 8), add_special_tokens=False)["input_ids"]] for s in starts]
        found = beam_search(model, ids_LK, trie, prompts, 5, pad=tokenizer.pad_token_id)
        hits = found.items_BW[:, 0] == [(s + 24) % ITEMS for s in starts]
        assert hits.mean() > 0.8, f"{name}: {hits.mean():.0%} of the next items are ranked first"
        assert model.config._attn_implementation == "sdpa"
        assert model.config.architectures == ["Qwen3ForCausalLM"]
    student, refit = (ctx.model(name) for name in ("midtrain", "midtrain-refit"))
    lines = [json.loads(line) for line in (student.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["valid_loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["item_loss"] < 0.2 * lines[0]["item_loss"], "items are learned whole, beside their tokens"
    first = json.loads((refit.path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < 0.7 * lines[0]["loss"], "the refit did not go on from the student"
    assert (student.manifest["fit"], refit.manifest["fit"]) == ("train", "refit")
    kept = (student.path / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(ctx.root / "models" / "midtrain-teacher")  # as if the stage had been killed before its last model
    alone = make_ctx([*SMALL, "models.teacher=null"])
    assert midtrain.run(alone.cfg, ctx).detail.keys() == {"midtrain", "midtrain-refit"}
    larger = make_ctx([*SMALL, f"models.teacher={{{SIZE.replace('layers: 2', 'layers: 3')}}}"])
    assert midtrain.run(larger.cfg, ctx).detail.keys() == result.detail.keys()
    assert (student.path / "model.safetensors").stat().st_mtime_ns == kept, "it goes on with the model that is missing"
    teacher = ctx.model("midtrain-teacher")
    assert teacher.manifest["parameters"] > student.manifest["parameters"], "another teacher is no reason to train the student again"


@pytest.mark.parametrize("refit_from", ["midtrain", "start"])
def test_the_refit_starts_where_it_should_with_the_students_own_vectors(make_ctx: Callable[..., Context], refit_from: str) -> None:
    few = [f"midtrain.{size}={{max_steps: {steps}, {TRAINING}}}" for size, steps in (("student", 60), ("refit", 1))]
    asked = [*SMALL, *few, f"midtrain.refit_from={refit_from}"]
    ctx = make_ctx(asked)
    world(ctx)
    midtrain.run(ctx.cfg, ctx)
    student, refit, teacher = (ctx.model(name) for name in ("midtrain", "midtrain-refit", "midtrain-teacher"))
    first_of = [json.loads((m.path / "metrics.jsonl").read_text().splitlines()[0])["loss"] for m in (student, refit)]
    learned, started = (load_file(m.path / FILE)["vectors_ND"].norm().item() for m in (student, refit))
    assert not (teacher.path / FILE).exists(), "the teacher makes no lists"
    if refit_from == "midtrain":
        assert first_of[1] < 0.7 * first_of[0]
        assert started == pytest.approx(learned, rel=0.2), "it goes on with the vectors that the student learned"
    else:
        assert first_of[1] == pytest.approx(first_of[0], rel=0.1)
        assert started < 0.5 * learned, "one step from zero"
    shorter = make_ctx([*asked, f"midtrain.student={{max_steps: 30, {TRAINING}}}"])
    midtrain.run(shorter.cfg, ctx)
    assert ctx.model("midtrain").hash != student.hash
    again = ctx.model("midtrain-refit").hash != refit.hash
    assert again == (refit_from == "midtrain"), "another student makes another refit where it is trained on, and else none"


def test_a_table_larger_than_the_window_is_learned_too(make_ctx: Callable[..., Context]) -> None:
    few = [f"midtrain.{size}={{max_steps: {steps}, {TRAINING.replace('512', '256')}}}" for size, steps in (("student", 40), ("refit", 2))]
    ctx = make_ctx([*SMALL, *few, "midtrain.window_examples=70"])
    world(ctx)
    table = midtrain.windows(ctx.cfg, ctx, "train", ctx.cfg.midtrain.student)
    assert (table.lanes, len(table)) == (4, 8)
    assert sum(len(window) for window in table) == table.total == 132
    result = midtrain.run(ctx.cfg, ctx)
    student = ctx.model("midtrain")
    lines = [json.loads(line) for line in (student.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["valid_loss"] < 0.9 * lines[0]["loss"]
    assert result.rows_in == 264
    read = set(Mix(load(student.path)[1], list(table), 2, 0, 64, 1).unread(10_000))
    whole = Mix(load(student.path)[1], [[text for window in table for text in window]], 2, 0, 64, 1).unread(10_000)
    assert read == set(whole)
    assert [i for i in whole if i < 400] == [i for i in student.manifest["unread"] if i < 400]


SCRIPT = """
import json, sys
from itertools import islice
import pyarrow.dataset as ds
from test_midtrain import Digits
from schemas.lake import Lake
from training.loop import rank, world
from training.midtrain import Mix, Text
from training.stream import Epochs, Windows

dataset = Lake(sys.argv[1]).dataset("midtrain_examples")
table = Windows(dataset, Text, ("ordinal", "example_id"), ds.field("fit") == "train", 60, 4)
mix = Mix(Digits(), table, 2, 0.2, 24, 1, table.lanes)
loader = Epochs(mix.rows, 4 * 24, 5, rank=rank(), world=world(), lanes=table.lanes, windows=len(table))
list(islice(loader, 9))
said = json.dumps({"state": loader.state_dict(), "unread": mix.unread(100), "steps": loader.steps(3.0)})
open(f"{sys.argv[2]}/{world()}-{rank()}.json", "w").write(said)
"""


def test_each_process_knows_where_the_lanes_of_all_stand(make_ctx: Callable[..., Context], tmp_path: Any) -> None:
    ctx = make_ctx(SMALL)
    rows = [vars(text) | {"fit": "train", "ordinal": ordinal(text.example_id)} for text in TEXTS]
    put(ctx, "midtrain_examples", [*rows, *({**r, "example_id": r["example_id"] + "x", "ordinal": ordinal(f"{r}")} for r in rows)])
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    env |= {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests' / 'e2e'}", "OMP_NUM_THREADS": "1"}
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]):
        command = [sys.executable, *launch, str(tmp_path / "script.py"), str(ctx.root), str(tmp_path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads((tmp_path / name).read_text()) for name in ("1-0.json", "2-0.json", "2-1.json")]
    assert said[0] == said[1] == said[2]
    assert max(said[0]["state"]["lanes"].values()) >= 2


def test_a_fit_without_texts_is_refused(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx(SMALL)
    put(ctx, "midtrain_examples", [])
    with pytest.raises(InputError, match="no text of fit 'train'"):
        midtrain.windows(ctx.cfg, ctx, "train", ctx.cfg.midtrain.student)


def test_a_vocabulary_too_small_for_labels_with_grades_is_refused(make_ctx: Callable[..., Context]) -> None:
    ctx = make_ctx([*SMALL, "prompt.template=rerank_v5"])
    put(ctx, "items", [])
    with pytest.raises(ConfigError, match=r"models.vocabulary=400 leaves no room"):
        midtrain.vocabulary(ctx.cfg, ctx, ctx.cfg.models.student, [], [])


class Digits:
    """A tokenizer of digits."""

    bos_token_id, eos_token_id = 98, 99

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(c) for c in text] for text in texts]}


TEXTS = [Text(f"history:u{u}:0", "history", "", "".join(f"{k}{u % 7}" for k in range(1, 2 + u % 6))) for u in range(40)]
TEXTS += [Text(f"lookup:{i}:1", "lookup", "12", "345") for i in range(9)]


def test_item_dropout_keeps_items_whole_and_leaves_two() -> None:
    mix = Mix(Digits(), [TEXTS], 2, 0.6, 16, seed=1)
    lengths = set()
    for epoch in range(3):
        rows = mix.rows(epoch)
        for segment in range(len(TEXTS)):
            ids = rows.input_ids[rows.segment_ids == segment].tolist()
            if TEXTS[segment].task == "lookup":
                assert ids == [98, 1, 2, 3, 4, 5, 99]
                continue
            whole = TEXTS[segment].completion
            kept = "".join(str(i) for i in ids[1:])
            pairs = [kept[k : k + 2] for k in range(0, len(kept), 2)]
            assert ids[0] == 98
            assert pairs == [whole[k : k + 2] for k in range(0, len(whole), 2) if whole[k : k + 2] in pairs]
            assert len(pairs) >= min(2, len(whole) // 2)
            lengths.add((segment, len(pairs)))
    assert len(lengths) > 60, "nothing was left out, or the same each epoch"


def test_batches_go_on_where_they_stood_and_cover_an_epoch() -> None:
    mix = Mix(Digits(), [TEXTS], 2, 0.3, 16, seed=1)
    loader = Epochs(mix.rows, 64, seed=5)
    stream = iter(loader)
    list(islice(stream, 7))
    state, rest = loader.state_dict(), [b.input_ids_BT.numpy() for b in islice(stream, 9)]
    again = Epochs(mix.rows, 64, seed=5)
    again.load_state_dict(state)
    assert state["lanes"]["turn 0"] >= 1
    assert all((a == b.input_ids_BT.numpy()).all() for a, b in zip(rest, iter(again), strict=False))
    with pytest.raises(InputError, match="other training rows"):
        Epochs(mix.rows, 64, seed=6).load_state_dict(state)
    shares = [next(iter(Epochs(mix.rows, 64, 5, rank=r, world=2))).input_ids_BT.numpy() for r in (0, 1)]
    one = next(iter(Epochs(mix.rows, 64, 5))).input_ids_BT.numpy()
    assert (np.stack(shares, 1).reshape(one.shape) == one).all()


def test_the_held_out_loss_reads_what_training_does_not() -> None:
    train = [Text("history:a:0", "history", "", "1122"), Text("history:b:0", "history", "", "11"), Text("lookup:c:1", "lookup", "", "1")]
    refit = [Text("history:a:0", "history", "", "112233"), Text("history:b:0", "history", "", "11"), Text("lookup:c:1", "lookup", "", "12")]
    assert midtrain.held_out(train, refit, 9) == [("1122", "33")]
    assert midtrain.held_out(train, refit, 0) == []


def test_the_summed_mask_is_the_mask() -> None:
    batch = to_batch(Mix(Digits(), [TEXTS], 2, 0.0, 16, seed=1).rows(0), slice(0, 4))
    assert ((Summed(**vars(batch)).mask_B1TT() == 0) == batch.mask_B1TT()).all()
