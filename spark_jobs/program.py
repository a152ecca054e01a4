"""The evidence program with trees (`scoring.boosted`), fitted on `program_lists`: the teacher of traces and of `distill`.

judge, name = boosted(ctx)
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gr2.artifacts import write_whole
from gr2.context import Context
from gr2.errors import EngineError, MissingInputError
from gr2.pipeline import code_hash
from schemas.program_lists import TAUGHT
from scoring import boosted as trees
from scoring.evidence_engine import NAME, Floats, columns_of, fit, fold_of

LESSONS = "program_lists"


@dataclass(frozen=True)
class Lists:
    """R lists, padded to N candidates: raw columns (R, N, C), who is there, grades, what they count, folds of users."""

    raw_RNC: Floats
    there_RN: NDArray[np.bool_]
    grades_RN: Floats
    weights_RN: Floats
    folds_R: NDArray[np.int64]

    @cached_property
    def content(self) -> str:
        """A hash of it all."""
        arrays = self.raw_RNC[self.there_RN], self.grades_RN, self.weights_RN, self.folds_R
        return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


def boosted(ctx: Context) -> tuple[trees.Boosted, str]:
    """The program with trees, and its name.

    Raises MissingInputError, EngineError (no list with its target). It learns from what was chosen in the valid period too: only the test
    period judges it. What several stages ask for is fitted once, and kept under work/ for equal lists, seed and code.
    """
    of = padded(ctx, TAUGHT, LESSONS)
    name = f"{NAME}+{trees.NAME}@{of.content[:8]}"
    key = [of.content, ctx.cfg.seed, code_hash(trees.__name__)]
    kept = ctx.work("program") / "trees.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    if found.get("of") == key:
        return trees.Boosted.told(found["judge"]), name
    program = fit(of.raw_RNC, of.there_RN, of.grades_RN, of.folds_R, weights_RN=of.weights_RN)
    judge = trees.boost(program, of.raw_RNC, of.there_RN, of.grades_RN, of.folds_R, ctx.cfg.seed, of.weights_RN)
    write_whole(kept, json.dumps({"of": key, "judge": judge.texts()}))
    return judge, name


def padded(ctx: Context, splits: Sequence[str], of: str = "candidate_features") -> Lists:
    """The lists of some splits by request, candidates in incoming order. Raises MissingInputError, EngineError where there are none."""
    names = ["request_id", "grade", "grade_weight", *columns_of()]
    table = ctx.lake.read(of, names, order_by=["request_id", "incoming_rank"], split=list(splits))
    requests = ctx.lake.read("candidates", ["request_id", "user_id"], split=list(splits)).to_pylist()
    if not requests:
        raise MissingInputError(f"candidates has no row of split {' or '.join(splits)}: run `gr2 stage candidates` first")
    if not table.num_rows:
        raise EngineError("no list holds its target, so there is nothing to learn from: raise candidates.depth or train midtrain longer")
    owners, row_M = np.unique(table["request_id"].to_numpy().astype(str), return_inverse=True)
    slot_M = np.arange(table.num_rows) - np.searchsorted(row_M, row_M, "left")
    shape = len(owners), int(slot_M.max()) + 1
    raw_MC = np.stack([np.round(table[c].to_numpy().astype(np.float64), 6) for c in columns_of()], axis=1)
    raw_RNC, grades_RN, there_RN = np.zeros((*shape, raw_MC.shape[1])), np.zeros(shape), np.zeros(shape, dtype=bool)
    raw_RNC[row_M, slot_M], there_RN[row_M, slot_M] = raw_MC, True
    weights_RN = np.ones(shape)
    grades_RN[row_M, slot_M] = table["grade"].to_numpy()
    weights_RN[row_M, slot_M] = np.nan_to_num(table["grade_weight"].to_numpy(), nan=1.0)
    user_of = {row["request_id"]: row["user_id"] for row in requests}
    folds_R = np.array([fold_of(user_of[str(request)]) for request in owners])
    return Lists(raw_RNC, there_RN, grades_RN, weights_RN, folds_R)
