"""Stage `rl_prompts`: the prompts of RL and on-policy distillation, each with what a verifier needs (METHOD 8).

Reads `candidates`, `candidate_features`, `items`, `semantic_ids`, and the vocabulary of `midtrain`.
Writes `rl_prompts` (one prompt; key prompt_id = request and replica): requests that hold a relevant candidate. Split `rerank` trains, with
`rl.replicas` shuffles of each; in a seeded share `rl.redraw_share` of them the target's incoming place is drawn anew, and what is said of
the prior follows. Split `valid` picks checkpoints: `rl.validate_requests` requests, one shuffle, the incoming order as it was.
A rerun is harmless: every draw is a hash of seed, request and replica, and the table is replaced whole.

    gr2 stage rl_prompts --profile demo
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

import schemas
from gr2.config import Config
from gr2.context import Context, Result
from gr2.draws import seed_of, share_of
from gr2.prompts import View, evidence_words, make_view, prompt_hash, redrawn
from scoring.model import load_tokenizer
from spark_jobs.prompting import Requests, render_texts, sample, template_of
from spark_jobs.publish import publish
from spark_jobs.session import frame_of

CHUNK = 512  # prompts rendered at once


def run(cfg: Config, ctx: Context) -> Result:
    """Draws, renders, publishes. Raises MissingInputError, AuditError, ModelError (a prompt that cannot be made short enough)."""
    tokenizer = load_tokenizer(ctx.model("midtrain").path)
    schema, template = schemas.get("rl_prompts").arrow(), template_of(cfg.prompt)
    parts, redraws, requests = [schema.empty_table()], 0, 0
    for split in ("rerank", "valid"):
        ids = relevant(ctx, split)
        chosen = sample(ids, cfg.rl.validate_requests, cfg.seed, "validate") if split == "valid" else ids
        requests += len(ids)
        stream = drawn(cfg, Requests(ctx, cfg, split, chosen))
        while chunk := list(islice(stream, CHUNK)):
            shown = [view for _, view, _ in chunk]
            texts = render_texts(tokenizer, shown, cfg, cfg.rl.mode, template=template)
            rows = [_row(cfg, row, view, moved, text, template) for (row, view, moved), text in zip(chunk, texts, strict=True)]
            parts.append(pa.Table.from_pylist(rows, schema=schema))
            redraws += sum(moved for _, _, moved in chunk)
    table = pa.concat_tables(parts)
    ctx.log(f"rl_prompts: {table.num_rows} prompts of {requests} requests with a relevant candidate, {redraws} re-drawn")
    return Result(rows_in=requests, rows_out=publish(ctx, "rl_prompts", frame_of(ctx, table)), detail={"redrawn": redraws})


def relevant(ctx: Context, split: str) -> list[str]:
    """Requests whose list holds anything relevant: no order of the others can be told from another."""
    table = ctx.lake.read("candidates", ["request_id", "grades"], order_by=["request_id"], split=split)
    return [i for i, grades in zip(table["request_id"].to_pylist(), table["grades"].to_pylist(), strict=True) if any(grades)]


def drawn(cfg: Config, requests: Requests) -> Iterator[tuple[dict[str, Any], View, bool]]:
    """(row with `replica` and `grade_of`, view, whether the target was moved) of every prompt to be."""
    for place in range(len(requests)):
        row = requests.rows_of(place)
        history, candidates = requests.history(row), requests.candidates(place, row)
        grade_of = dict(zip(row["candidate_ids"], row["grades"], strict=True))
        weight_of = dict(zip(row["candidate_ids"], row["weights"] or [], strict=False))
        training = row["split"] == "rerank"
        for replica in range(cfg.rl.replicas if training else 1):
            moved = (
                training and row["target_id"] in grade_of and share_of("move", cfg.seed, row["request_id"], replica) < cfg.rl.redraw_share
            )
            listed = redrawn(candidates, row["target_id"], row["request_id"], replica) if moved else candidates
            told = {**row, "replica": replica, "grade_of": grade_of, "weight_of": weight_of}
            yield told, make_view(row["request_id"], history, listed, replica, cfg.prompt.shuffled), moved


def _row(cfg: Config, row: dict[str, Any], view: View, moved: bool, text: str, template: Any) -> dict[str, Any]:
    prompt_id = f"{row['request_id']}#{row['replica']}"
    return {
        "prompt_id": prompt_id,
        "request_id": row["request_id"],
        "split": row["split"],
        "redrawn": moved,
        "prompt": text,
        "mode": cfg.rl.mode,
        "incoming": list(view.labels),
        "shown": list(view.shown_labels),
        "grades": [row["grade_of"][candidate.item_id] for candidate in view.candidates],
        "weights": [row["weight_of"][c.item_id] for c in view.candidates] if row["weight_of"] else None,
        "evidence": evidence_words(view, template),
        "prompt_hash": prompt_hash(template, text),
        "ordinal": seed_of("order", cfg.seed, prompt_id),
    }
