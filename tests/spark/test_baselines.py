"""Each baseline is the order it says it is; LambdaMART learns what is learnable and reruns equal."""

import numpy as np
import pytest
from rerank_world import learnable

import schemas
from gr2.errors import InputError
from schemas.program_lists import TAUGHT
from scoring import boosted as trees
from scoring.boosted import Boosted
from scoring.evidence_engine import fold_of
from spark_jobs import baselines
from spark_jobs.program import LESSONS, boosted, padded
from tests.tables import put

pytestmark = pytest.mark.spark


def test_baselines_are_the_orders_that_they_say(ctx):
    requests = learnable(ctx)
    result = baselines.run(ctx.cfg, ctx)
    rows = ctx.lake.read("baselines").to_pylist()
    assert result.rows_out == len(rows) == 80 * 6
    features = {(f["request_id"], f["item_id"]): f for f in ctx.lake.read("candidate_features").to_pylist()}
    first = {}
    for row in rows:
        request = requests[row["request_id"]]
        assert sorted(row["new_order"]) == sorted(request["candidate_ids"]), "every baseline is a permutation"
        own = [features[row["request_id"], i] for i in row["new_order"]]
        first.setdefault(row["model"], []).append(own[0]["grade"])
        if row["model"] == "prerank":
            assert row["new_order"] == request["candidate_ids"]
        if row["model"] == "popularity":
            assert [f["popularity"] for f in own] == sorted((f["popularity"] for f in own), reverse=True)
        if row["model"] == "transition":
            keys = [(f["pair_next"], f["popularity"], -f["incoming_rank"]) for f in own]
            assert keys == sorted(keys, reverse=True)
        if row["model"] == "oracle":
            assert own[0]["grade"] == int(request["target_rank"] is not None)
    orders = {(r["model"], tuple(r["new_order"])) for r in rows}
    assert sum(m == "random" and list(o) != sorted(o) for m, o in orders) > 70
    hits = {model: np.mean(grades) for model, grades in first.items()}
    assert hits["lambdamart"] > hits["prerank"] + 0.2, hits
    assert hits["oracle"] >= hits["lambdamart"]
    assert result.detail["gain"]["pair_last"] == max(result.detail["gain"].values())
    teaching = [r for r in requests.values() if r["split"] != "test" and r["target_rank"]]
    assert result.detail["requests"] == len(teaching), "what was picked on valid is trained on both"

    version = ctx.lake.version("baselines")
    baselines.run(ctx.cfg, ctx)
    assert ctx.lake.version("baselines") == version, "a rerun changes nothing"


def test_no_label_is_a_feature():
    columns = set(schemas.get("candidate_features").names())
    assert set(baselines.FEATURES) == columns - {"request_id", "split", "night", "item_id", "pair_item", "grade", "grade_weight"}


def test_lambdamart_without_a_positive_is_refused(ctx):
    learnable(ctx, hit=0.0)
    with pytest.raises(InputError, match=r"evaluation\.baselines"):
        baselines.run(ctx.cfg, ctx)


def test_the_program_is_a_baseline_where_it_is_asked_for(make_ctx, monkeypatch):
    monkeypatch.setattr("scoring.boosted.BAGS", 1)
    ctx = make_ctx(["evaluation.baselines=[program,random]"])
    requests = learnable(ctx)
    by_all, judged = [], Boosted.judged
    monkeypatch.setattr(Boosted, "judged", lambda self, *lists: by_all.append(lists[2] is None) or judged(self, *lists))
    result = baselines.run(ctx.cfg, ctx)
    assert by_all == [False, True], "lists of valid have taught all judges but one, those of test none"
    first = {m: [] for m in ("program", "random")}
    for row in ctx.lake.read("baselines").to_pylist():
        if row["model"] in first:
            first[row["model"]].append(row["new_order"][0] == requests[row["request_id"]]["target_id"])
    assert np.mean(first["program"]) > np.mean(first["random"]) + 0.2
    assert result.detail["program"].startswith("evidence:5+trees:3@")


def test_no_list_of_a_user_teaches_what_judges_that_user(ctx, monkeypatch):
    monkeypatch.setattr("scoring.boosted.BAGS", 1)
    learnable(ctx)
    of = padded(ctx, TAUGHT, LESSONS)
    before, name = boosted(ctx)
    rows = ctx.lake.read(LESSONS, order_by=["request_id", "incoming_rank"]).to_pylist()
    request = next(r["request_id"] for r in rows if r["split"] == "valid")
    for row in rows:
        if row["request_id"] == request:  # its target is another one
            row["grade"] = int(row["incoming_rank"] == (2 if row["grade"] and row["incoming_rank"] == 1 else 1))
    user = request.split(":")[1]
    put(ctx, LESSONS, rows)
    after, other = boosted(ctx)
    assert other != name, "lists of valid teach"
    own = of.folds_R == fold_of(user)
    told, again = (judge.judged(of.raw_RNC, of.there_RN, of.folds_R) for judge in (before, after))
    np.testing.assert_array_equal(told[own], again[own])
    assert not np.array_equal(told[~own], again[~own])


def test_two_stages_ask_for_one_fit_and_another_seed_or_code_for_another(make_ctx, monkeypatch):
    monkeypatch.setattr("scoring.boosted.BAGS", 1)
    fits, boost = [], trees.boost
    monkeypatch.setattr("scoring.boosted.boost", lambda *told: fits.append(1) or boost(*told))
    learnable(ctx := make_ctx())
    of = padded(ctx, ("test",))
    (judge, name), (again, other) = boosted(ctx), boosted(ctx)
    assert (len(fits), other) == (1, name)
    np.testing.assert_array_equal(again.judged(of.raw_RNC, of.there_RN), judge.judged(of.raw_RNC, of.there_RN))
    boosted(make_ctx(["seed=14"]))
    monkeypatch.setattr("spark_jobs.program.code_hash", lambda *modules: "of other code")
    boosted(ctx)
    assert len(fits) == 3


def test_a_list_counts_what_its_clicks_slots_took_from_them(ctx):
    learnable(ctx)
    rows = ctx.lake.read(LESSONS).to_pylist()
    debiased = rows[0]["request_id"]
    put(ctx, LESSONS, [row | ({"grade_weight": 2.5} if row["request_id"] == debiased else {}) for row in rows])
    counted = baselines.counted(ctx, rows[0]["split"], LESSONS)
    for request, count in zip(counted["request_id"].to_pylist(), counted["count"].to_pylist(), strict=True):
        assert count == (2.5 if request == debiased else 1.0)
    assert sorted(set(baselines.dataset([counted]).get_weight())) == [1.0, 2.5]
