"""Stage `drift`, of a night: do the day's events, items and answers look like those before? (`validation/drift.py`)

Reads   `events`, `interactions`, `item_stats`, `items`, `semantic_ids`, `candidates`, `rerank_scores`.
Writes  the night's partition of `audits` (one check of one run; run_id, stage, audit, subject).
Rerun   the partition is replaced; equal tables give equal figures.
Run     gr2 stage drift --profile demo --date 2026-01-28

Beyond drift.retrain_at the log says that retraining is called for (the DAG `nightly` then updates the asset that starts `retrain`); beyond
drift.fail_at the stage fails, after its figures are published.
"""

from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import AuditError, InputError
from spark_jobs.publish import publish_rows
from spark_jobs.rerank_scores import modes_of, scored_models
from validation import drift

RETRAIN = "retraining is called for"


def run(cfg: Config, ctx: Context) -> Result:
    """Measures and publishes. Raises InputError without --date, AuditError beyond drift.fail_at."""
    if ctx.date is None:
        raise InputError("drift is of a night: say which, --date YYYY-MM-DD")
    live = [f"{model.id}/{mode}" for model in scored_models(cfg, ctx) for mode in modes_of(cfg, ctx)[model.name]]
    tokenizer = ctx.model("tokenizer").id
    found = drift.audit(ctx, ctx.date, cfg.drift.reference_days, cfg.drift.fail_at, tokenizer, live)
    rows = [{"run_id": ctx.run_id, "stage": "drift", **row} for row in found]
    publish_rows(ctx, "audits", rows, {"run_id": ctx.run_id})
    moved = [row for row in found if row["value"] is not None and row["value"] > cfg.drift.retrain_at]
    told = "; ".join(f"{row['subject']}: {row['value']:.3f}" for row in moved)
    if not all(row["passed"] for row in found):
        raise AuditError(f"drift beyond drift.fail_at = {cfg.drift.fail_at}: {told}; all figures are in table audits, run {ctx.run_id}")
    ctx.log(f"drift: {RETRAIN}: {told}" if moved else f"drift: {len(found)} subjects measured, none beyond {cfg.drift.retrain_at}")
    return Result(rows_in=len(found), rows_out=len(rows), detail={"retrain": bool(moved), **{r["subject"]: r["value"] for r in found}})
