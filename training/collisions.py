"""Separates items that learned the same codes, so that codes name items one to one (METHOD 2).

    nearest_free        the item that its code fits best keeps it; each other one takes the free last-level code with the least
                        added error; where a prefix has no free code left, the free pair of the last two levels, and so on
    random              the same, with a seeded draw among the free codes (GR2, arXiv 2602.07774)
    random_last_levels  the last M levels are a seeded draw for every item (GR2's own device, kept for the ablation)

Codes that are already given out (`taken`) are never touched, and never given out again.

Shapes: N items, L levels, K codes a level, D width of the quantised space, S free suffixes.
"""

from collections.abc import Iterator

import numpy as np

from gr2.config import Tokenizer
from gr2.errors import ModelError
from training.codebooks import Floats, Ints, distances

MAX_SUFFIXES, BLOCK = 1 << 20, 64  # of the last levels, and points, that are looked through at once: they bound memory


def separate(learned_NL: Ints, z_ND: Floats, books_LKD: Floats, settings: Tokenizer, seed: int, taken_ML: Ints | None = None) -> Ints:
    """Codes (N, L) that are distinct among themselves and from `taken_ML`. Rows that need no change keep their learned codes.

    Deterministic for equal arguments. Raises ModelError where no free code is left: a new tokenizer version is due.
    """
    taken_ML = np.empty((0, learned_NL.shape[1]), dtype=np.int64) if taken_ML is None else np.asarray(taken_ML, dtype=np.int64)
    rng = np.random.default_rng(seed)
    codes_NL = learned_NL.copy()
    if settings.collisions == "random_last_levels":
        levels = min(settings.random_levels, codes_NL.shape[1])
        left = _place(codes_NL, np.arange(len(codes_NL)), taken_ML, levels, z_ND, books_LKD, rng)
        if len(left):
            raise ModelError(f"{len(left)} items find no free code in the last {levels} levels: raise tokenizer.random_levels")
        return codes_NL
    movers = _movers(learned_NL, z_ND, books_LKD, taken_ML)
    for levels in range(1, codes_NL.shape[1] + 1):
        if not len(movers):
            break
        placed = np.setdiff1d(np.arange(len(codes_NL)), movers)
        used_ML = np.concatenate([taken_ML, codes_NL[placed]])
        movers = _place(codes_NL, movers, used_ML, levels, z_ND, books_LKD, None if settings.collisions == "nearest_free" else rng)
    if len(movers):
        raise ModelError(f"{len(movers)} items find no free code: fit a new tokenizer with more tokenizer.codes or tokenizer.levels")
    return codes_NL


def groups(codes_NL: Ints) -> Ints:
    """(N,) a number for each row, equal for equal rows. Zero columns: all rows are one group."""
    if codes_NL.shape[1] == 0:
        return np.zeros(len(codes_NL), dtype=np.int64)
    return np.unique(codes_NL, axis=0, return_inverse=True)[1].reshape(-1)


def _movers(learned_NL: Ints, z_ND: Floats, books_LKD: Floats, taken_ML: Ints) -> Ints:
    """Rows that must move: all of a group but the one that its code fits best; that one too where the code is taken."""
    both = groups(np.concatenate([learned_NL, taken_ML]))
    group_N, taken_groups = both[: len(learned_NL)], both[len(learned_NL) :]
    error_N = ((z_ND - books_LKD[np.arange(len(books_LKD)), learned_NL].sum(axis=1)) ** 2).sum(axis=1)
    order = np.lexsort((np.arange(len(group_N)), error_N, group_N))
    first_N = np.ones(len(order), dtype=bool)
    first_N[1:] = np.diff(group_N[order]) != 0
    keeps = order[first_N]
    keeps = keeps[~np.isin(group_N[keeps], taken_groups)]
    return np.setdiff1d(np.arange(len(group_N)), keeps)


def _place(
    codes_NL: Ints, movers: Ints, used_ML: Ints, levels: int, z_ND: Floats, books_LKD: Floats, rng: np.random.Generator | None
) -> Ints:
    """Gives movers free codes in their last `levels` levels, in place; returns those for whom their prefix has none left.

    With a generator the code is drawn; without, it is the one with the least added error, movers taking their pick by row.
    """
    codes, keep = books_LKD.shape[1], codes_NL.shape[1] - levels
    if codes**levels > MAX_SUFFIXES:
        raise ModelError(f"the last {levels} levels have too many codes to look through: fit a new tokenizer with more codes or levels")
    sums_SD = suffix_sums(books_LKD[keep:] if rng is None else books_LKD[:1, :0])  # a draw needs no distances
    left = []
    for rows, used in _by_prefix(codes_NL[movers, :keep], used_ML, keep, codes):
        free_S = np.setdiff1d(np.arange(codes**levels), used)
        members = movers[rows]
        members, late = members[: len(free_S)], members[len(free_S) :]
        left.append(late)
        if rng is not None:
            chosen = rng.choice(free_S, size=len(members), replace=False)
        else:
            rest_ND = z_ND[members] - books_LKD[np.arange(keep), codes_NL[members, :keep]].sum(axis=1)
            chosen = free_S[_nearest_distinct(rest_ND, sums_SD[free_S])]
        codes_NL[members, keep:] = np.stack(np.unravel_index(chosen, (codes,) * levels), axis=1)
    return np.sort(np.concatenate(left)) if left else movers[:0]


def suffix_sums(books_LKD: Floats) -> Floats:
    """(S, D) sum of the codes' vectors for every combination of codes of the given levels, in order of codes."""
    sums_SD = books_LKD[0]
    for book_KD in books_LKD[1:]:
        sums_SD = (sums_SD[:, None] + book_KD[None]).reshape(-1, book_KD.shape[1])
    return sums_SD


def _by_prefix(prefix_NK: Ints, used_ML: Ints, keep: int, codes: int) -> Iterator[tuple[Ints, Ints]]:
    """For each prefix among the movers: their rows, and the suffixes that are used under it."""
    both = groups(np.concatenate([prefix_NK, used_ML[:, :keep]]))
    group_N, group_M = both[: len(prefix_NK)], both[len(prefix_NK) :]
    suffix_M = np.ravel_multi_index(tuple(used_ML[:, keep:].T), (codes,) * (used_ML.shape[1] - keep)) if len(used_ML) else group_M
    order_N, order_M = np.argsort(group_N, kind="stable"), np.argsort(group_M, kind="stable")
    for group in np.unique(group_N):
        rows = order_N[slice(*np.searchsorted(group_N[order_N], [group, group + 1]))]
        used = order_M[slice(*np.searchsorted(group_M[order_M], [group, group + 1]))]
        yield rows, suffix_M[used]


def _nearest_distinct(points_ND: Floats, sums_SD: Floats) -> Ints:
    """(N,) a suffix for each point, each suffix at most once: points pick in order, each the nearest that is left."""
    chosen, taken_S = np.empty(len(points_ND), dtype=np.int64), np.zeros(len(sums_SD), dtype=bool)
    for start in range(0, len(points_ND), BLOCK):
        costs_NS = distances(points_ND[start : start + BLOCK], sums_SD)
        for row, costs_S in enumerate(costs_NS, start):
            chosen[row] = np.where(taken_S, np.inf, costs_S).argmin()
            taken_S[chosen[row]] = True
    return chosen
