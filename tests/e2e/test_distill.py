"""Distillation to the score mode: a tiny student takes over orders from soft labels, without a thought."""

import json

import numpy as np
import pytest
import torch

from gr2 import artifacts
from gr2.errors import InputError
from gr2.prompts import ANSWER_OPEN, ANSWER_SEPARATOR, EMPTY_THOUGHT
from scoring.model import label_logprobs, load, save
from tests.e2e import tiny
from training import distill
from training.data import pack, to_batch
from training.losses import soft_label_loss

pytestmark = pytest.mark.e2e


def rows(tokenizer, count: int) -> list[dict]:
    """A source that ranks the labels by name, with log-probabilities to match."""
    made = []
    for number in range(count):
        shown, _ = tiny.view(number, candidates=3 if number % 4 else 2)
        order = sorted(shown.labels)
        prompt = tiny.prompt_of(tokenizer, shown, "direct") + EMPTY_THOUGHT + ANSWER_OPEN
        made.append(
            {
                "example_id": f"r{number}#0",
                "request_id": f"r{number}",
                "source_model": "rl@x",
                "source_mode": "think",
                "prompt": prompt,
                "order": order,
                "label_logprobs": [-0.5 - 1.5 * place for place in range(len(order))],
                "ordinal": number,
            }
        )
    return made


def test_fast_learns_order_and_log_probabilities(make_ctx):
    ctx = make_ctx(
        ["distill.train.max_steps=25", "distill.train.lr=5e-3", "distill.train.tokens_per_batch=2048", "distill.train.precision=fp32"]
    )
    tokenizer = tiny.model_named(ctx, "midtrain")
    table = rows(tokenizer, 40)
    tiny.put(ctx, "distill_examples", table)
    distill.run(ctx.cfg, ctx)
    made = ctx.model("fast")
    curve = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1]["loss"] < 0.4 * curve[0]["loss"]
    assert 0.95 < curve[-1]["same_first"] < 1.0001, "a share of the lists"
    model, _ = load(made.path)
    scores = label_logprobs(model, tokenizer, [r["prompt"] for r in table[:8]], ["A", "B", "C"])
    three = [i for i in range(8) if len(table[i]["order"]) == 3]
    assert (np.argsort(-scores[three], axis=1) == [0, 1, 2]).all()
    after = label_logprobs(model, tokenizer, [table[i]["prompt"] + "A" + ANSWER_SEPARATOR for i in three], ["A", "B", "C"])
    assert (after.argmax(axis=1) == 1).all(), "after the best label, the next one"


def test_it_starts_where_the_profile_says(make_ctx):
    ctx = make_ctx(["distill.train.max_steps=1", "distill.start=sft"])
    tokenizer = tiny.model_named(ctx, "sft")
    tiny.put(ctx, "distill_examples", rows(tokenizer, 8))
    distill.run(ctx.cfg, ctx)
    assert ctx.model("fast").manifest["inputs"]["models"] == {"sft": ctx.model("sft").hash}
    early = make_ctx(["distill.train.max_steps=1", "distill.start=midtrain"])
    with artifacts.publish_folder(ctx.root, "midtrain", {"unread": [5, 9]}) as folder:
        model, _ = load(ctx.model("sft").path)
        before = model.get_input_embeddings().weight.detach().clone()
        save(model, tokenizer, folder)
    distill.run(early.cfg, ctx)
    rows_VD = load(ctx.model("fast").path)[0].get_input_embeddings().weight
    moved_V = (rows_VD - before).norm(dim=1)
    assert moved_V[[5, 9]].min() > 10 * moved_V[10:].max(), "what mid-training never read is drawn anew, as before SFT"


def test_the_loss_of_a_batch_is_the_mean_over_lists_of_any_length_of_what_each_place_costs(ctx):
    tokenizer = tiny.model_named(ctx, "rl")
    model, _ = load(ctx.model("rl").path)
    tiny.put(ctx, "distill_examples", rows(tokenizer, 5))
    table = ctx.lake.read("distill_examples", order_by=["ordinal"])
    for places, weights in ((1, [1.0]), (5, [2 / 3, 1 / 3])):
        examples, taught = distill.to_examples(tokenizer, table, places)
        batch = to_batch(pack(examples, 512), slice(None))
        expected, same = [], []
        for row in table.to_pylist():
            own = weights if len(row["order"]) == 3 else [1.0]  # the last label is what is left
            costs = []
            for place in range(len(own)):
                context, rest = row["prompt"] + "".join(label + ANSWER_SEPARATOR for label in row["order"][:place]), row["order"][place:]
                student = torch.from_numpy(label_logprobs(model, tokenizer, [context], rest))
                costs.append(soft_label_loss(student, torch.tensor([row["label_logprobs"][place:]])).item())
                same += [int(student.argmax()) == 0] if place == 0 else []
            expected.append(np.dot(own, costs))
        loss, told = taught.loss(model, batch)
        assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)
        assert told["same_first"] == pytest.approx(np.mean(same), rel=1e-4)


def test_empty_and_broken_examples_are_refused(ctx):
    tokenizer = tiny.model_named(ctx, "midtrain")
    tiny.put(ctx, "distill_examples", [])
    with pytest.raises(InputError, match="empty"):
        distill.run(ctx.cfg, ctx)
    tiny.put(ctx, "distill_examples", [{**rows(tokenizer, 1)[0], "label_logprobs": [-1.0]}])
    with pytest.raises(InputError, match="differ in length"):
        distill.run(ctx.cfg, ctx)
