"""The lists that teach which evidence counts: with their target in them, and deeper than what is shown, as more of them then hold it."""

from dataclasses import replace

from schemas import candidate_features
from schemas.base import STRING, Column

TAUGHT = ("rerank", "valid")  # splits whose lists teach; those of test judge
SPLIT = Column("split", STRING, "as in candidates: what was chosen before the test period", values=TAUGHT)
TABLE = replace(
    candidate_features.TABLE,
    name="program_lists",
    version="1.1",
    grain="one of the first candidates.depth candidates of a request that has something relevant among them",
    columns=tuple(SPLIT if column.name == "split" else column for column in candidate_features.TABLE.columns),
)
