"""What each model made of each request: a permutation, or a named failure."""

from schemas.base import DOUBLE, FLOAT, INT, STRING, Column, Table, list_of

TABLE = Table(
    name="rerank_scores",
    version="2.0",
    grain="one request, model, mode and replica",
    key=("request_id", "model_id", "mode", "replica"),
    mode="insert",
    partition_by=("model_id", "night"),
    layout="one model is read at a time, for an experiment or for some nights",
    laws={"ok_has_order": "(status = 'ok') = (new_order IS NOT NULL)"},
    columns=(
        Column("request_id", STRING, "request"),
        Column("model_id", STRING, "model, with its hash"),
        Column("model", STRING, "model's name"),
        Column("mode", STRING, "how it answered", values=("think", "direct", "score")),
        Column("replica", INT, "0 for the figure, more for the position audit"),
        Column("split", STRING, "as in candidates", values=("rerank", "valid", "test", "live")),
        Column("status", STRING, "ok, or the failure's name"),
        Column("new_order", list_of(STRING), "candidate ids, best first", nullable=True),
        Column("labels", list_of(STRING), "label of each candidate, in incoming order; shuffle after shuffle, if several"),
        Column("shown", list_of(INT), "incoming places, from 0, in the order shown; of several shuffles the first"),
        Column("reasoning", STRING, "thought, as written", long=True),
        Column("text", STRING, "whole completion", long=True),
        Column("label_logprobs", list_of(FLOAT), "of each of `labels`, score mode", nullable=True),
        Column("prompt_hash", STRING, "hash of template, text, and settings that change an answer"),
        Column("prompt_tokens", INT, "tokens read"),
        Column("completion_tokens", INT, "tokens written"),
        Column("seconds", DOUBLE, "wall time, the batch's share", volatile=True),
        Column("night", STRING, "partition: as in candidates"),
    ),
)
