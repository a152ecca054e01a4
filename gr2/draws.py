"""Draws that are equal for equal names in every process: seeds, and samples that hardly change when there is more to draw from."""

import hashlib
from collections.abc import Iterable
from typing import Any


def seed_of(*parts: Any) -> int:
    """A seed from 0 to 2^31 - 1 (what every engine takes), equal for equal parts in every process."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:4]) >> 1


def share_of(*parts: Any) -> float:
    """A number in [0, 1), equal for equal parts in every process."""
    return seed_of(*parts) / 2**31


def by_hash(ids: Iterable[str], seed: int, purpose: str) -> list[str]:
    """The ids in the order of their seeded hashes: any first part of it is a sample."""
    return sorted(ids, key=lambda i: (seed_of(purpose, seed, i), i))
