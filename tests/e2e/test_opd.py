"""On-policy distillation on tiny models with a real engine: the student comes closer to its teacher, and vocabularies must be one."""

import json

import pytest
import torch

from gr2 import artifacts
from gr2.errors import ModelError
from gr2.prompts import load_template, vocabulary_texts
from scoring.model import build_model, build_vocabulary, save
from tests.e2e import tiny
from training import opd, rl, rollouts, sft

pytestmark = pytest.mark.e2e
QUICK = [
    "opd.train.max_steps=10",
    "opd.train.lr=5e-3",
    "rl.prompts_per_step=4",
    "rl.group=4",
    "rl.validate_every=10",
    "rl.validate_requests=4",
    "rl.overlong_tokens=0",
    "prompt.max_thought_tokens=12",
    "prompt.max_answer_tokens=12",
]


def test_the_student_moves_to_its_teacher_and_both_losses_train(make_ctx):
    ctx = make_ctx(QUICK)
    tokenizer = tiny.model_named(ctx, "sft", seed=1)
    teacher = build_model(tiny.SIZE, tokenizer, None, 2)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)  # surer than a fresh model, so that there is a way to go
    with artifacts.publish_folder(ctx.root, "rl-teacher", {}) as draft:
        save(teacher, tokenizer, draft)
    tiny.put(ctx, "rl_prompts", tiny.rl_rows(tokenizer, 8) + tiny.rl_rows(tokenizer, 4, "valid", 50))
    result = opd.run(ctx.cfg, ctx)
    curves = {}
    for name in ("opd", "opd+rl"):
        made = ctx.model(name)
        curves[name] = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
        assert len(curves[name]) == 10
        assert made.manifest["inputs"]["models"].keys() == {"sft", "rl-teacher"}
        stored = rollouts.load(ctx.work("rollouts", result.detail[name]["run"]) / "step-00001.arrow")
        assert all(r.used for r in stored), "the teacher has something to say of every group"
        assert len(stored) == 16
    kl = [line["reverse_kl"] for line in curves["opd"]]
    assert sum(kl[5:]) / 5 < 0.85 * sum(kl[:3]) / 3, kl  # of many samples: a step has 16
    assert ctx.model("opd").manifest["inputs"]["rank_weight"] == 0.0
    assert ctx.model("opd+rl").manifest["inputs"]["rank_weight"] == 1.0


def test_another_vocabulary_is_refused(make_ctx):
    ctx = make_ctx(QUICK)
    tokenizer = tiny.model_named(ctx, "sft")
    tiny.put(ctx, "rl_prompts", tiny.rl_rows(tokenizer, 2) + tiny.rl_rows(tokenizer, 2, "valid", 50))
    other = build_vocabulary(vocabulary_texts(load_template()), 430, tiny.TOKENS[:-1], ctx.work("other"))
    with artifacts.publish_folder(ctx.root, "rl-teacher", {}) as draft:
        save(build_model(tiny.SIZE, other, None, 1), other, draft)
    with pytest.raises(ModelError, match="different vocabularies"):
        opd.run(ctx.cfg, ctx)


def test_without_a_teacher_the_student_alone_is_trained(make_ctx):
    ctx = make_ctx([*QUICK, "models.teacher=null", "sft.start=midtrain", "sft.student.max_steps=1", "rl.student.max_steps=1"])
    tokenizer = tiny.model_named(ctx, "midtrain")
    tiny.put(ctx, "sft_examples", tiny.sft_rows(tokenizer, 8))
    tiny.put(ctx, "rl_prompts", tiny.rl_rows(tokenizer, 8) + tiny.rl_rows(tokenizer, 4, "valid", 50))
    made = [set(stage.run(ctx.cfg, ctx).detail) for stage in (sft, rl, opd)]
    assert made == [{"sft"}, {"rl"}, set()]
    assert artifacts.names(ctx.root) == ["midtrain", "rl", "sft"]
