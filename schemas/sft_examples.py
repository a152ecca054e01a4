"""Accepted traces as training texts, and drills."""

from schemas.base import LONG, STRING, Column, Table

TABLE = Table(
    name="sft_examples",
    version="1.1",
    grain="one training text",
    key=("example_id",),
    sort_by=("ordinal",),
    layout="read by ranges of the ordinal",
    columns=(
        Column("example_id", STRING, "sample and mode"),
        Column("sample_id", STRING, "accepted sample; of a drill: its own name"),
        Column("request_id", STRING, "request; of a drill: its own name, there is no request"),
        Column("mode", STRING, "think: with the thought; direct: with an empty one", values=("think", "direct")),
        Column(
            "source",
            STRING,
            "sampling mode of the trace; a list without its target, so unproven; a made-up list",
            values=("targeted", "rejection", "no_target", "drill"),
        ),
        Column("prompt", STRING, "rendered prompt", long=True),
        Column("reasoning", STRING, "thought, with its tags; weighs sft.reasoning_weight", long=True),
        Column("answer", STRING, "JSON list of labels; weighs sft.answer_weight"),
        Column("ordinal", LONG, "order of reading: by hash of example_id"),
    ),
)
