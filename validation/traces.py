"""What trace samples say about their teacher: acceptance, chance, cost, leaks, and whether told and untold samples can be told apart."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from validation.findings import Finding, finding

AUDIT = "traces"
ENOUGH = 40  # samples of each mode below which no classifier is tried
MOST = 1500  # samples of each mode that it reads
Row = Mapping[str, Any]


def findings(rows: Sequence[Row], sizes: Mapping[str, int], accept_rank: int) -> list[Finding]:
    """Figures of one teacher's samples, in order of sample_id. `sizes`: candidates of each request. None of them gates."""
    found: list[Finding] = []
    for mode in sorted({r["mode"] for r in rows}):
        own = [r for r in rows if r["mode"] == mode]
        found += _acceptance(mode, own, sizes, accept_rank) + _cost(mode, own) + _refusals(mode, own)
    auc = told_apart(rows)
    detail = (
        "AUC of a classifier of words, folds by request: 0.5 is chance" if auc is not None else f"fewer than {ENOUGH} accepted of a mode"
    )
    return [*found, finding(AUDIT, "told and untold samples told apart", auc, detail=detail)]


def _acceptance(mode: str, rows: Sequence[Row], sizes: Mapping[str, int], accept_rank: int) -> list[Finding]:
    """By request: ever accepted; at the first attempt, beside the incoming order; by incoming rank (the selection bias); and by chance."""
    attempts: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: (r["request_id"], r["attempt"])):
        if row["incoming_rank"] is not None and row["verdict"] != "failed":
            attempts[row["request_id"]].append(row)
    ever = {request: any(r["verdict"] == "accepted" for r in drawn) for request, drawn in attempts.items()}
    first = [drawn[0]["verdict"] == "accepted" for drawn in attempts.values()]
    incoming = [drawn[0]["incoming_rank"] <= accept_rank for drawn in attempts.values()]
    chance = [1 - (1 - min(1.0, accept_rank / sizes[request])) ** len(drawn) for request, drawn in attempts.items() if request in sizes]
    found = [
        finding(AUDIT, f"{mode}: requests accepted", _mean(ever.values()), detail=f"of {len(ever)} with the target in the list"),
        finding(
            AUDIT, f"{mode}: accepted at the first attempt", _mean(first), detail=f"the incoming order would be in {_mean(incoming):.3f}"
        ),
        finding(AUDIT, f"{mode}: accepted by chance", _mean(chance), detail="a teacher that ranks at random, with as many attempts"),
    ]
    by_rank: dict[int, list[bool]] = defaultdict(list)
    for request, drawn in attempts.items():
        by_rank[drawn[0]["incoming_rank"]].append(ever[request])
    return found + [
        finding(AUDIT, f"{mode}: accepted, incoming rank {rank:02d}", _mean(by_rank[rank]), detail=f"of {len(by_rank[rank])} requests")
        for rank in sorted(by_rank)
    ]


def _cost(mode: str, rows: Sequence[Row]) -> list[Finding]:
    accepted = sum(r["verdict"] == "accepted" for r in rows)
    spent = [r for r in rows if r["verdict"] != "no_target"]
    totals = {
        "samples": float(len(spent)),
        "tokens": float(sum(r["prompt_tokens"] + r["completion_tokens"] for r in spent)),
        "seconds": float(sum(r["seconds"] for r in spent)),
        "price": float(sum(r["cost"] for r in spent)),
    }
    detail = f"{accepted} accepted of {len(spent)} samples with a target"
    return [
        finding(AUDIT, f"{mode}: {what} per accepted", total / accepted if accepted else None, detail=detail)
        for what, total in totals.items()
    ]


def _refusals(mode: str, rows: Sequence[Row]) -> list[Finding]:
    kinds = {"leaks": "leak:", "rank too low": "rank_"}
    refused = [r["reason"] for r in rows if r["verdict"] == "refused"]
    shares = {name: sum(reason.startswith(start) for reason in refused) / len(rows) for name, start in kinds.items()}
    shares["unreadable"] = sum(not reason.startswith(tuple(kinds.values())) for reason in refused) / len(rows)
    shares["engine failures"] = sum(r["verdict"] == "failed" for r in rows) / len(rows)
    return [finding(AUDIT, f"{mode}: {name}", share, detail=f"of {len(rows)} samples") for name, share in shares.items()]


def told_apart(rows: Sequence[Row]) -> float | None:
    """AUC with which a linear classifier of words tells targeted from rejection thoughts, both accepted; None for too few of either.

    Far above 0.5, the targeted mode leaves marks that a student could learn without being able to know what they stand for.
    """
    samples = []
    for mode in ("rejection", "targeted"):
        own = [r for r in rows if r["mode"] == mode and r["verdict"] == "accepted"]
        if len(own) < ENOUGH:
            return None
        samples += own[:MOST]
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    groups = [r["request_id"] for r in samples]
    if len(set(groups)) < ENOUGH:
        return None
    told = [r["mode"] == "targeted" for r in samples]
    words = CountVectorizer(token_pattern=r"[A-Za-z]{2,}", ngram_range=(1, 2), binary=True, min_df=2)
    model = make_pipeline(words, LogisticRegression(C=0.3, max_iter=500))
    scores = cross_val_predict(model, [r["text"] for r in samples], told, groups=groups, cv=GroupKFold(5), method="decision_function")
    return float(roc_auc_score(told, scores))


def _mean(values: Any) -> float:
    kept = [float(v) for v in values]
    return sum(kept) / len(kept) if kept else float("nan")
