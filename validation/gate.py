"""Are new models better than those that are out? Both systems, each with its own lists, on the validation requests that both were asked.

A request is the same if its user, place and target are (`request_id`, `target_id`). A target that a system's list misses counts as 0:
the whole system is judged, lists and order. So that hits and misses are of one population, only the seeded sample counts that the models
were asked for (`sample`), and how much it tells is counted by answers. Versions are those that judge the promoted release (`judged`).
"""

import math
from collections.abc import Iterable
from itertools import takewhile
from typing import Any, NamedTuple

from gr2.config import Config
from gr2.context import Context
from gr2.draws import by_hash
from gr2.metrics import bootstrap_mean, values
from schemas.candidates import EXPERIMENT
from schemas.lake import Lake
from validation.findings import Finding, finding


class Place(NamedTuple):
    """Where a system put a request's target."""

    rank: float  # from 1; infinite where it is in no list or no answer
    answered: bool  # whether it was in the list, and the model gave an order
    user: str


Places = dict[tuple[str, str], Place]  # (request, target) -> place
JUDGED = ("candidates", "rerank_scores")


def judged(pins: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Versions of lists and answers that tell how good a release's models are: as the build left them that trained these.

    A night publishes the same tables, and a later version may hold lists of a build that was never promoted.
    """
    return {table: version for table, version in {**pins.get("tables", {}), **pins.get("judged", {})}.items() if table in JUDGED}


def sample(ids: Iterable[str], cfg: Config) -> list[str]:
    """The validation requests that `rerank_scores` asks for this: those of the smallest seeded hashes, in that order."""
    return by_hash(ids, cfg.seed, "gate")[: cfg.release.requests]


def compare(cfg: Config, ctx: Context) -> Finding | None:
    """The gain in release.metric of the new system over the promoted one, at least release.min_gain; None where nothing is to compare with.

    Judged is what answers at night: the first model and mode of scoring.live. A release that lacks that model does not pass.
    """
    model, modes = next(iter(cfg.scoring.live.items()))
    promoted = ctx.promoted
    old, new = promoted.get("models", {}).get(model), ctx.pins.get("models", {}).get(model)
    if not cfg.release.gate or not promoted or (old and old == new):
        return None
    if not (old and new):
        lacks = f"the {'new' if old else 'promoted'} release has no model {model!r}, the first of scoring.live"
        return finding("gate", f"{model}/{modes[0]}", None, low=cfg.release.min_gain, detail=f"{lacks}; release.gate=false promotes")
    mode, names = modes[0], (f"{model}@{old}", f"{model}@{new}")
    was, became = (
        target_places(cfg, lake, name, mode) for lake, name in zip((Lake(ctx.place, judged(promoted)), ctx.lake), names, strict=True)
    )
    common = sorted(was.keys() & became.keys())
    subject = f"{model}/{mode} {cfg.release.metric} on {len(common)} validation requests"
    if refusal := _too_few(cfg, names, was, became):
        return finding("gate", subject, None, low=cfg.release.min_gain, detail=f"{refusal}; release.gate=false promotes")
    before, after = (values(cfg.release.metric, [side[key].rank for key in common]) for side in (was, became))
    users = [became[key].user for key in common]
    gain, low, high = bootstrap_mean(after - before, cfg.evaluation.bootstrap, cfg.seed, users_B=users)
    detail = f"{names[1]} less {names[0]}, paired 95 % interval [{low:+.4f}, {high:+.4f}]; {before.mean():.4f} before"
    return finding("gate", subject, gain, low=cfg.release.min_gain, detail=detail)


def _too_few(cfg: Config, names: tuple[str, str], was: Places, became: Places) -> str:
    """Why nothing can be concluded, or nothing: a miss of both sides is no answer, and says nothing of the models."""
    for name, side in zip(names, (was, became), strict=True):
        if not any(place.answered for place in side.values()):
            return f"{name} answered none of the {cfg.release.requests} validation requests that are asked: nothing to compare"
    both = sum(place.answered and key in became and became[key].answered for key, place in was.items())
    if both < cfg.release.min_requests:
        return f"{names[0]} and {names[1]} both answered {both} of the same requests, of {cfg.release.min_requests}: too few to tell"
    return ""


def target_places(cfg: Config, lake: Lake, model_id: str, mode: str) -> Places:
    """Of each request of the sample the target's place in the order that the model gave.

    The sample ends at the first request that has its target in the list and was not asked: an older release may have drawn another.
    """
    columns = ["request_id", "user_id", "target_id", "target_rank"]
    lists = {r["request_id"]: r for r in lake.read("candidates", columns, split="valid", night=EXPERIMENT).to_pylist()}
    scores = lake.read("rerank_scores", ["request_id", "new_order"], ["request_id"], model_id=model_id, mode=mode, split="valid", replica=0)
    orders: dict[str, Any] = dict(zip(scores["request_id"].to_pylist(), scores["new_order"].to_pylist(), strict=True))
    asked = takewhile(lambda r: lists[r]["target_rank"] is None or r in orders, sample(lists, cfg))
    found: Places = {}
    for row in (lists[request] for request in asked):
        target, order = row["target_id"], orders.get(row["request_id"]) or []
        if target is not None:
            there = row["target_rank"] is not None and target in order
            found[row["request_id"], target] = Place(float(order.index(target) + 1) if there else math.inf, there, row["user_id"])
    return found
