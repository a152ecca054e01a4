"""RL on tiny models with a real engine: one stage run, its rerun, a killed one; and the tree of a group against separate texts."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from gr2.context import Result
from gr2.errors import EngineError, InputError
from gr2.prompts import format_answer
from scoring.engine import Answer
from scoring.model import load
from tests.e2e import tiny
from training import rl, rollouts
from training.data import Example, pack, to_batch
from training.loop import token_logprobs
from training.policy import tree_logprobs, trees

pytestmark = pytest.mark.e2e
QUICK = [
    "sft.start=midtrain",  # the demo starts from fast, which these tests do not train
    "sft.student.max_steps=120",
    "sft.student.tokens_per_batch=1024",
    "sft.teacher.max_steps=1",
    "sft.student.lr=8e-3",
    "rl.prompts_per_step=4",
    "rl.group=4",
    "rl.student.max_steps=3",
    "rl.teacher.max_steps=1",
    "rl.student.precision=fp32",
    "rl.validate_every=2",
    "rl.validate_requests=8",
    "prompt.max_thought_tokens=24",
    "prompt.max_answer_tokens=16",
]


def rollout(index: int, group: int, tokens: tuple[int, ...], prompt: tuple[int, ...]) -> rollouts.Rollout:
    return rollouts.Rollout(
        f"x/{index}", "x", 1, f"p{group}", index, "", "ok", 0.0, 0.0, 0.0, float(index), True, None, None, None, len(tokens), tokens,
        tuple(-float(t) for t in tokens), prompt,
    )  # fmt: skip


def test_a_tree_gives_the_logprobs_of_the_separate_texts(ctx):
    tiny.model_named(ctx, "sft")
    model, _ = load(ctx.model("sft").path)
    rng = torch.Generator().manual_seed(0)
    draw = lambda n: tuple(torch.randint(10, 300, (n,), generator=rng).tolist())  # noqa: E731
    prompts = [draw(9), draw(5)]
    found = [rollout(i, i // 3, draw(2 + i), prompts[i // 3]) for i in range(6)]
    batches = trees(found, 64)
    assert sum(int(b.weights_BT.sum()) for b in batches) == sum(len(r.token_ids) for r in found)
    seen = {}
    for batch in batches:
        logp = tree_logprobs(model, batch)
        for index in range(6):
            own = batch.extra["index"] == index
            if (own & batch.learned_BT).any():
                seen[index] = logp[own & batch.learned_BT]
                assert batch.extra["sampler"][own & batch.learned_BT].tolist() == list(found[index].logprobs)
    for index, r in enumerate(found):
        alone = to_batch(pack([Example(r.prompt_token_ids, [(r.token_ids, 1.0)])], 32), [0])
        torch.testing.assert_close(seen[index], token_logprobs(model, alone)[alone.learned_BT], atol=2e-5, rtol=1e-4)


def test_groups_without_variance_are_dropped_and_parts_cover_the_rest():
    found = [rollout(i, i // 2, (1, 2), (3,)) for i in range(8)]
    found = [rollouts.replace(r, reward=1.0 if i in (0, 5, 7) else 0.0) for i, r in enumerate(found)]
    judged = rollouts.with_advantages(found, 2, scaled=True)
    assert [r.used for r in judged] == [True, True, False, False, True, True, True, True]
    halves = rl.parts(judged, 2)
    assert [sum(r.used for r in half) for half in halves] == [4, 2]
    assert {r.prompt_id for half in halves for r in half if r.used} == {"p0", "p2", "p3"}


def test_the_deck_deals_every_prompt_once_an_epoch_and_resumes():
    tasks = [rollouts.Task(str(i), "", "think", (), (), (), ()) for i in range(5)]
    deck = rollouts.Deck(tasks, 3)
    dealt = [t.prompt_id for t in deck.take(10)]
    assert sorted(dealt[:5]) == sorted(dealt[5:]) == list("01234")
    assert dealt[:5] != dealt[5:]
    later = rollouts.Deck(tasks, 3)
    later.taken = 7
    assert [t.prompt_id for t in later.take(3)] == dealt[7:]


def test_a_step_that_holds_a_prompt_twice_counts_its_answers_on(make_ctx):
    ctx = make_ctx(["rl.prompts_per_step=5", "rl.group=2"])
    tasks = [rollouts.Task(str(i), "", "think", ("A", "B"), ("A", "B"), (0, 1), ()) for i in range(2)]

    class Silent:
        def generate(self, asks):
            return [Answer(ask.key, "", token_ids=(1,), logprobs=(0.0,), prompt_token_ids=(1,)) for ask in asks]

    found = rollouts.collect(Silent(), rollouts.Deck(tasks, 3), ctx.cfg, 1, "r", need_variance=False)
    assert len({r.rollout_id for r in found}) == len(found) == 10
    assert sorted(r.sample for r in found if r.prompt_id == found[0].prompt_id)[:4] == [0, 1, 2, 3]


def test_an_engine_that_cannot_answer_is_no_failure_of_the_policy(make_ctx):
    ctx = make_ctx(["rl.prompts_per_step=1", "rl.group=2"])
    tasks = [rollouts.Task("0", "", "think", ("A", "B"), ("A", "B"), (0, 1), ())]

    class Broken:
        def generate(self, asks):
            return [Answer(ask.key, error="out of memory") for ask in asks]

    with pytest.raises(EngineError, match="2 of 2 answers failed in the engine, such as: out of memory"):
        rollouts.collect(Broken(), rollouts.Deck(tasks, 3), ctx.cfg, 1, "r")
    with pytest.raises(EngineError, match="1 of 1 answers failed"):
        rollouts.validate(Broken(), tasks, ctx.cfg)


def test_how_often_the_first_slot_is_chosen_is_told_and_kept(ctx, tmp_path):
    task = rollouts.Task("0", "", "direct", ("A", "B", "C"), ("C", "A", "B"), (0, 1, 0), ())
    orders = [["C", "B", "A"], ["B", "A", "C"], ["A", "B", "C"]]
    texts = [*map(format_answer, orders), "no answer"]
    found = [rollouts.judge(task, Answer(str(i), text, token_ids=(1,)), ctx.cfg, 1, "r", i) for i, text in enumerate(texts)]
    assert [r.first_slot for r in found] == [0, 2, 1, None]
    rollouts.store(found, tmp_path / "step.arrow")
    assert rollouts.figures(rollouts.load(tmp_path / "step.arrow"), 9)["first_shown"] == 0.25


def test_a_click_where_few_look_counts_more_and_moves_no_target(make_ctx):
    ctx = make_ctx(["rl.prompts_per_step=2", "rl.group=2", "rl.reward=ndcg"])
    labels = ["A", "B", "C"]

    def task(name, grades, weights):
        row = {"prompt_id": name, "prompt": "", "mode": "direct", "incoming": labels, "shown": labels, "evidence": []}
        return rollouts.Task(**rollouts._tuples(rollouts._weighted(row | {"grades": grades, "weights": weights})))

    seen, unseen, plain = task("seen", [0, 1, 0], [1, 1, 2]), task("unseen", [0, 1, 0], [1, 4, 5]), task("plain", [0, 1, 0], None)
    assert (seen.weight, unseen.weight, plain.weight) == (1.0, 4.0, 1.0)

    class Halves:
        def generate(self, asks):
            orders = [["B", "A", "C"] if ask.key.endswith("0") else ["A", "C", "B"] for ask in asks]
            return [Answer(a.key, format_answer(o), token_ids=(1,), logprobs=(0.0,)) for a, o in zip(asks, orders, strict=True)]

    drawn = rollouts.collect(Halves(), rollouts.Deck([seen, unseen], 3), ctx.cfg, 1, "r")
    found = {(r.prompt_id, r.sample): r.advantage for r in drawn}
    assert found["seen", 0] > 0 > found["seen", 1] == -found["seen", 0]
    assert found["unseen", 0] == pytest.approx(4 * found["seen", 0])
    bought = task("bought", [0, 1, 2], [1, 4, 1])
    assert bought.weight == pytest.approx((1 * 4 + 3 * 1) / 4)
    assert bought.paid[1] > bought.paid[2] == 2.0, "beside each other the click where few look says more"
    assert rollouts.validate(Halves(), [bought], ctx.cfg)["mrr"] == 0.5, "and yet what was bought is the target"


def policy_of(ctx):
    """A policy in training; its sampler is not started."""
    tiny.model_named(ctx, "sft")
    plan = rl.Plan("rl", ctx.model("sft"), ctx.cfg.rl.student)
    return rl.Policy(ctx.cfg, ctx, plan, "rl-x", load(plan.start.path)[0], None, ctx.work("curve") / "metrics.jsonl")


def test_the_updates_of_a_step_are_clipped_against_the_policy_that_sampled(make_ctx):
    ctx = make_ctx(["rl.updates=2", "rl.student={max_steps: 1, lr: 0.03, warmup: 0.0, precision: fp32, tokens_per_batch: 64}"])
    policy = policy_of(ctx)
    found = [rollouts.replace(rollout(i, i // 2, (20 + i, 31, 42), (11, 12, 13 + i // 2)), logprobs=(-6.0,) * 3) for i in range(8)]
    halves = [trees(part, 64) for part in rl.parts(found, 2)]
    with torch.no_grad():
        sampled = [tree_logprobs(policy.model, tree, ctx.cfg.rl.temperature) for batches in halves for tree in batches]
    taken, lines, step = [], [], policy.engine.backward_and_step

    def recorded(loss_fn, batches):
        lines.append(step(loss_fn, batches))
        taken.extend(batches)
        return dict(lines[-1])

    policy.engine.backward_and_step = recorded
    told = policy._update(1, found)
    for tree, logp in zip(taken, sampled, strict=True):
        torch.testing.assert_close(tree.extra["old"], logp, atol=1e-5, rtol=1e-5)
    assert lines[0]["clipped"] == 0 < lines[1]["clipped"]
    for name in ("loss", "grad_norm", "clipped", "ratio"):
        assert told[name] == pytest.approx((lines[0][name] + lines[1][name]) / 2)
    assert told["tokens"] == lines[0]["tokens"] + lines[1]["tokens"] > lines[1]["tokens"] > 0
    policy.engine.close()


def test_a_kill_leaves_no_half_validation(ctx, monkeypatch):
    policy, write = policy_of(ctx), Path.write_text
    monkeypatch.setattr(rollouts, "validate", lambda *_: {"ndcg3": 0.5, "recall1": 0.25})

    def killed(path, text):
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        policy._validated(0, [], {})
    monkeypatch.setattr(Path, "write_text", write)
    assert policy._validated(0, [], {})
    assert policy.valid == {0: {"ndcg3": 0.5, "recall1": 0.25}}
    policy.engine.close()


def test_missing_prompts_are_named(make_ctx):
    ctx = make_ctx()
    tokenizer = tiny.model_named(ctx, "sft", "sft-teacher")
    tiny.put(ctx, "rl_prompts", tiny.rl_rows(tokenizer, 2))
    with pytest.raises(InputError, match="split 'valid'"):
        rollouts.read_tasks(ctx, "valid")


def test_rl_trains_repeats_and_survives_a_kill(make_ctx):
    ctx = make_ctx(QUICK)
    tokenizer = tiny.trained(ctx, "sft-teacher")
    tiny.put(ctx, "rl_prompts", tiny.rl_rows(tokenizer, 12) + tiny.rl_rows(tokenizer, 8, "valid", 100))
    result = rl.run(ctx.cfg, ctx)
    made = ctx.model("rl")
    curve = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [1, 2, 3]
    assert {"reward", "invalid", "identity", "ratio", "tau_incoming", "dropped", "alarms"} <= set(curve[0])
    assert curve[0]["invalid"] < 0.9, "the tiny SFT model often answers in the form"
    assert any(line["loss"] != 0 for line in curve)
    assert all(abs(line["ratio"] - 1) < 2e-3 for line in curve if "ratio" in line), "sampler and trainer are one policy after each push"
    outcome = result.detail["rl"]
    assert outcome["after"]["ndcg3"] >= outcome["before"]["ndcg3"]
    folder = ctx.work("rollouts", outcome["run"])
    stored = rollouts.load(folder / "step-00002.arrow")
    assert all((r.ratio is not None) == r.used for r in stored)

    before = made.hash
    shutil.rmtree(ctx.root / "models" / "rl")
    (folder / "step-00003.arrow").unlink()  # killed while the third step was sampled
    (folder / "valid-00003.json").unlink()
    plan = rl.Plan("rl", ctx.model("sft"), ctx.cfg.rl.student)
    again = Result()
    rl.optimise(ctx.cfg, ctx, plan, again)
    assert again.detail["rl"]["run"] == outcome["run"]
    assert rollouts.load(folder / "step-00002.arrow") == stored
    repeated = [json.loads(line) for line in (ctx.model("rl").path / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "grad_norm", "reward", "valid_ndcg3"):
        assert [line.get(name) for line in repeated] == [line.get(name) for line in curve], "training repeats bit for bit"
    assert ctx.model("rl").hash == before
