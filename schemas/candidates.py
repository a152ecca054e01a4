"""Requests with the list that the pre-ranker gave."""

from schemas.base import DATE, FLOAT, INT, STRING, Column, Table, list_of

EXPERIMENT = "none"  # the night of lists that have targets
TIMES = ("later_day", "same_day", "provably_later", "unknown_day")  # slices of requests; the first is the headline
TABLE = Table(
    name="candidates",
    version="2.2",
    grain="one request",
    key=("request_id",),
    partition_by=("split", "night"),
    layout="an experiment's splits are replaced together; a night is a partition of its own, and waits for no other",
    laws={
        "lists_agree": "size(candidate_ids) = size(prior_scores) AND size(candidate_ids) = size(grades)",
        "rank_in_list": "target_rank IS NULL OR target_rank BETWEEN 1 AND size(candidate_ids)",
    },
    columns=(
        Column(
            "request_id",
            STRING,
            "split, user and ordinal of the target; the log's own; or live, night, user and a hash of what it was made from",
        ),
        Column(
            "split",
            STRING,
            "rerank: trains the re-ranker; valid: picks; test: judges; live: a night's list, to be served",
            values=("rerank", "valid", "test", "live"),
        ),
        Column("user_id", STRING, "user"),
        Column("source", STRING, "beam: the generative pre-ranker; log: an impression log", values=("beam", "log")),
        Column("model_id", STRING, "pre-ranker, with its hash; log for logged slates"),
        Column("fit", STRING, "what the evidence was fitted on; live: all up to the night", values=("train", "refit", "live")),
        Column("as_of", DATE, "day of the target, or the day after the night: history lies before it"),
        Column("history_ids", list_of(STRING), "items before the target, oldest first"),
        Column("history_days", list_of(INT), "days between each and the target"),
        Column("candidate_ids", list_of(STRING), "incoming order, best first"),
        Column("prior_scores", list_of(FLOAT), "pre-ranker: log of its mixture of network and counts; log: minus the position"),
        Column("grades", list_of(INT), "relevance of each: 0, 1 (target, click), 2 (purchase)"),
        Column(
            "weights",
            list_of(FLOAT),
            "what a positive grade counts: 1 over the probability that its slot was looked at; null where no log was debiased",
            nullable=True,
        ),
        Column("target_id", STRING, "the item that followed, where there is just one", nullable=True),
        Column("target_rank", INT, "its place in the list from 1; null where it is not in it", nullable=True),
        Column("full_rank", INT, "its place in the pre-ranker's full beam from 1; null beyond the beam", nullable=True),
        Column(
            "slice",
            STRING,
            "time between the target and the item before; provably_later: days are unknown, but their order rules out the same one",
            values=TIMES,
        ),
        Column("night", STRING, "partition: the day whose night made the list; none for an experiment's"),
    ),
)
