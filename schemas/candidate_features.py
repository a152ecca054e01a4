"""The evidence of each candidate, numbers that LambdaMART, the prompts and the evidence teacher all share."""

from schemas.base import DOUBLE, INT, STRING, Column, Table

TABLE = Table(
    name="candidate_features",
    version="2.2",
    grain="one candidate of one request",
    key=("request_id", "item_id"),
    partition_by=("split", "night"),
    layout="as candidates",
    columns=(
        Column("request_id", STRING, "request"),
        Column("split", STRING, "as in candidates", values=("rerank", "valid", "test", "live")),
        Column("item_id", STRING, "candidate"),
        Column("incoming_rank", INT, "place in the incoming order, from 1"),
        Column("prior_score", DOUBLE, "score of the pre-ranker"),
        Column("prior_gap", DOUBLE, "score of the first candidate minus this one's"),
        Column("popularity", DOUBLE, "log(1 + count)"),
        Column("recent", DOUBLE, "log(1 + decayed count)"),
        Column("pair_last", DOUBLE, "pair weight from the last history item"),
        Column("pair_next", DOUBLE, "direct transitions from the last history item"),
        Column("pair_max", DOUBLE, "largest pair weight from any history item"),
        Column("pair_sum", DOUBLE, "pair weights from all history items, halved at each step back"),
        Column("lift_max", DOUBLE, "largest lift from any history item"),
        Column("pair_item", STRING, "history item with the largest pair weight", nullable=True),
        Column("pair_gap_days", DOUBLE, "median gap of that pair", nullable=True),
        Column("same_brand", INT, "history items of the same brand"),
        Column("category_overlap", DOUBLE, "largest Jaccard overlap of categories with a history item"),
        Column("text_similarity", DOUBLE, "cosine of the text vectors of the candidate and the last history item"),
        Column("text_similarity_max", DOUBLE, "the same, largest over the history"),
        Column("price_ratio", DOUBLE, "price over the mean price of the history; 1 where unknown"),
        Column("days_since_seen", DOUBLE, "days from the item's last fitted interaction to the request; -1 where none"),
        Column("days_since_last", INT, "days from the user's last item to the request, 0: on its day; null without history", nullable=True),
        Column("grade", INT, "relevance, as in candidates: a label, never a feature"),
        Column("grade_weight", DOUBLE, "what the grade counts, as in candidates: no feature either", nullable=True),
        Column("night", STRING, "partition: as in candidates"),
    ),
)
