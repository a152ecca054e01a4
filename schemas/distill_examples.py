"""The best model's orders and label log-probabilities, to be imitated without thinking."""

from schemas.base import FLOAT, LONG, STRING, Column, Table, list_of

TABLE = Table(
    name="distill_examples",
    version="1.1",
    grain="one request and replica",
    key=("example_id",),
    columns=(
        Column("example_id", STRING, "request and replica"),
        Column("request_id", STRING, "request"),
        Column("source_model", STRING, "model imitated, or the program, with its hash"),
        Column(
            "source_mode",
            STRING,
            "think; score where no thinking answer parsed; the evidence program",
            values=("think", "score", "program"),
        ),
        Column("prompt", STRING, "rendered prompt, score mode: the next token is the first label", long=True),
        Column("order", list_of(STRING), "labels, best first: by mean place over the answers"),
        Column("label_logprobs", list_of(FLOAT), "log of each label's mean probability at the first answer position"),
        Column("ordinal", LONG, "order of reading"),
    ),
)
