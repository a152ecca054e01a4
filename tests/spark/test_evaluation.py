"""Figures equal a plain reading of their definitions; failures score zero; failed audits are published, then stop the run."""

import io
import json
import math

import numpy as np
import pytest
from rerank_world import learnable

from gr2 import artifacts, cli
from gr2.config import Config, load
from gr2.context import Context
from gr2.errors import AuditError, MissingInputError
from gr2.pipeline import write_record
from spark_jobs import baselines, evaluation, release
from tests.tables import put

pytestmark = pytest.mark.spark


def model(ctx: Context, name: str) -> str:
    """An artifact that stands for a trained model; its id."""
    with artifacts.publish_folder(ctx.root, name, {}) as folder:
        (folder / "config.json").write_text(json.dumps({"model": name}))
    return artifacts.resolve(ctx.root, name).id


def scores(ctx: Context, requests: dict[str, dict], leave_out: int = 0) -> None:
    """Model `rl` puts the target first, but fails each fifth answer; `sft` keeps the incoming order. Misses are scored for some only."""
    ids = {name: model(ctx, name) for name in ("rl", "sft")}
    rows = []
    for n, (request, row) in enumerate(sorted(requests.items())):
        if row["split"] != "test" or (row["target_rank"] is None and n % 3) or n < leave_out:
            continue
        for name, replica in (("rl", 0), ("rl", 1), ("sft", 0)):
            order = sorted(row["candidate_ids"], key=lambda i: (i != row["target_id"], i)) if name == "rl" else row["candidate_ids"]
            failed = name == "rl" and n % 5 == 0
            rows.append(
                {"request_id": request, "model_id": ids[name], "model": name, "mode": "think", "replica": replica, "split": "test",
                 "night": "none",
                 "status": "not_json" if failed else "ok", "new_order": None if failed else order, "labels": list("ABCDEFGHIJ"),
                 "shown": np.random.default_rng([n, replica]).permutation(10).tolist(), "reasoning": "x", "text": "x",
                 "label_logprobs": None, "prompt_hash": "0", "prompt_tokens": 1, "completion_tokens": 1, "seconds": 0.0}
            )  # fmt: skip
    put(ctx, "rerank_scores", rows)


def by_definition(requests: list[dict], orders: dict[str, list[str] | None]) -> dict[str, float]:
    """R@1, N@3, MRR over requests with one target, without numpy."""
    ranks = [
        1 + order.index(r["target_id"]) if (order := orders.get(r["request_id"])) and r["target_id"] in order else math.inf
        for r in requests
    ]
    n = len(ranks)
    return {
        "recall@1": sum(r == 1 for r in ranks) / n,
        "ndcg@3": sum(1 / math.log2(1 + r) for r in ranks if r <= 3) / n,
        "mrr": sum(1 / r for r in ranks) / n,
    }


@pytest.fixture
def small(make_ctx) -> Context:
    return make_ctx(["evaluation.bootstrap=200", "data.protocol=leave_one_out"])


def test_figures_intervals_audits_and_rerun(small):
    ctx, cfg = small, small.cfg
    requests = learnable(ctx)
    with pytest.raises(MissingInputError, match="rerank_scores"):
        evaluation.run(cfg, ctx)
    baselines.run(cfg, ctx)
    scores(ctx, requests)
    cost = {"seconds": 1.0, "peak_mib": 1.0, "tokens": 0, "status": "ok", "fingerprint": "0", "detail": {}}
    record = {"stage": "events", "run_id": "before", "rows_in": 10, "rows_out": 7, "quarantined": 1, "duplicates": 2, **cost}
    write_record(ctx, "events", record)
    found = [{"audit": "sid_health", "subject": "uniqueness", "value": 0.95, "low": 0.9, "high": None, "passed": True, "detail": "d"}]
    (ctx.work("audits") / "semantic_ids.json").write_text(json.dumps(found))
    evaluation.run(cfg, ctx)

    test = [r for r in requests.values() if r["split"] == "test"]
    scored = ctx.lake.read("rerank_scores", replica=0).to_pylist()
    orders = {name: {r["request_id"]: r["new_order"] for r in scored if r["model"] == name} for name in ("rl", "sft")}
    orders["prerank"] = {r["request_id"]: r["candidate_ids"] for r in test}
    rows = ctx.lake.read("metrics").to_pylist()
    cells = {(r["model"], r["population"], r["slice"], r["metric"], r["reference"]): r for r in rows if r["mode"] != "full"}
    for slice_ in ("all", "same_day", "later_day"):
        for population in ("overall", "conditional"):
            judged = [r for r in test if slice_ in ("all", r["slice"]) and (population == "overall" or r["target_rank"])]
            for name, found_orders in orders.items():
                want = by_definition(judged, found_orders)
                for metric, value in want.items():
                    row = cells[name, population, slice_, metric, ""]
                    assert (row["value"], row["n"]) == (pytest.approx(value), len(judged)), (name, population, slice_, metric)
                    assert row["low"] <= row["value"] <= row["high"]
                    gain = cells.get((name, population, slice_, metric, "prerank"))
                    if name != "prerank":
                        assert gain["value"] == pytest.approx(value - by_definition(judged, orders["prerank"])[metric])
    assert cells["sft", "overall", "all", "recall@1", "prerank"]["high"] <= 0, "a copy gains nothing, a miss costs nothing"
    assert cells["oracle", "conditional", "all", "recall@1", ""]["value"] == 1.0
    assert cells["rl", "conditional", "all", "recall@1", ""]["value"] < 1.0, "failed answers are zeros"
    full = {r["metric"]: r for r in rows if r["mode"] == "full" and r["slice"] == "all"}
    assert full["recall@10"]["value"] == pytest.approx(np.mean([(r["full_rank"] or 99) <= 10 for r in test]))
    assert {r["protocol"] for r in rows} == {"leave_one_out/as_published"}

    audits = {(a["stage"], a["audit"], a["subject"]): a for a in ctx.lake.read("audits").to_pylist()}
    assert audits["semantic_ids", "sid_health", "uniqueness"]["value"] == 0.95
    assert audits["events", "reconciliation", "events"]["passed"]
    assert audits["evaluation", "position", "rl/think/tau"]["value"] == 1.0
    assert audits["evaluation", "reward_hacking", "sft/think/identity_where_wrong"]["value"] == 1.0
    assert {a for _, a, _ in audits} >= {"leakage", "coverage"}

    versions = [ctx.lake.version(t) for t in ("metrics", "audits")]
    evaluation.run(cfg, ctx)
    assert [ctx.lake.version(t) for t in ("metrics", "audits")] == versions, "a rerun changes nothing"

    strict = Context(Config.model_validate({**cfg.model_dump(), "evaluation": {**cfg.evaluation.model_dump(), "max_invalid_rate": 0.01}}))
    with pytest.raises(AuditError, match=r"rl/think/invalid_rate"):
        evaluation.run(strict.cfg, strict)
    assert set(ctx.lake.read("metrics")["run_id"].to_pylist()) == {strict.run_id}, "one set of figures a profile and day"
    assert not all(ctx.lake.read("audits")["passed"].to_pylist()), "the evidence of the failure is published"
    check_results_table(strict, cells)
    check_wavering(cfg)
    check_stale_baselines(strict)


def check_wavering(cfg: Config) -> None:
    """Orders that depend on places are not released, but told, in the report too. What is only compared may waver."""
    small = ("candidates.n=10", "evaluation.bootstrap=200", "data.protocol=leave_one_out")
    settings = [f"paths.root={cfg.paths.root}", *small, "evaluation.min_tau=0.5"]
    wavers, stands = ([*settings, f"scoring.live={{{name}: [think]}}"] for name in ("sft", "rl"))
    ctx = Context(load("demo", wavers))
    evaluation.run(ctx.cfg, ctx)
    with pytest.raises(AuditError, match=r"not promoted: .*position.*sft/think/tau"):
        cli.run("demo", None, "release", "report", False, wavers)
    assert "sft" in (ctx.root / "reports" / "index.html").read_text()
    assert not ctx.lake.exists("releases")

    ctx = Context(load("demo", stands))
    evaluation.run(ctx.cfg, ctx)
    assert ctx.lake.read("audits", run_id=ctx.run_id, passed=False)["subject"].to_pylist() == ["sft/think/tau"]
    release.run(ctx.cfg, ctx)
    assert ctx.lake.read("releases")["status"].to_pylist() == ["promoted"]


def check_stale_baselines(ctx: Context) -> None:
    """Lists that were made again are not judged with orders of the old ones, in silence or with a traceback."""
    lists = ctx.lake.read("candidates").to_pylist()
    hit = next(r["request_id"] for r in lists if r["split"] == "test" and r["target_rank"])
    put(ctx, "candidates", [r | ({"request_id": "test:new:9"} if r["request_id"] == hit else {}) for r in lists])
    with pytest.raises(AuditError, match="coverage"):
        evaluation.run(ctx.cfg, ctx)
    found = {a["subject"]: a for a in ctx.lake.read("audits", audit="coverage").to_pylist()}
    assert {name: f["value"] for name, f in found.items() if not name.startswith(("rl/", "sft/"))} == {
        f"{name}/order": 2.0 for name in ("prerank", *ctx.cfg.evaluation.baselines)
    }, "one came, one went"
    assert "run `gr2 stage baselines`" in found["prerank/order"]["detail"]


def test_the_latest_figures_are_shown_not_those_of_the_last_hash(ctx):
    base = {"profile": "demo", "protocol": "p", "model": "rl", "mode": "think", "population": "conditional", "slice": "all", "seed": 1}
    base |= {"n_candidates": 10, "metric": "recall@1", "reference": "", "low": None, "high": None, "n": 1}
    for run_id, value in (("demo-2026-01-01-ff", 0.1), ("demo-2026-01-02-ee", 0.2), ("demo-2026-01-03-aa", 0.3)):
        put(ctx, "metrics", [base | {"run_id": run_id, "value": value}], {"run_id": run_id})
    assert shown(ctx, 80).count("0.3000") == 1
    put(ctx, "metrics", [base | {"run_id": "demo-2026-01-02-ee", "value": 0.4}], {"run_id": "demo-2026-01-02-ee"})
    assert shown(ctx, 80).count("0.4000") == 1


def shown(ctx: Context, width: int) -> str:
    """The results as a terminal shows them."""
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(evaluation.results_table(ctx))
    return console.export_text()


def test_intervals_draw_users(ctx):
    """Ten equal requests of each of eight users say no more than one."""
    rows = [
        {"request_id": f"r{n}", "user_id": f"u{n % 8}", "candidate_ids": ["a", "b"], "grades": [n % 2, 1 - n % 2], "slice": "all",
         "source": "log"}
        for n in range(80)
    ]  # fmt: skip
    widths = []
    for own in (rows, [row | {"user_id": row["request_id"]} for row in rows]):
        requests = evaluation.Requests(own)
        found = next(evaluation.figures(ctx.cfg, requests, {("prerank", "order"): requests.incoming}))
        assert (found["value"], found["n"]) == (0.5, 80)
        widths.append(found["high"] - found["low"])
    assert widths[0] > 2 * widths[1]


def check_results_table(ctx: Context, cells: dict) -> None:
    """It names what it should, with the figures of the table, in 80 columns."""
    text = shown(ctx, 80)
    assert all(word in text for word in ("later_day", "rl (think)", "lambdamart", "R@10"))
    assert f"{cells['rl', 'conditional', 'all', 'recall@1', '']['value']:.4f}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_hit_that_was_not_scored_fails_and_a_stale_order_is_refused():
    def request(name: str, grades: list[int]) -> dict:
        return {"request_id": name, "candidate_ids": ["a", "b"], "grades": grades, "slice": "all"}

    def row(name: str, replica: int = 0) -> dict:
        return {"request_id": name, "model": "m", "mode": "think", "replica": replica}

    requests = evaluation.Requests([request("r1", [0, 1]), request("r2", [1, 0]), request("r3", [0, 0]), request("r4", [0, 0])])
    (partial,) = evaluation.check_coverage(requests, [row("r1"), row("r3"), row("r2", replica=1)])
    assert (partial["value"], partial["passed"]) == (1.0, False)
    (whole,) = evaluation.check_coverage(requests, [row("r1"), row("r2"), row("r3")])
    assert whole["passed"]
    assert "of 2 without it 1 were" in whole["detail"]
    assert requests.graded({"r1": ["b", "a"], "r2": None}).tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]
    for stale in (["a"], ["a", "a"], ["a", "c"]):
        with pytest.raises(AuditError, match="no permutation"):
            requests.graded({"r1": stale})
