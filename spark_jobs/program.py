"""The evidence program (`scoring.evidence_engine`), fitted on the re-ranker's own lists: the teacher of traces, and of `distill`.

program, content = fitted(ctx)
"""

import hashlib

import numpy as np

from gr2.context import Context
from gr2.errors import MissingInputError
from scoring.evidence_engine import Program, columns_of, fit, fold_of


def fitted(ctx: Context) -> tuple[Program, str]:
    """The program, and a hash of all that it was fitted on. Raises MissingInputError, EngineError (no list with its target)."""
    names = ["request_id", "grade", "grade_weight", *columns_of()]
    table = ctx.lake.read("candidate_features", names, order_by=["request_id", "incoming_rank"], split="rerank")
    users = ctx.lake.read("candidates", ["request_id", "user_id"], order_by=["request_id"], split="rerank")
    if not table.num_rows:
        raise MissingInputError("candidate_features has no row of split rerank: run `gr2 stage candidates` first")
    owners, row_M = np.unique(table["request_id"].to_numpy().astype(str), return_inverse=True)
    slot_M = np.arange(table.num_rows) - np.searchsorted(row_M, row_M, "left")
    shape = len(owners), int(slot_M.max()) + 1
    raw_MC = np.stack([np.round(table[c].to_numpy().astype(np.float64), 6) for c in columns_of()], axis=1)
    raw_RNC, grades_RN, there_RN = np.zeros((*shape, raw_MC.shape[1])), np.zeros(shape), np.zeros(shape, dtype=bool)
    raw_RNC[row_M, slot_M], there_RN[row_M, slot_M] = raw_MC, True
    weights_RN = np.ones(shape)
    grades_RN[row_M, slot_M] = table["grade"].to_numpy()
    weights_RN[row_M, slot_M] = np.nan_to_num(table["grade_weight"].to_numpy(), nan=1.0)
    user_of = dict(zip(users["request_id"].to_pylist(), users["user_id"].to_pylist(), strict=True))
    folds_R = np.array([fold_of(user_of[str(request)]) for request in owners])
    content = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in (raw_MC, grades_RN, weights_RN, folds_R))).hexdigest()
    return fit(raw_RNC, there_RN, grades_RN, folds_R, weights_RN=weights_RN), content
