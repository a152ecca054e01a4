"""Stage `sasrec`: teaches a small model of whole items what follows what, the pre-ranker's third judge (`scoring.sasrec`).

Reads    `interactions`: split pretrain for fit `train`, pretrain and rerank for fit `refit`.
Writes   the models `sasrec` (fit train) and `sasrec-refit` (fit refit, from the start): sasrec.safetensors, sasrec.json with the item ids,
         metrics.jsonl (a line a step), manifest.json. None where sasrec.share is 0.
Rerun    first weights, batches and dropout are seeded; a model is published whole by one rename. A killed run goes on with the second
         model, and within one from its last checkpoint, where `sasrec.train.checkpoint_every` asks for some.

A user is one row: the last items, each of which is to be told from up to `sasrec.places` before it. The softmax runs over all items that
the fit knows, so this is for catalogues up to some hundred thousand items.

    gr2 stage sasrec --profile demo

Shapes: U users, T places, X places where an item follows, D width, M items and the pad.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gr2.config import Config
from gr2.context import Context, Result
from gr2.errors import InputError
from schemas.interactions import FITS
from scoring.sasrec import SASRec, padded, save
from training.data import Batch, Rows, batches
from training.fitting import fit
from training.loop import chunks_of, in_chunks, rank, world

STAGE = "sasrec"
FIT = {"sasrec": "train", "sasrec-refit": "refit"}


def run(cfg: Config, ctx: Context) -> Result:
    """Trains both models. Raises MissingInputError, InputError for a fit without a user of two items."""
    result = Result()
    if not cfg.sasrec.share:
        ctx.log("sasrec: sasrec.share is 0, so the pre-ranker does without")
        return result
    inputs = {"tables": {"interactions": ctx.lake.content_version("interactions")}}
    for name, fit_of in FIT.items():
        items, sequences = read_sequences(ctx, fit_of)
        if not sequences:
            raise InputError(f"no user has two items in {' and '.join(FITS[fit_of])}: there is nothing to learn an order from")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            model = SASRec(items, cfg.sasrec)
        settings = cfg.sasrec.train
        users = batches(rows_of(sequences, cfg.sasrec.places), settings.tokens_per_batch, cfg.seed, rank(), world())
        notes = {"items": len(items), "users": len(sequences)}
        summary = fit(cfg, ctx, STAGE, name, model, None, users, settings, next_item_loss, inputs, notes=notes, write=save)
        result.rows_in, result.tokens = result.rows_in + len(sequences), result.tokens + summary.tokens
        result.rows_out += summary.steps
        result.detail[name] = {"steps": summary.steps, "loss": round(summary.last_loss, 4), "seconds": round(summary.seconds, 1)}
    return result


def read_sequences(ctx: Context, fit_of: str) -> tuple[list[str], list[list[int]]]:
    """Item ids, ascending, and the sequences of the users who have two or more of them: numbers of items, from 1, oldest first."""
    table = ctx.lake.read("interactions", ["user_id", "item_id"], order_by=["user_id", "ordinal"], split=FITS[fit_of])
    users_X, items_X = (np.array(table[column].to_pylist()) for column in ("user_id", "item_id"))
    names, numbers_X = np.unique(items_X, return_inverse=True)
    each = np.split(numbers_X + 1, np.flatnonzero(users_X[1:] != users_X[:-1]) + 1)
    return names.tolist(), [own.tolist() for own in each if len(own) > 1]


def rows_of(sequences: Sequence[Sequence[int]], places: int) -> Rows:
    """A row a user, pads on the left: one item more than the model reads, as the first is told from nothing."""
    items_UT = padded(sequences, places + 1)
    there_UT = items_UT > 0
    position_UT = np.maximum(there_UT.cumsum(axis=1) - 1, 0)
    segment_UT = np.where(there_UT, np.arange(len(items_UT))[:, None], -1)
    items, positions, segments = (table.astype(np.int32) for table in (items_UT, position_UT, segment_UT))
    return Rows(items, positions, segments, (position_UT > 0).astype(np.float32), {})


def next_item_loss(model: SASRec, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
    """This micro-batch's share of the mean cross-entropy of each item given those before it, over all items."""
    learned_UT = batch.learned_BT[:, 1:]
    states_XD, targets_X = model(batch.input_ids_BT[:, :-1])[learned_UT], batch.input_ids_BT[:, 1:][learned_UT]

    def loss(states_XD: Tensor, targets_X: Tensor) -> Tensor:
        return cross_entropy(model.logits(states_XD), targets_X, reduction="sum")[None]

    return in_chunks(loss, chunks_of(len(targets_X)), states_XD, targets_X).sum() / batch.norm, {}
