"""SFT on a tiny model: it learns, weighs what it should, and a rerun gives the same model."""

import json
import shutil

import pytest
import torch

from gr2.draws import seed_of
from gr2.errors import InputError, MissingInputError
from gr2.prompts import load_template, vocabulary_texts
from scoring.model import build_model, build_vocabulary, encode, graded_ids, label_ids, load
from tests.e2e import tiny
from training import checkpoints, fitting, sft
from training.data import pack, to_batch
from training.fitting import supervised
from training.loop import token_logprobs

pytestmark = pytest.mark.e2e
QUICK = [
    "sft.start=midtrain", "sft.student.max_steps=20", "sft.teacher.max_steps=2", "sft.student.lr=5e-3", "sft.student.tokens_per_batch=2048",
]  # fmt: skip


def test_sft_learns_the_format_and_a_rerun_gives_the_same_model(make_ctx):
    ctx = make_ctx(QUICK)
    tokenizer = tiny.model_named(ctx, "midtrain", "midtrain-teacher")
    tiny.put(ctx, "sft_examples", tiny.sft_rows(tokenizer, 48))
    result = sft.run(ctx.cfg, ctx)
    first = ctx.model("sft")
    curve = [json.loads(line) for line in (first.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == list(range(1, 21))
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    assert first.manifest["inputs"]["tables"] == {"sft_examples": 0}
    assert result.tokens > 0
    weights = (first.path / "model.safetensors").stat().st_mtime_ns
    assert sft.run(ctx.cfg, ctx).detail == result.detail
    assert (first.path / "model.safetensors").stat().st_mtime_ns == weights, "trained from the same inputs before: kept"
    shutil.rmtree(ctx.root / "models" / "sft")
    sft.run(ctx.cfg, ctx)
    assert ctx.model("sft").hash == first.hash, "trained again, it is the same model"
    other = make_ctx([*QUICK, "sft.reasoning_weight=0.2"])
    sft.run(other.cfg, other)
    trained = other.model("sft").path / "model.safetensors"
    assert other.model("sft").hash != first.hash, "other settings, not those of the trainer alone: trained anew"
    written, teacher = trained.stat().st_mtime_ns, other.model("sft-teacher").hash
    how = ["sft.student.zero_stage=2", "sft.student.checkpoint_every=5"]
    longer = make_ctx([*QUICK, "sft.reasoning_weight=0.2", "sft.teacher.max_steps=3", *how])
    sft.run(longer.cfg, longer)
    assert trained.stat().st_mtime_ns == written, "the teacher's settings do not decide the student, nor does how it is run"
    assert longer.model("sft-teacher").hash != teacher


def test_the_student_starts_where_the_profile_says_and_the_teacher_from_midtraining(make_ctx):
    ctx = make_ctx(["sft.start=fast", "sft.student.max_steps=1", "sft.teacher.max_steps=1"])
    tokenizer = tiny.model_named(ctx, "midtrain", "midtrain-teacher")
    tiny.model_named(ctx, "fast", seed=2)
    tiny.put(ctx, "sft_examples", tiny.sft_rows(tokenizer, 8))
    sft.run(ctx.cfg, ctx)
    started = {name: ctx.model(name).manifest["inputs"]["models"] for name in ("sft", "sft-teacher")}
    assert started == {"sft": {"fast": ctx.model("fast").hash}, "sft-teacher": {"midtrain-teacher": ctx.model("midtrain-teacher").hash}}
    fast, trained = (load(ctx.model(name).path)[0].get_input_embeddings().weight for name in ("fast", "sft"))
    assert (fast - trained).norm() < 0.1 * fast.norm(), "one step away from where it started"


def test_a_table_larger_than_the_window_is_learned_too(make_ctx):
    ctx = make_ctx([*QUICK, "sft.window_examples=72", "sft.student.max_steps=40"])
    rows = [
        row | {"ordinal": seed_of(row["example_id"])} for row in tiny.sft_rows(tiny.model_named(ctx, "midtrain", "midtrain-teacher"), 96)
    ]
    tiny.put(ctx, "sft_examples", rows)
    table = sft.windows(ctx.cfg, ctx, ctx.cfg.sft.student)
    assert (table.lanes, sum(map(len, table))) == (8, 96)
    assert max(map(len, table)) <= 9
    assert sft.run(ctx.cfg, ctx).rows_in == 96
    curve = [json.loads(line)["loss"] for line in (ctx.model("sft").path / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1] < 0.5 * curve[0]


def test_the_loss_weighs_thought_and_answer_and_reads_the_prompt(ctx):
    tokenizer = tiny.model_named(ctx, "midtrain")
    model, _ = load(ctx.model("midtrain").path)
    (row,) = tiny.sft_rows(tokenizer, 1)
    lesson = sft.Lesson(row["prompt"], row["reasoning"], row["answer"])
    batch = to_batch(pack(sft.to_examples(tokenizer, [lesson], 0.25, 2.0), 512), [0])
    thought, answer = len(encode(tokenizer, lesson.reasoning)), len(encode(tokenizer, lesson.answer)) + 1
    assert sorted(batch.weights_BT.unique().tolist()) == [0.0, 0.25, 2.0]
    assert [(batch.weights_BT == w).sum().item() for w in (0.25, 2.0)] == [thought, answer]
    logps = token_logprobs(model, batch)
    expected = -(0.25 * logps[batch.weights_BT == 0.25].sum() + 2 * logps[batch.weights_BT == 2].sum()) / (0.25 * thought + 2 * answer)
    assert supervised(model, batch)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    last = batch.input_ids_BT[batch.weights_BT == 2.0][-1]
    assert last == tokenizer.eos_token_id


def test_rows_that_midtraining_never_read_are_told_apart_again(ctx):
    tokenizer = tiny.model_named(ctx, "midtrain")
    model, _ = load(ctx.model("midtrain").path)
    table, unread = model.get_input_embeddings().weight, label_ids(tokenizer)
    before = table.detach().clone()
    with torch.no_grad():
        table[unread] = table[unread].mean(dim=0) + 0.01 * table[unread]  # what a softmax does to tokens that never come
    sft.wake(model, tokenizer, unread, seed=3)
    rows = torch.nn.functional.normalize(table[unread].detach(), dim=1)
    assert ((rows @ rows.T) - torch.eye(len(unread))).abs().max() < 0.6
    kept = [i for i in range(len(table)) if i not in unread]
    assert torch.equal(table[kept], before[kept])
    lengths = table.detach().norm(dim=1)
    torch.testing.assert_close(lengths[unread], (2 * lengths[kept].median()).expand(len(unread)), atol=1e-4, rtol=1e-4)
    sft.wake(model, tokenizer, [], seed=3)


def test_a_label_with_its_grade_starts_as_the_sum_of_both(tmp_path):
    texts = vocabulary_texts(load_template("rerank_v5"), 2)
    tokenizer = build_vocabulary(texts, 900, tiny.TOKENS, tmp_path)
    model = build_model(tiny.SIZE, tokenizer, None, seed=1)
    table, graded = model.get_input_embeddings().weight, graded_ids(tokenizer)
    c6, z0, c, six = (encode(tokenizer, text) for text in (" @C6", " @Z0", "C", "6"))
    assert len(graded) == 210
    assert graded[c6[0]] == (c[0], six[0])
    before = table.detach().clone()
    sft.wake(model, tokenizer, [*c6, *c], seed=3)
    torch.testing.assert_close(table[c6], table[c] + before[six])
    assert not torch.equal(table[c], before[c])
    assert torch.equal(table[z0], before[z0]), "what was read stays as it is"


def test_a_model_that_could_not_be_published_goes_on_from_its_checkpoint(make_ctx, monkeypatch):
    ctx = make_ctx([*QUICK, "models.teacher=null", "sft.student.checkpoint_every=8"])
    tiny.put(ctx, "sft_examples", tiny.sft_rows(tiny.model_named(ctx, "midtrain"), 48))
    home = ctx.work("sft", "checkpoint")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(fitting, "save", full)
    with pytest.raises(OSError, match="no space"):
        sft.run(ctx.cfg, ctx)
    assert checkpoints.latest(home) == home / "step-000016"
    monkeypatch.undo()
    sft.run(ctx.cfg, ctx)
    assert "resumed at step 16 of 20" in (ctx.root / "logs" / "gr2.log").read_text()
    assert ctx.model("sft").manifest["steps"] == 20
    assert checkpoints.latest(home) is None, "removed when the model is there"


def test_missing_and_empty_inputs_are_named(ctx):
    with pytest.raises(MissingInputError, match="gr2 stage sft_examples"):
        sft.run(ctx.cfg, ctx)
    tiny.put(ctx, "sft_examples", [])
    with pytest.raises(InputError, match="no trace was accepted"):
        sft.run(ctx.cfg, ctx)
