"""Are new models better than those that are out? Both systems, each with its own lists, on the validation requests that both answered.

A request is the same if its user, place and target are (`request_id`, `target_id`). A target that a system's list misses counts as 0:
the whole system is judged, lists and order. Versions are those that the promoted release pins, read as they were.
"""

import math
from typing import Any

from gr2.config import Config
from gr2.context import Context
from gr2.metrics import paired_bootstrap, values
from schemas.candidates import EXPERIMENT
from schemas.lake import Lake
from validation.findings import Finding, finding


def compare(cfg: Config, ctx: Context) -> Finding | None:
    """The gain in release.metric of the new system over the promoted one, at least release.min_gain; None where nothing is to compare with.

    Judged is what answers at night: the first model and mode of scoring.live.
    """
    model, modes = next(iter(cfg.scoring.live.items()))
    old, new = ctx.promoted.get("models", {}).get(model), ctx.pins.get("models", {}).get(model)
    if not cfg.release.gate or old is None or new is None or old == new:
        return None
    mode = modes[0]
    was, became = (
        target_ranks(lake, f"{model}@{digest}", mode) for lake, digest in ((Lake(ctx.place, ctx.promoted["tables"]), old), (ctx.lake, new))
    )
    common = sorted(was.keys() & became.keys())
    subject = f"{model}/{mode} {cfg.release.metric} on {len(common)} validation requests"
    if len(common) < cfg.release.min_requests:
        detail = (
            f"{model}@{old} and {model}@{new} answered {len(common)} of the same requests: too few to tell; release.gate=false promotes"
        )
        return finding("gate", subject, None, low=cfg.release.min_gain, detail=detail)
    before, after = (values(cfg.release.metric, [side[key] for key in common]) for side in (was, became))
    gain, low, high = paired_bootstrap(after, before, cfg.evaluation.bootstrap, cfg.seed)
    detail = f"{model}@{new} less {model}@{old}, paired 95 % interval [{low:+.4f}, {high:+.4f}]; {before.mean():.4f} before"
    return finding("gate", subject, gain, low=cfg.release.min_gain, detail=detail)


def target_ranks(lake: Lake, model_id: str, mode: str) -> dict[tuple[str, str], float]:
    """(request, target) -> the target's place in the order that the model gave, from 1; infinite where it is in no list or no answer."""
    columns = ["request_id", "target_id", "target_rank"]
    lists = lake.read("candidates", columns, ["request_id"], split="valid", night=EXPERIMENT).to_pylist()
    scores = lake.read("rerank_scores", ["request_id", "new_order"], ["request_id"], model_id=model_id, mode=mode, split="valid", replica=0)
    orders: dict[str, Any] = dict(zip(scores["request_id"].to_pylist(), scores["new_order"].to_pylist(), strict=True))
    found = {}
    for row in lists:
        key, target = (row["request_id"], row["target_id"]), row["target_id"]
        if target is None:
            continue
        if row["target_rank"] is None:
            found[key] = math.inf
        elif row["request_id"] in orders:
            order = orders[row["request_id"]]
            found[key] = float(order.index(target) + 1) if order else math.inf
    return found
