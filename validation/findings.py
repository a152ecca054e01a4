"""One finding of an audit: the form in which every check tells what it saw. Findings become rows of `audits`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Finding = dict[str, Any]


def mean(values: Sequence[float]) -> float | None:
    """Their mean; nothing of nothing."""
    return float(np.mean(values)) if values else None


def finding(
    audit: str, subject: str, value: float | None, low: float | None = None, high: float | None = None, detail: str = ""
) -> Finding:
    """A checked figure: it passes inside [low, high] (None: unbounded). A bounded figure that could not be measured does not pass."""
    measured = value is not None and not math.isnan(value)
    bounded = low is not None or high is not None
    passed = (low is None or value >= low) and (high is None or value <= high) if measured and value is not None else not bounded
    return {
        "audit": audit,
        "subject": subject,
        "value": float(value) if measured and value is not None else None,
        "low": low,
        "high": high,
        "passed": bool(passed),
        "detail": detail or ("" if measured else "nothing to measure"),
    }
