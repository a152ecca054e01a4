"""Health of semantic IDs: are the learned codes unique, used and evenly used?

Learned codes are judged before any separation step: afterwards every tokenizer looks perfect. Pure NumPy.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gr2.errors import AuditError
from validation.findings import finding

Ints = NDArray[np.integer]


def uniqueness(codes_NL: Ints) -> tuple[float, float]:
    """Distinct codes / items, and the share of items alone in their code (the smaller of the two)."""
    counts = np.unique(codes_NL, axis=0, return_counts=True)[1]
    return len(counts) / len(codes_NL), float((counts == 1).sum() / len(codes_NL))


def level_use(codes_N: Ints, codes: int) -> tuple[float, float, float]:
    """Of one level: share of `codes` in use, entropy (bits), perplexity (2 to the entropy: codes evenly used would be as many)."""
    share = np.bincount(codes_N, minlength=codes) / len(codes_N)
    used = share[share > 0]
    entropy = float(-(used * np.log2(used)).sum())
    return float((share > 0).mean()), entropy, 2**entropy


def figures(learned_NL: Ints, codes_NL: Ints, residual_N: NDArray[np.floating], codes: int) -> dict[str, float]:
    """All figures by name. `codes`: codes in use at a level. Raises ValueError for no items."""
    if not len(learned_NL):
        raise ValueError("no items, no health")
    distinct, alone = uniqueness(learned_NL)
    distinct_after, alone_after = uniqueness(codes_NL)
    found = {
        "learned distinct/items": distinct,
        "learned share alone": alone,
        "published distinct/items": distinct_after,
        "published share alone": alone_after,
        "separated share": float((learned_NL != codes_NL).any(axis=1).mean()),
        "mean residual": float(residual_N.mean()),
    }
    for level in range(learned_NL.shape[1]):
        use, entropy, perplexity = level_use(learned_NL[:, level], codes)
        found |= {f"level {level} use": use, f"level {level} entropy": entropy, f"level {level} perplexity": perplexity}
    return found


def agreement(learned_NL: Ints, pairs_P2: Ints) -> dict[str, float]:
    """What the codes say of behaviour: how often items of a pair share a prefix of codes, over how often two items by chance do.

    Uniqueness alone is no quality: codes drawn at random are unique too, and have 1 here.
    """
    found: dict[str, float] = {}
    for depth in range(1, learned_NL.shape[1]) if len(pairs_P2) else ():
        group_N = np.unique(learned_NL[:, :depth], axis=0, return_inverse=True)[1].reshape(-1)
        chance = float(((np.bincount(group_N) / len(group_N)) ** 2).sum())
        share = float((group_N[pairs_P2[:, 0]] == group_N[pairs_P2[:, 1]]).mean())
        found[f"pairs sharing {depth} code{'s' if depth > 1 else ''} lift"] = share / chance
    return found


def audits(found: dict[str, float], min_uniqueness: float) -> list[dict[str, Any]]:
    """The figures as rows for the table `audits` (without run and stage)."""
    low = {"learned distinct/items": min_uniqueness, "published distinct/items": 1.0, "published share alone": 1.0}
    rows = []
    for subject, value in found.items():
        gated = subject.startswith("learned distinct")
        detail = "gate: tokenizer.min_uniqueness, of vectors that differ" if gated else _MEANING.get(subject.split()[-1], "")
        rows.append(finding("sid_health", subject, value, low=low.get(subject), detail=detail))
    return rows


def gate(rows: list[dict[str, Any]], builder: str) -> None:
    """Raises AuditError that names every figure that failed, and what to try."""
    failed = [f"{r['subject']} is {r['value']:.4f}, at least {r['low']:.4f} is asked" for r in rows if not r["passed"]]
    if failed:
        hint = "a smaller tokenizer.dim, more tokenizer.codes or tokenizer.levels, a larger embeddings.collaborative_weight"
        if builder == "rqvae":
            hint += ", more tokenizer.steps, tokenizer.reset_after=20"
        raise AuditError(f"semantic IDs: {'; '.join(failed)}. Nothing was published. Try {hint}, or lower tokenizer.min_uniqueness")


_MEANING = {
    "alone": "share of items whose code no other item has",
    "distinct/items": "after separation: a bijection",
    "share": "share of items whose learned codes were changed to be unique",
    "residual": "squared error of the decoded vector over the vector's squared norm",
    "lift": "items bought together share the first codes so many times as often as by chance (pairs of fit train)",
    "use": "share of the codes in use that occur",
    "entropy": "bits",
    "perplexity": "codes evenly used would be as many",
}
