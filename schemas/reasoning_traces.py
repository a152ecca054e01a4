"""Every sample that a teacher ever drew, kept or refused."""

from schemas.base import DOUBLE, INT, LONG, STRING, Column, Table, list_of

TABLE = Table(
    name="reasoning_traces",
    version="1.0",
    grain="one sample",
    key=("sample_id",),
    mode="insert",
    laws={"accepted_has_order": "verdict != 'accepted' OR answer IS NOT NULL"},
    columns=(
        Column("sample_id", STRING, "hash of request, teacher, mode, attempt and prompt; of the error too where the engine failed"),
        Column("request_id", STRING, "request"),
        Column("teacher", STRING, "evidence:<version> (a program), or engine and model"),
        Column(
            "mode",
            STRING,
            "targeted: the teacher saw the target; rejection: it saw what the student sees",
            values=("targeted", "rejection"),
        ),
        Column("attempt", INT, "from 1"),
        Column("seed", LONG, "hash of request and attempt: seeds shuffles and sampling"),
        Column("prompt_name", STRING, "template"),
        Column("prompt_hash", STRING, "hash of template and rendered prompt"),
        Column("labels", list_of(STRING), "label of each candidate, in incoming order"),
        Column("shown", list_of(INT), "incoming places, from 0, in the order shown"),
        Column("text", STRING, "what the teacher wrote, whole", long=True),
        Column("answer", list_of(STRING), "candidate ids in the new order, where the answer parses", nullable=True),
        Column(
            "verdict",
            STRING,
            "accepted, refused, no_target (the list lacks it) or failed (engine)",
            values=("accepted", "refused", "no_target", "failed"),
        ),
        Column("reason", STRING, "why: rank_k, the parse failure, the leak form, the engine's error; empty where accepted"),
        Column("target_rank", INT, "place the teacher gave the target", nullable=True),
        Column("incoming_rank", INT, "place it came in with", nullable=True),
        Column("prompt_tokens", INT, "tokens read"),
        Column("completion_tokens", INT, "tokens written"),
        Column("cost", DOUBLE, "price in the teacher's currency; 0 for local ones"),
        Column("seconds", DOUBLE, "wall time", volatile=True),
    ),
)
