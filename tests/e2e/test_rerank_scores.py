"""Scoring end to end: two real models, one engine, one Spark job; rows are permutations or named failures, and stay as they are."""

import datetime as dt
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import schemas
from gr2 import artifacts
from gr2.config import Model
from gr2.context import Context
from gr2.errors import ConfigError, MissingInputError, ModelError
from gr2.prompts import LABELS, load_template, vocabulary_texts
from gr2.sids import sid_tokens, to_text
from scoring import compressed
from scoring.model import build_model, build_vocabulary, encode, label_logprobs, load, load_tokenizer, save
from spark_jobs import evaluation, rerank_scores
from spark_jobs.prompting import render_texts, views
from tests.tables import put

pytestmark = pytest.mark.e2e
SIZE = Model(hidden=64, layers=2, heads=2, kv_heads=2, mlp=128, dropout=0.0)  # vLLM on CPU needs heads of at least 32
ITEMS, LISTED, REQUESTS = 60, 5, 24
POISONED = "test:u0:4"  # every fact that can be said is said of its candidates: longer than a prompt may be
SETTINGS = [
    "scoring.models={sft: [think, direct], rl: [score], opd: [think]}",
    "scoring.miss_sample=4", "scoring.audit_requests=6", "scoring.chunk=16",
    "prompt.max_thought_tokens=12", "prompt.max_answer_tokens=12", "prompt.max_prompt_tokens=210",
    "scoring.structured=true", "candidates.n=5", "tokenizer.levels=2", "scoring.audit_replicas=2", "prompt.template=rerank_v1",
]  # fmt: skip


def fill(ctx: Context, name: str, rows: list[dict[str, Any]]) -> None:
    """A table whose columns that no row gives are empty."""
    contract = schemas.get(name)
    empty = {pa.string(): "", pa.date32(): dt.date(2026, 1, 1), pa.bool_(): False, pa.float64(): 0.0, pa.int32(): 0}
    blank = {c.name: None if c.nullable else [] if pa.types.is_list(c.type) else empty[c.type] for c in contract.columns}
    put(ctx, name, [blank | r for r in rows])


def world(ctx: Context) -> None:
    """Requests with evidence, items with codes, and two random models of one architecture."""
    rng = np.random.default_rng(2)
    with artifacts.publish_folder(ctx.root, "tokenizer", {}) as folder:
        (folder / "config.json").write_text("{}")
    version = artifacts.resolve(ctx.root, "tokenizer").id
    fill(ctx, "items", [{"item_id": f"i{i}", "text": f"Item {i}"} for i in range(ITEMS)])
    codes = [{"tokenizer": version, "item_id": f"i{i}", "token_text": to_text((i // 12, i % 12))} for i in range(ITEMS)]
    fill(ctx, "semantic_ids", codes)
    requests, features = [], []
    for r in range(REQUESTS):
        items = [f"i{i}" for i in rng.permutation(ITEMS)[: LISTED + 3]]
        listed, hit = items[:LISTED], r % 2 == 0
        grades = [int(hit and place == r % LISTED) for place in range(LISTED)]
        request = {"request_id": f"test:u{r}:4", "split": "test", "night": "none"}
        own = {"history_ids": items[LISTED:], "history_days": [9, 5, 2], "candidate_ids": listed, "grades": grades}
        requests.append({**request, **own, "target_rank": r % LISTED + 1 if hit else None})
        for place, item in enumerate(listed):
            recent = float(rng.uniform(0, 5))
            features.append({**request, "item_id": item, "incoming_rank": place + 1, "recent": recent, "grade": grades[place]})
    facts = [c.name for c in schemas.get("candidate_features").columns if pa.types.is_floating(c.type)]
    features = [f | dict.fromkeys(facts, 1e6) if f["request_id"] == POISONED else f for f in features]
    fill(ctx, "candidates", requests)
    fill(ctx, "candidate_features", features)
    vocabulary = build_vocabulary(vocabulary_texts(load_template("rerank_v1")), 420, sid_tokens(2, 12), ctx.work("vocabulary"))
    for name, seed in (("sft", 1), ("rl", 2)):
        with artifacts.publish_folder(ctx.root, name, {}) as draft:
            save(build_model(SIZE, vocabulary, None, seed), vocabulary, draft)


def test_scores_are_permutations_or_named_failures_and_a_rerun_adds_nothing(make_ctx):
    ctx = make_ctx(SETTINGS)
    with pytest.raises(MissingInputError, match="gr2 stage sft"):
        rerank_scores.run(ctx.cfg, ctx)
    world(ctx)
    result = rerank_scores.run(ctx.cfg, ctx)
    log = (ctx.root / "logs" / "gr2.log").read_text()
    assert "5 chunks answered by 1 worker, engines started: 1" in log, "two models, three modes, one engine"
    rows = ctx.lake.read("rerank_scores", order_by=["model", "mode", "request_id", "replica"]).to_pylist()
    asked = 12 + 4 + 6  # hits, sampled misses, second replicas
    assert result.rows_out == len(rows) == 3 * asked, "opd was never trained: it is left out"
    lists = {r["request_id"]: r["candidate_ids"] for r in ctx.lake.read("candidates").to_pylist()}
    for row in rows:
        assert (row["status"] == "ok") == (row["new_order"] is not None)
        assert row["status"] in {"ok", "repeated_label"} if row["request_id"] != POISONED else row["status"] == "prompt_too_long"
        assert row["new_order"] is None or sorted(row["new_order"]) == sorted(lists[row["request_id"]])
        assert row["prompt_tokens"] > 150 or row["request_id"] == POISONED
    scored = [r for r in rows if r["mode"] == "score" and r["request_id"] != POISONED]
    assert {r["status"] for r in scored} == {"ok"}
    assert len({(tuple(r["labels"]), tuple(r["shown"])) for r in scored}) > LISTED, "labels and slots are shuffled"

    model, tokenizer = load(ctx.model("rl").path)
    seen = list(views(ctx, ctx.cfg, "test", [r["request_id"] for r in scored], (0, 1)))
    prompts = dict(
        zip(
            [(row["request_id"], row["replica"]) for row, _ in seen],
            render_texts(tokenizer, [v for _, v in seen], ctx.cfg, "score"),
            strict=True,
        )
    )
    wanted = label_logprobs(model, tokenizer, [prompts[r["request_id"], r["replica"]] for r in scored], list("ABCDE"))
    own = np.array([[wanted[n]["ABCDE".index(label)] for label in r["labels"]] for n, r in enumerate(scored)])
    np.testing.assert_allclose([r["label_logprobs"] for r in scored], own, atol=2e-3)
    prior = dict(zip("ABCDE", wanted.mean(axis=0).tolist(), strict=True))
    for row in scored:
        gains = [value - prior[label] for label, value in zip(row["labels"], row["label_logprobs"], strict=True)]
        assert [gains[lists[row["request_id"]].index(i)] for i in row["new_order"]] == pytest.approx(sorted(gains, reverse=True), abs=1e-3)

    version = ctx.lake.version("rerank_scores")
    again = rerank_scores.run(ctx.cfg, ctx)
    assert (again.rows_in, again.rows_out, ctx.lake.version("rerank_scores")) == (0, 0, version)
    check_other_settings(make_ctx, ctx)
    more = Context(
        ctx.cfg.model_copy(update={"scoring": ctx.cfg.scoring.model_copy(update={"miss_sample": 5, "models": {"rl": ("score",)}})})
    )
    before = {tuple(r[k] for k in rerank_scores.KEY): r for r in rows}
    added = rerank_scores.run(more.cfg, more)
    after = {tuple(r[k] for k in rerank_scores.KEY): r for r in ctx.lake.read("rerank_scores").to_pylist()}
    assert added.rows_out == len(after) - len(before) >= 1
    assert {k: after[k] for k in before} == before, "what was scored stays as it was"

    check_nights(ctx)
    with artifacts.publish_folder(ctx.root, "opd", {}) as draft:
        load_tokenizer(ctx.model("rl").path).save_pretrained(draft)
    version = ctx.lake.version("rerank_scores")
    with pytest.raises(ModelError, match=r"no \.safetensors.*nothing was published"):
        rerank_scores.run(ctx.cfg, ctx)
    assert ctx.lake.version("rerank_scores") == version, "a model that cannot be served stops the stage"


def check_other_settings(make_ctx, ctx: Context) -> None:
    """Settings that change an answer, though no prompt: what is kept is told, in the log and in the next run's audits."""
    total = {mode: len(ctx.lake.read("rerank_scores", ["mode"], mode=mode)) for mode in ("think", "direct", "score")}
    changes = {"scoring.structured=false": ("think", "direct"), "prompt.max_thought_tokens=9": ("think",), "scoring.dtype=bfloat16": total}
    for setting, modes in changes.items():
        other = make_ctx([*SETTINGS, setting])
        assert rerank_scores.run(other.cfg, other).rows_out == 0
        assert f"{sum(total[m] for m in modes)} answers that are kept were given" in (ctx.root / "logs" / "gr2.log").read_text()
        found = {r["subject"]: r["value"] for r in evaluation._left_by_stages(other) if r["audit"] == "stale_answers"}
        assert found == {f"{'rl' if mode == 'score' else 'sft'}/{mode}": total[mode] if mode in modes else 0 for mode in total}


def check_nights(ctx: Context) -> None:
    """A night's one list is judged by what its model scored of the experiment; where that is nothing, nobody is asked."""
    night = Context(ctx.cfg, dt.date(2026, 1, 2))
    for name in ("candidates", "candidate_features"):
        rows = ctx.lake.read(name).to_pylist()
        live = [r | {"request_id": "live:u1", "split": "live", "night": "2026-01-02"} for r in rows if r["request_id"] == "test:u1:4"]
        put(ctx, name, rows + live)
    assert rerank_scores.run(night.cfg, night).rows_out == 1
    (row,) = ctx.lake.read("rerank_scores", night="2026-01-02").to_pylist()
    (listed,) = ctx.lake.read("candidates", ["candidate_ids"], split="live")["candidate_ids"].to_pylist()
    said = ctx.lake.read("rerank_scores", night="none", mode="score").to_pylist()
    means = {x: np.mean([r["label_logprobs"][r["labels"].index(x)] for r in said if r["label_logprobs"]]) for x in row["labels"]}
    gains = np.array(row["label_logprobs"]) - [means[label] for label in row["labels"]]
    assert row["new_order"] == [listed[place] for place in np.argsort(-gains)] != listed
    both = ctx.cfg.scoring.model_copy(update={"live": {"rl": ("score",), "sft": ("score",)}})
    more = Context(ctx.cfg.model_copy(update={"scoring": both}), dt.date(2026, 1, 3))
    with pytest.raises(MissingInputError, match=r"sft@\w+ scored none .* --set scoring\.models\.sft=\[score\]` first, without --date$"):
        rerank_scores.run(more.cfg, more)


def test_compressed_contexts_are_scored_under_their_own_names(make_ctx):
    """Vectors that are the embeddings of an ID's own tokens change nothing; the policy here leaves out all that it may."""
    ctx = make_ctx([*SETTINGS, "scoring.structured=false", "scoring.models={rl: [score], latents: [score, direct], brief: [score]}"])
    world(ctx)
    base, template = ctx.model("rl"), load_template("rerank_v1")
    model, tokenizer = load(base.path)
    policy = compressed.Shortener(len(tokenizer))
    torch.nn.init.constant_(policy.bias, -1.0)
    for name, module in (("latents", torch.nn.Linear(1, 1)), ("brief", policy)):
        with artifacts.publish_folder(ctx.root, name, {}) as draft:
            compressed.save(draft, module, base.id, template)
    fill(ctx, "item_latents", [])
    with pytest.raises(MissingInputError, match="gr2 stage item_latents"):
        rerank_scores.run(ctx.cfg, ctx)
    own_VD = model.get_input_embeddings().weight.detach()
    common = {"compressor": ctx.model("latents").id, "k": 2, "text_tokens": 2}
    sids = {f"i{i}": to_text((i // 12, i % 12)) for i in range(1, ITEMS)}  # i0 is not among them: it stays said in tokens
    vectors = {i: own_VD[encode(tokenizer, sid)].flatten().tolist() for i, sid in sids.items()}
    fill(ctx, "item_latents", [{**common, "item_id": i, "vectors": own} for i, own in vectors.items()])
    rerank_scores.run(ctx.cfg, ctx)
    rows = [r for r in ctx.lake.read("rerank_scores").to_pylist() if r["request_id"] != POISONED]
    scored = [r for r in rows if r["mode"] == "score"]
    by = {m: {(r["request_id"], r["replica"]): r for r in scored if r["model"] == m} for m in ("rl", "latents", "brief")}
    assert len(by["rl"]) == len(by["latents"]) == len(by["brief"]) > 20
    for key, plain in by["rl"].items():
        embedded, short = by["latents"][key], by["brief"][key]
        np.testing.assert_allclose(embedded["label_logprobs"], plain["label_logprobs"], atol=1e-4)
        assert (embedded["prompt_tokens"], embedded["new_order"]) == (plain["prompt_tokens"], plain["new_order"])
        assert embedded["prompt_hash"] != plain["prompt_hash"]
        assert short["prompt_tokens"] < plain["prompt_tokens"] - 2 * (LISTED + 3)
        assert sorted(short["new_order"]) == sorted(plain["new_order"])
    direct = [r for r in rows if r["mode"] == "direct"]
    assert len(direct) == len(by["latents"])
    assert {by["latents"][r["request_id"], r["replica"]]["prompt_tokens"] - r["prompt_tokens"] for r in direct} == {1}, (
        "but for the opening"
    )

    other = ctx.cfg.model_copy(update={"prompt": ctx.cfg.prompt.model_copy(update={"template": "rerank_v3"})})
    with pytest.raises(ConfigError, match="another template"):
        rerank_scores.run(other, Context(other))


def test_several_shuffles_of_a_list_give_a_steadier_order_and_cost_their_tokens(make_ctx, capfd):
    """What a random model says of a candidate is noise of slots and labels: added up over more of them, replicas differ less."""
    settings = [*SETTINGS, "scoring.models={rl: [score]}", "scoring.audit_requests=24", "scoring.miss_sample=24"]
    found = {}
    for shuffles in (1, 8):
        ctx = make_ctx([*settings, f"scoring.shuffles={shuffles}", f"paths.root={make_ctx().root / str(shuffles)}"])
        world(ctx)
        rerank_scores.run(ctx.cfg, ctx)
        rows = [r for r in ctx.lake.read("rerank_scores").to_pylist() if r["status"] == "ok"]
        assert {len(r["label_logprobs"]) for r in rows} == {len(r["labels"]) for r in rows} == {LISTED * shuffles}
        assert {r["completion_tokens"] for r in rows} == {shuffles}
        said = [(label, value) for r in rows for label, value in zip(r["labels"], r["label_logprobs"], strict=True)]
        prior = {name: float(np.mean([value for label, value in said if label == name])) for name in dict(said)}
        gains, incoming = {}, {r["request_id"]: r["candidate_ids"] for r in ctx.lake.read("candidates").to_pylist()}
        for r in rows:
            less = np.array(r["label_logprobs"]) - [prior[label] for label in r["labels"]]
            gains[r["request_id"], r["replica"]] = less.reshape(shuffles, LISTED).mean(axis=0)
            wanted = np.argsort(-gains[r["request_id"], r["replica"]], kind="stable")
            assert r["new_order"] == [incoming[r["request_id"]][place] for place in wanted]
        spread = np.mean([(gains[request, 0] - gains[request, 1]) ** 2 for request, replica in gains if replica == 1])
        found[shuffles] = (spread, {(r["request_id"], r["replica"]): r for r in rows})
    assert found[8][0] < 0.3 * found[1][0], "noise of eight shuffles has an eighth of the variance"
    for key, row in found[1][1].items():
        more = found[8][1][key]
        np.testing.assert_allclose(more["label_logprobs"][:LISTED], row["label_logprobs"], atol=1e-5)
        assert 7 * row["prompt_tokens"] < more["prompt_tokens"] < 9 * row["prompt_tokens"]
    assert "other prompts" not in capfd.readouterr().err
    fewer = make_ctx([*settings, f"paths.root={ctx.root}"])
    assert rerank_scores.run(fewer.cfg, fewer).rows_out == 0, "what a release may pin is not asked again"
    total = ctx.lake.read("rerank_scores").num_rows
    assert f"{total} answers that are kept were given to other prompts" in capfd.readouterr().err


def answered(text: str = "", mode: str = "think", error: str = "", logprobs: list[float] | None = None) -> dict[str, Any]:
    return {"mode": mode, "error": error, "text": text, "logprobs": logprobs, "labels": ["B", "C", "A"], "candidates": ["x", "y", "z"]}


@pytest.mark.parametrize(
    ("row", "status", "order"),
    [
        (answered('<think>why</think>["A","B","C"]'), "ok", ["z", "x", "y"]),
        (answered('["C","A","B"]', "direct"), "ok", ["y", "z", "x"]),
        (answered('<think>why</think>["A","B"]'), "missing_label", None),
        (answered('<think>["A","B","C"]</think>'), "answer_in_thought", None),
        (answered("nonsense"), "missing_thought", None),
        (answered("RuntimeError: broken", error="engine_error"), "engine_error", None),
        (answered(mode="score", logprobs=[-1.0, -2.0, -3.0]), "ok", ["y", "x", "z"]),
    ],
)
def test_answers_become_rows_without_repair(row, status, order):
    made = rerank_scores.judge(row, {"A": -1.0, "B": -0.5, "C": -2.0})
    assert (made["status"], made["new_order"]) == (status, order)


def scored_lists(lengths: tuple[int, ...], bias: dict[str, float]) -> list[dict[str, Any]]:
    """Answers of a model that likes each list's candidates less and less, and labels as `bias` says; every label stands everywhere."""
    rows = []
    for length in lengths:
        for turn in range(length):
            labels = [LABELS[(place + turn) % length] for place in range(length)]
            logits = [bias.get(label, 0.0) - 0.3 * place for place, label in enumerate(labels)]
            own = (logits - np.logaddexp.reduce(logits)).tolist()
            rows.append({"model_id": "m", "mode": "score", "labels": labels, "logprobs": own})
    return rows


@pytest.mark.parametrize("bias", [{}, {"A": 2.0, "B": -1.0, "I": 0.5}])
def test_priors_are_of_labels_not_of_the_length_of_lists(bias):
    """Short lists hold the first labels only, at higher probabilities: that speaks neither for nor against these."""
    rows = scored_lists((3, 10), bias)
    prior = rerank_scores.label_priors(pa.Table.from_pylist(rows[:5]), pa.Table.from_pylist(rows[5:]))["m"]
    assert {label: value - prior["C"] for label, value in prior.items()} == pytest.approx({x: bias.get(x, 0.0) for x in LABELS[:10]})
    for row in rows:
        listed = [f"i{place}" for place in range(len(row["labels"]))]
        assert rerank_scores.score_order(listed, row["labels"], row["logprobs"], prior) == listed


def test_priors_of_lists_of_one_length_are_means():
    rng = np.random.default_rng(5)
    labels = [rng.permutation(list("ABCDE")).tolist() for _ in range(40)]
    rows = [{"model_id": "m", "mode": "score", "labels": own, "logprobs": rng.normal(size=5).tolist()} for own in labels]
    prior = rerank_scores.label_priors(pa.Table.from_pylist(rows))["m"]
    means = {x: np.mean([row["logprobs"][row["labels"].index(x)] for row in rows]) for x in "ABCDE"}
    for row in rows:
        orders = [rerank_scores.score_order(list("abcde"), row["labels"], row["logprobs"], of) for of in (prior, means)]
        assert orders[0] == orders[1]
