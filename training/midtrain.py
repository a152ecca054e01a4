"""Stage `midtrain`: teaches language models what items are and what follows what (METHOD 3).

Reads    `midtrain_examples`, `items`, `semantic_ids`, the model `tokenizer` (codebooks: where the SID tokens' rows start).
Writes   the models `midtrain` (student, fit train), `midtrain-refit` (the student with fit refit: trained on, or from the start, as
         midtrain.refit_from says) and `midtrain-teacher` (fit train): Hugging Face folders with metrics.jsonl (a line a step, the last with
         the held-out loss) and manifest.json; those that make lists hold vectors of single items too (`scoring.own_vectors`).
Rerun    vocabulary, first weights, batches, item dropout and dropout are seeded; a model is published whole by one rename. A killed run
         goes on from its last checkpoint, where `midtrain.*.checkpoint_every` asks for some.

The table is read in windows of at most midtrain.window_examples texts, over all processes (`training.stream`). The vocabulary, where one is
trained, and the held-out users come from the first window. The held-out loss is that of a few users' items in the rerank split, which fit
`train` does not hold; it picks nothing.

    gr2 stage midtrain --profile demo
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import torch
from numpy.typing import NDArray

from gr2.config import Config, Model, Training
from gr2.context import Context, Result
from gr2.errors import ConfigError, InputError
from gr2.prompts import graded_labels, load_template, vocabulary_texts
from gr2.sids import live_codes, sid_tokens
from scoring import own_vectors
from scoring.model import autocast, build_model, build_vocabulary, encode_all, graded_ids, grow_vocabulary, load, sid_ids
from training.codebooks import Codebooks
from training.data import Batch, Example, Rows, pack, rows_per_batch, to_batch
from training.fitting import fit, supervised
from training.item_loss import ItemLoss
from training.loop import LossFn, planned_steps, rank, sum_over_ranks, token_logprobs, world
from training.stream import Draws, Epochs, Windows

STAGE = "midtrain"
EAGER = 256  # tokens of a row up to which plain attention beats the fused one on CPUs
WARM_UP = 4  # steps that the announced rate is measured on
SMALL = 100_000_000  # parameters up to which it is measured


def run(cfg: Config, ctx: Context) -> Result:
    """Trains student, refitted student, and the teacher if there is one. Raises InputError (a fit without examples), ConfigError."""
    books = Codebooks.load(ctx.model("tokenizer").path)[0].books_LKD
    tables = {fit: windows(cfg, ctx, fit, cfg.midtrain.student) for fit in ("train", "refit")}
    # An example's ordinal is the same in both fits, so that users whose history went on are in the same range of both.
    part = max(tables.values(), key=len).bounds(0)
    texts = {fit: table.between(*part) for fit, table in tables.items()}
    student, teacher = cfg.models.student, cfg.models.teacher
    tokens = sid_tokens(*books.shape[:2])
    tokenizer = vocabulary(cfg, ctx, student, tokens, texts["train"])
    result = Result(rows_in=sum(table.total for table in tables.values()))
    model = _student(cfg, ctx, tokenizer, books)
    _fit(cfg, ctx, "midtrain", model, tokenizer, texts, "train", cfg.midtrain.student, result)
    # Read back rather than trained on: the refit starts from what was published, also when that was published by an earlier run.
    kept = ctx.model("midtrain").path if cfg.midtrain.refit_from == "midtrain" else None
    model = _student(cfg, ctx, tokenizer, books, kept)
    _fit(cfg, ctx, "midtrain-refit", model, tokenizer, texts, "refit", cfg.midtrain.refit, result)
    if teacher is None:
        return result
    if teacher.base != student.base:
        tokenizer = vocabulary(cfg, ctx, teacher, tokens, texts["train"])
    model = build_model(teacher, tokenizer, books, cfg.seed + 1)
    _fit(cfg, ctx, "midtrain-teacher", model, tokenizer, texts, "train", cfg.midtrain.teacher, result)
    return result


def _student(cfg: Config, ctx: Context, tokenizer: Any, books: NDArray[np.floating], kept: Path | None = None) -> Any:
    """The student before a training: as it starts, or a published one; with own vectors of the items where the profile wants some."""
    size, mix = cfg.models.student, cfg.midtrain
    model = load(kept, dropout=size.dropout)[0] if kept else build_model(size, tokenizer, books, cfg.seed)
    if mix.own_vectors and mix.item_weight and not mix.student.lora:
        own_vectors.attach(model, live_codes(ctx)[1], kept)
    return model


# -- texts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """One row of `midtrain_examples`."""

    example_id: str
    task: str
    prompt: str
    completion: str


def windows(cfg: Config, ctx: Context, fit: str, settings: Training) -> Windows[Text]:
    """The texts of one fit, in order of reading. Raises InputError if there is none."""
    dataset, where = ctx.lake.dataset("midtrain_examples"), ds.field("fit") == fit
    lanes = rows_per_batch(settings.tokens_per_batch, settings.row_tokens, world())
    found = Windows(dataset, Text, ("ordinal", "example_id"), where, cfg.midtrain.window_examples, lanes)
    if not found.total:
        raise InputError(f"midtrain_examples holds no text of fit {fit!r}: run `gr2 stage midtrain_examples` first")
    return found


def vocabulary(cfg: Config, ctx: Context, size: Model, tokens: list[str], texts: Sequence[Text]) -> Any:
    """The tokenizer of a base model, grown; or one trained on the texts of the mix, of the catalogue and of the prompts.

    Raises ConfigError where that is too small for the words of the prompts.
    """
    if size.base:
        return grow_vocabulary(size.base, tokens)
    said = [t.prompt + t.completion for t in texts if t.task != "history"]
    items = ctx.lake.read("items", ["text"], order_by=["item_id"])["text"].to_pylist()
    template, folder = load_template(cfg.prompt.template), ctx.work("midtrain", "vocabulary", str(rank()))
    made = build_vocabulary([*said, *items, *vocabulary_texts(template)], cfg.models.vocabulary, tokens, folder)
    if len(graded_ids(made)) < len(graded_labels(template)):
        raise ConfigError(f"models.vocabulary={cfg.models.vocabulary} leaves no room for labels with their grade: raise it by 300")
    return made


def start_id(tokenizer: Any) -> int:
    """The token that every text and every history starts with: <bos>, or the end token of vocabularies that know no start."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


def held_out(train: Sequence[Text], refit: Sequence[Text], count: int) -> list[tuple[str, str]]:
    """`(history, what followed)` of users whose one window of fit `train` is the beginning of that of fit `refit`."""
    longer = {t.example_id: t for t in refit if t.task == "history" and not t.prompt}
    found = []
    for text in train:
        after = longer.get(text.example_id)
        if (
            text.task == "history"
            and after
            and len(after.completion) > len(text.completion)
            and after.completion.startswith(text.completion)
        ):
            found.append((text.completion, after.completion[len(text.completion) :]))
    return found[:count]


# -- examples, drawn anew each epoch ----------------------------------------------------------------------------------


class Mix:
    """Texts as token ids. `rows(number)` packs the window of a draw, leaving out a drawn share of each history's items."""

    def __init__(
        self, tokenizer: Any, windows: Sequence[Sequence[Text]], levels: int, drop: float, row_tokens: int, seed: int, lanes: int = 1
    ) -> None:
        self.tokenizer, self.draws = tokenizer, Draws(windows, lanes, seed, self._parts)
        self.levels, self.drop, self.row_tokens, self.seed = levels, drop, row_tokens, seed
        self.bos, self.eos = start_id(tokenizer), tokenizer.eos_token_id

    def rows(self, number: int) -> Rows:
        """The packed rows of one draw; texts longer than a row are left out and counted."""
        generator = np.random.default_rng([self.seed, number])
        examples = [self._example(generator, *part) for part in self.draws[number]]
        return pack(examples, self.row_tokens, self.seed + number, drop_long=True)

    def unread(self, size: int) -> list[int]:
        """Tokens of the vocabulary that no text holds: their rows are not worth keeping (`training.sft.wake`). All processes must ask."""
        read_V = np.zeros(size)
        read_V[[self.bos, self.eos]] = 1
        windows = len(self.draws.windows)
        for window in range(rank(), windows, world()) if windows > 1 else (0,):
            for _, prompt, completion in self.draws.encoded(window):
                read_V[prompt], read_V[completion] = 1, 1
        counts = sum_over_ranks({str(i): float(read) for i, read in enumerate(read_V)})
        return [i for i in range(size) if not counts[str(i)]]

    def _parts(self, texts: Sequence[Text]) -> list[tuple[bool, NDArray[np.int64], NDArray[np.int64]]]:
        """Whether it is a history, prompt and completion of each text."""
        prompts, completions = (encode_all(self.tokenizer, [getattr(t, part) for t in texts]) for part in ("prompt", "completion"))
        return [
            (t.task == "history", np.array(p, dtype=np.int64), np.array(c, dtype=np.int64))
            for t, p, c in zip(texts, prompts, completions, strict=True)
        ]

    def _example(self, generator: np.random.Generator, history: bool, prompt: NDArray[np.int64], completion: NDArray[np.int64]) -> Example:
        if not history:
            return Example([self.bos, *prompt.tolist()], [([*completion.tolist(), self.eos], 1.0)])
        return Example([self.bos, *self._thinned(generator, prompt, 0)], [(self._thinned(generator, completion, 2), 1.0)])

    def _thinned(self, generator: np.random.Generator, ids: NDArray[np.int64], least: int) -> list[int]:
        """A history without some of its items, but with at least `least`."""
        items_IL = ids.reshape(-1, self.levels)
        if self.drop:
            kept_I = generator.random(len(items_IL)) >= self.drop
            if kept_I.sum() >= least:
                items_IL = items_IL[kept_I]
        return [int(i) for i in items_IL.reshape(-1)]


class Summed(Batch):
    """A batch whose mask is one that eager attention adds. On CPUs and short rows that is about twice as fast as fused attention."""

    def mask_B1TT(self) -> torch.Tensor:
        """0 where a token may look, the smallest number elsewhere."""
        return torch.zeros(()).where(super().mask_B1TT(), torch.tensor(torch.finfo(torch.float32).min))


def batch_of(rows: Rows, chosen: NDArray[np.integer] | slice, eager: bool) -> Batch:
    """Some rows as a batch, for eager or for fused attention."""
    batch = to_batch(rows, chosen)
    return Summed(**vars(batch)) if eager else batch


# -- training ---------------------------------------------------------------------------------------------------------


def _fit(
    cfg: Config,
    ctx: Context,
    name: str,
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[Text]],
    fit_of: str,
    settings: Training,
    result: Result,
) -> None:
    """Trains and publishes one model; tells the token budget first."""
    table = windows(cfg, ctx, fit_of, settings)
    mix = Mix(tokenizer, table, len(sid_ids(tokenizer)), cfg.midtrain.item_dropout, settings.row_tokens, cfg.seed, table.lanes)
    eager = settings.row_tokens <= EAGER and not torch.cuda.is_available()
    if eager:
        model.set_attn_implementation("eager")
    kind = Summed if eager else Batch
    loader = Epochs(mix.rows, settings.tokens_per_batch, cfg.seed, kind, rank(), world(), table.lanes, len(table))
    loss_fn = ItemLoss(live_codes(ctx)[1], sid_ids(tokenizer), cfg.midtrain.item_weight) if cfg.midtrain.item_weight else supervised
    _announce(ctx, name, model, loader, settings, loss_fn)
    pairs = held_out(texts["train"], texts["refit"], cfg.midtrain.held_out) if fit_of == "train" else []
    validate = validator(tokenizer, pairs, eager)
    inputs: dict[str, dict[str, Any]] = {
        "tables": {table: ctx.lake.content_version(table) for table in ("midtrain_examples", "semantic_ids")},
        "models": {"tokenizer": ctx.model("tokenizer").hash},
    }
    if name == "midtrain-refit" and cfg.midtrain.refit_from == "midtrain":
        inputs["models"]["midtrain"] = ctx.model("midtrain").hash  # what it starts from
    notes: dict[str, Any] = {"fit": fit_of, "parameters": sum(p.numel() for p in model.parameters())}
    size = cfg.models.teacher if name == "midtrain-teacher" else cfg.models.student
    if size is not None and size.base is None:
        notes["unread"] = mix.unread(len(tokenizer))
    summary = fit(cfg, ctx, STAGE, name, model, tokenizer, loader, settings, loss_fn, inputs, notes=notes, validate=validate)
    result.tokens += summary.tokens
    result.rows_out += summary.steps
    result.detail[name] = {"steps": summary.steps, "loss": round(summary.last_loss, 4), "seconds": round(summary.seconds, 1)}


def _announce(ctx: Context, name: str, model: Any, loader: Epochs, settings: Training, loss_fn: LossFn) -> None:
    """Logs the token budget before training starts, and for small models the minutes that it takes."""
    parameters, steps = sum(p.numel() for p in model.parameters()), planned_steps(loader, settings)
    budget = loader.tokens * steps * settings.accumulation * loader.rows_per_batch / loader.count
    time_needed = ""
    if parameters < SMALL and not torch.cuda.is_available():  # the model is not yet where it trains, and a GPU is soon done with it
        rate = world() * _rate(model, loader, settings, loss_fn)
        time_needed = f", about {budget / rate / 60:.1f} min at {rate:,.0f} tokens/s"
    ctx.log(
        f"{name}: {parameters / 1e6:.1f}M parameters, {loader.tokens:,} tokens an epoch in rows {loader.fill:.0%} full "
        f"({loader.dropped} texts too long), {steps} steps, {budget:,.0f} tokens{time_needed}"
    )


def _rate(model: Any, loader: Epochs, settings: Training, loss_fn: LossFn) -> float:
    """Tokens a second of one process, measured on a few batches, whose gradients are thrown away."""
    model.train()
    stream, place = iter(loader), loader.state_dict()
    seconds, tokens = 0.0, 0
    with torch.random.fork_rng(devices=[]):
        for number in range(WARM_UP):
            batch, started = next(stream), time.monotonic()
            with autocast(model, settings.precision == "bf16"):
                loss_fn(model, batch)[0].backward()
            model.zero_grad(set_to_none=True)
            if number:  # the first one warms up
                seconds, tokens = seconds + time.monotonic() - started, tokens + batch.tokens
    loader.load_state_dict(place)
    return tokens / seconds


def validator(tokenizer: Any, pairs: Sequence[tuple[str, str]], eager: bool = False) -> Callable[[Any], dict[str, float]] | None:
    """`model -> {"loss": ...}`: mean loss of a token of what followed, given the history. None where there is nothing held out."""
    if not pairs:
        return None
    before, after = (encode_all(tokenizer, texts) for texts in zip(*pairs, strict=True))
    examples = [Example([start_id(tokenizer), *b], [(a, 1.0)]) for b, a in zip(before, after, strict=True)]
    rows = pack(examples, max(e.tokens for e in examples))

    def loss(model: Any) -> dict[str, float]:
        total, weight = 0.0, 0.0
        with torch.inference_mode():
            for start in range(0, len(rows), 32):
                batch = batch_of(rows, slice(start, start + 32), eager).to(model.device)
                total -= float(token_logprobs(model, batch).sum())
                weight += batch.norm
        return {"loss": total / weight}

    return loss
