"""The report of a build that is under way: what is there is shown, what is not is left out."""

import datetime as dt

import pytest

import schemas
from gr2.errors import MissingInputError
from spark_jobs import report
from tests.tables import put

pytestmark = pytest.mark.unit


def test_parts_whose_tables_are_not_built_are_left_out(ctx):
    with pytest.raises(MissingInputError, match="gr2 run"):
        report.run(ctx.cfg, ctx)
    row = dict.fromkeys(schemas.get("candidates").names()) | {"request_id": "test:u:1", "split": "test", "user_id": "u", "source": "beam"}
    row |= {"model_id": "m", "fit": "refit", "as_of": dt.date(2026, 1, 1), "history_ids": ["x"], "history_days": [1], "slice": "later_day"}
    row |= {"candidate_ids": ["a"], "prior_scores": [0.0], "grades": [1], "night": "none", "target_id": "a", "target_rank": 1}
    put(ctx, "candidates", [row])
    report.run(ctx.cfg, ctx)
    page = (ctx.root / "reports" / "index.html").read_text()
    assert page.count("<svg") == 1, "where targets stand when they come in"
    assert "Recall and NDCG" in page
