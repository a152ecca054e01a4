"""Distillation examples: what is taken over from a thinking answer, what from the labels alone, and the stage with a real engine."""

import numpy as np
import pytest

from gr2.errors import MissingInputError
from gr2.prompts import ANSWER_OPEN, EMPTY_THOUGHT, LABELS, load_template
from schemas.program_lists import TAUGHT
from scoring.engine import Answer
from scoring.model import label_logprobs, load
from spark_jobs import distill_examples
from spark_jobs.program import boosted
from spark_jobs.prompting import views
from tests.spark import prompt_world

pytestmark = pytest.mark.spark
SETTINGS = [
    "distill.source=rl",
    "distill.max_requests=6",
    "distill.replicas=2",
    "prompt.max_prompt_tokens=1000",
    "prompt.max_thought_tokens=8",
]
SETTINGS += ["prompt.max_answer_tokens=24"]


class Script:
    """An engine with answers by heart, which keeps what it was asked."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts, self.contexts = texts, []

    def generate(self, asks):
        return [Answer(ask.key, self.texts.get(ask.key) or self.texts[ask.key.split("#")[0]]) for ask in asks]

    def label_logprobs(self, prompts, labels):
        self.contexts = list(prompts)
        scores = np.tile(-np.arange(len(labels), dtype=np.float32), (len(prompts), 1))
        scores[[p.startswith("unreadable") for p in prompts]] = np.nan
        return scores

    def close(self) -> None:
        pass


def test_the_thinking_answer_counts_and_the_labels_where_it_does_not_parse(ctx):
    rows = [
        {"example_id": key, "request_id": key, "think": f"{start} {key}: think, then rank\n", "prompt": f"{start} {key}: rank",
         "ordinal": 1, "labels": ["C", "A", "B"]}
        for key, start in (("fine", "p"), ("broken", "p"), ("lost", "unreadable"))
    ]  # fmt: skip
    texts = {"fine": '<think>why @B</think>["B","C","A"]', "broken": '<think>why</think>["B","B","A"]', "lost": "nothing"}
    engine = Script(texts)
    fine, broken = distill_examples.imitated(engine, rows, ctx.cfg, "rl@x")
    assert engine.contexts[0] == "p fine: think, then rank\n<think>why @B</think>" + ANSWER_OPEN, "after its own thought"
    assert engine.contexts[1] == "p broken: rank"
    assert (fine["order"], fine["source_mode"]) == (["B", "C", "A"], "think")
    assert fine["label_logprobs"] == pytest.approx([-1.0, -2.0, 0.0], abs=1e-6)
    assert (broken["order"], broken["source_mode"]) == (["A", "B", "C"], "score")
    assert broken["label_logprobs"] == pytest.approx([0.0, -1.0, -2.0], abs=1e-6)
    assert fine["prompt"] == "p fine: rank", "the student is to do without a thought"


def test_several_thoughts_are_averaged(make_ctx):
    cfg = make_ctx(["distill.thoughts=3", "distill.temperature=1"]).cfg
    row = {"example_id": "r", "request_id": "r", "think": "p: think\n", "prompt": "p: rank", "ordinal": 1, "labels": ["C", "A", "B"]}
    engine = Script({"r#0": '<think>x</think>["B","C","A"]', "r#1": '<think>y</think>["B","B"]', "r#2": '<think>z</think>["C","B","A"]'})
    scores = {"x": [0.1, 0.8, 0.1], "z": [0.1, 0.3, 0.6]}
    engine.label_logprobs = lambda prompts, labels: np.log([scores[p.partition("<think>")[2][0]] for p in prompts], dtype=np.float32)
    (made,) = distill_examples.imitated(engine, [row], cfg, "rl@x")
    assert made["order"] == ["B", "C", "A"], "by mean place over the two that parse, then by probability"
    assert made["source_mode"] == "think"
    np.testing.assert_allclose(np.exp(made["label_logprobs"]), [0.55, 0.35, 0.1], rtol=1e-5)


def test_the_stage_asks_its_source_and_a_rerun_changes_nothing(make_ctx):
    ctx = make_ctx(SETTINGS)
    with pytest.raises(MissingInputError, match="gr2 stage candidates"):
        distill_examples.run(ctx.cfg, ctx)
    asked = prompt_world.build(ctx, "rl")
    result = distill_examples.run(ctx.cfg, ctx)
    rows = ctx.lake.read("distill_examples", order_by=["example_id"]).to_pylist()
    assert result.rows_out == len(rows) == 12
    assert {asked[r["request_id"]]["split"] for r in rows} == {"rerank", "valid"}
    assert {r["source_model"] for r in rows} == {ctx.model("rl").id}
    assert result.detail["did_not_parse"] == sum(r["source_mode"] == "score" for r in rows)
    closing = load_template().closing["direct"]
    assert all(r["prompt"].endswith(f"{closing}\n{EMPTY_THOUGHT}{ANSWER_OPEN}") for r in rows)
    shown = {f"{row['request_id']}#{row['replica']}": view for row, view in views(ctx, ctx.cfg, TAUGHT, None, (0, 1))}
    assert all(sorted(r["order"]) == sorted(shown[r["example_id"]].labels) for r in rows)
    model, tokenizer = load(ctx.model("rl").path)
    alone = [r for r in rows if r["source_mode"] == "score"]
    wanted = label_logprobs(model, tokenizer, [r["prompt"] for r in alone], list(LABELS[:10]))
    for row, scores in zip(alone, wanted, strict=True):
        np.testing.assert_allclose(row["label_logprobs"], [scores[LABELS.index(label)] for label in row["order"]], atol=2e-3)
        assert row["label_logprobs"] == sorted(row["label_logprobs"], reverse=True)
    version = ctx.lake.version("distill_examples")
    distill_examples.run(ctx.cfg, ctx)
    assert ctx.lake.version("distill_examples") == version


def test_the_program_tells_its_own_probabilities_and_needs_no_model_of_its_own(make_ctx, monkeypatch):
    monkeypatch.setattr("scoring.boosted.BAGS", 1)
    ctx = make_ctx([*SETTINGS, "distill.source=evidence", "distill.start=sft", "distill.max_requests=0"])
    prompt_world.build(ctx, "sft")
    result = distill_examples.run(ctx.cfg, ctx)
    rows = ctx.lake.read("distill_examples", order_by=["example_id"]).to_pylist()
    assert {r["source_mode"] for r in rows} == {"program"}
    assert {r["source_model"] for r in rows} == {result.detail["source"]}
    judge, name = boosted(ctx)
    assert name == result.detail["source"]
    shown = {f"{row['request_id']}#{row['replica']}": (row, view) for row, view in views(ctx, ctx.cfg, TAUGHT, None, (0, 1))}
    assert {r["example_id"] for r in rows} == set(shown)
    for row in rows:
        request, view = shown[row["example_id"]]
        told = dict(zip(view.labels, judge.log_probabilities([view.candidates], [request["user_id"]])[0], strict=True))
        assert row["label_logprobs"] == sorted(row["label_logprobs"], reverse=True)
        np.testing.assert_allclose([told[label] for label in row["order"]], row["label_logprobs"], atol=1e-5)
        assert np.exp(row["label_logprobs"]).sum() == pytest.approx(1.0, abs=1e-5)
    first = {r["request_id"]: r["prompt"] for r in rows if r["example_id"].endswith("#0")}
    assert any(first[r["request_id"]] != r["prompt"] for r in rows), "replicas show another shuffle"
    version = ctx.lake.version("distill_examples")
    distill_examples.run(ctx.cfg, ctx)
    assert ctx.lake.version("distill_examples") == version
