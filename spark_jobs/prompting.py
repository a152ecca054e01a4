"""Requests as the re-ranker reads them: tables -> views -> prompts. Shared by traces, examples, RL prompts and scoring; not a stage.

    for row, view in views(ctx, cfg, "rerank", replicas=(0, 1)): ...      # row: the columns of `candidates`, and `replica`
    prompts = render_texts(tokenizer, [view, ...], cfg, "think")

Reads `candidates`, `candidate_features`, `items` and the codes of the current tokenizer through Arrow, without a JVM: it also runs inside
Spark's Python workers. Rows come in order of request_id, replicas in the order asked for; equal tables give equal views.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import schemas
from gr2.config import Config, Prompt
from gr2.context import Context
from gr2.draws import by_hash
from gr2.errors import AuditError, ModelError
from gr2.prompts import Candidate, HistoryItem, Mode, Template, View, load_template, make_view, prefill, render
from schemas.candidates import EXPERIMENT
from scoring.model import encode_all, prompt_text

LABELLING = ("request_id", "split", "night", "item_id", "grade", "grade_weight")  # columns of candidate_features that are no evidence
REQUEST = ("request_id", "split", "user_id", "fit", "as_of", "history_ids", "history_days", "candidate_ids", "grades", "weights", "night")
FEATURES = tuple(name for name in schemas.get("candidate_features").names() if name not in LABELLING)
Splits = str | tuple[str, ...]


class Requests:
    """The requests of a split, or of several, with their evidence. Python objects are made one request at a time: any length fits."""

    def __init__(
        self, ctx: Context, cfg: Config, split: Splits, request_ids: Collection[str] | None = None, night: str = EXPERIMENT
    ) -> None:
        part = {"split": split, "night": night}
        requests = ctx.lake.read("candidates", [*REQUEST, "target_id", "target_rank", "slice"], order_by=["request_id"], **part)
        features = ctx.lake.read("candidate_features", order_by=["request_id", "incoming_rank"], **part)
        if request_ids is not None:
            wanted = pa.array(sorted(request_ids), pa.string())
            requests, features = (t.filter(pc.is_in(t["request_id"].cast(pa.string()), value_set=wanted)) for t in (requests, features))
        self.history_items, self.shuffled = cfg.prompt.history_items, cfg.prompt.shuffled
        self.rows = requests
        self.ids = requests["request_id"].to_pylist()
        self._item_ids = features["item_id"].to_pylist()
        self._columns = {name: _values(features[name]) for name in FEATURES}
        owners = features["request_id"].to_numpy(zero_copy_only=False).astype(str) if features.num_rows else np.array([], dtype=str)
        keys = np.array(self.ids, dtype=str)
        self._first, self._end = np.searchsorted(owners, keys, "left"), np.searchsorted(owners, keys, "right")
        self._texts, self._sids = _catalogue(ctx)

    def __len__(self) -> int:
        return len(self.ids)

    def rows_of(self, place: int) -> dict[str, Any]:
        """One request's columns of `candidates`."""
        return {name: self.rows[name][place].as_py() for name in self.rows.column_names}

    def history(self, row: dict[str, Any]) -> tuple[HistoryItem, ...]:
        """The last items before the target, oldest first."""
        known = [step for step in zip(row["history_ids"], row["history_days"], strict=True) if step[0] in self._texts]
        last = known[-self.history_items :]
        return tuple(HistoryItem(self._sids[item], self._texts[item], days, item) for item, days in last)

    def candidates(self, place: int, row: dict[str, Any]) -> tuple[Candidate, ...]:
        """The list in incoming order, with evidence. Raises AuditError where the two tables do not tell of the same list."""
        span = slice(int(self._first[place]), int(self._end[place]))
        listed = self._item_ids[span]
        if listed != row["candidate_ids"]:
            raise AuditError(f"{row['request_id']}: candidates and candidate_features differ: run `gr2 stage candidates` again")
        columns = [self._columns[name][span] for name in FEATURES]
        return tuple(
            Candidate(item, self._sids[item], self._texts[item], dict(zip(FEATURES, values, strict=True)))
            for item, *values in zip(listed, *columns, strict=True)
        )

    def view(self, place: int, row: dict[str, Any], replica: int) -> View:
        """One request as one replica shows it."""
        return make_view(row["request_id"], self.history(row), self.candidates(place, row), replica, self.shuffled)

    def views(self, replicas: Sequence[int] = (0,)) -> Iterator[tuple[dict[str, Any], View]]:
        """(row with `replica`, view) of every request and replica."""
        for place in range(len(self)):
            row = self.rows_of(place)
            for replica in replicas:
                yield {**row, "replica": replica}, self.view(place, row, replica)


def views(
    ctx: Context,
    cfg: Config,
    split: Splits,
    request_ids: Collection[str] | None = None,
    replicas: Sequence[int] = (0,),
    night: str = EXPERIMENT,
) -> Iterator[tuple[dict[str, Any], View]]:
    """(row of `candidates` with `replica`, view) of the requests of a split or several, or of those named; of a night's, for split live.

    Raises MissingInputError, AuditError.
    """
    return Requests(ctx, cfg, split, request_ids, night).views(replicas)


def render_texts(
    tokenizer: Any,
    shown: Sequence[View],
    cfg: Config,
    mode: Mode,
    *,
    template: Template | None = None,
    targets: Sequence[str | None] | None = None,
    filled: bool = True,
) -> list[str]:
    """Prompts as texts that the model goes on from, each within `prompt.max_prompt_tokens`: longer ones lose their oldest history items.

    `filled`: what every completion of the mode begins with is added (`gr2.prompts.prefill`). `targets`: items to name (targeted mode).
    Raises ModelError for a prompt that is too long even with one item of its history: a re-ranker must see whom it ranks for.
    """
    template = template or template_of(cfg.prompt)
    named = targets or [None] * len(shown)
    tail = prefill(mode) if filled else ""
    limit, left = cfg.prompt.max_prompt_tokens, list(shown)
    texts = [prompt_text(tokenizer, render(v, template, mode, t)) + tail for v, t in zip(left, named, strict=True)]
    long = [i for i, ids in enumerate(encode_all(tokenizer, texts)) if len(ids) > limit]
    while long:
        for i in long:
            if len(left[i].history) < 2:
                raise ModelError(
                    f"{left[i].request_id}: the prompt exceeds prompt.max_prompt_tokens ({limit}) even with one item of its history: "
                    "raise it, lower candidates.n, or take a terser prompt.template"
                )
            left[i] = replace(left[i], history=left[i].history[1:])
            texts[i] = prompt_text(tokenizer, render(left[i], template, mode, named[i])) + tail
        lengths = encode_all(tokenizer, [texts[i] for i in long])
        long = [i for i, ids in zip(long, lengths, strict=True) if len(ids) > limit]
    return texts


def template_of(settings: Prompt, name: str = "") -> Template:
    """The profile's template, or another by name, with or without evidence as the profile says."""
    return load_template(name or settings.template, settings.evidence)


def sample(ids: Sequence[str], count: int, seed: int, purpose: str) -> list[str]:
    """At most `count` of the ids (0: all), those with the smallest seeded hashes, so that a longer list changes little. Sorted."""
    return sorted(by_hash(ids, seed, purpose)[: count or None])


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column as Python values; NaN becomes None: what is unknown."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    return column.to_pylist()


def catalogue(ctx: Context) -> list[tuple[str, str]]:
    """(semantic ID, text) of every item under the current tokenizer, in order of item."""
    texts, sids = _catalogue(ctx)
    return [(sids[item], texts[item]) for item in sorted(texts)]


def _catalogue(ctx: Context) -> tuple[dict[str, str], dict[str, str]]:
    """Text and semantic ID of every item under the current tokenizer."""
    items = ctx.lake.read("items", ["item_id", "text"])
    tokenizer = ctx.model("tokenizer").id
    codes = ctx.lake.read("semantic_ids", ["item_id", "token_text"], tokenizer=tokenizer)
    texts, sids = (dict(zip(t["item_id"].to_pylist(), t[c].to_pylist(), strict=True)) for t, c in ((items, "text"), (codes, "token_text")))
    if ctx.date:  # a night's newest items may wait for their metadata: nobody can say them yet
        return {item: text for item, text in texts.items() if item in sids}, sids
    if missing := sorted(set(texts) - set(sids)):
        raise AuditError(
            f"{len(missing)} items, such as {missing[0]!r}, have no semantic ID under {tokenizer}: run `gr2 stage semantic_ids`"
        )
    return texts, sids
