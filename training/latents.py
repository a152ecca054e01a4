"""Stage `latents`: the context compressor (METHOD 9). Here its latent form, which says an item in k learned vectors instead of its tokens;
its text form, the model `brief`, which leaves out words, is trained by `training/brief.py`.

Reads `rl_prompts`, `items`, `semantic_ids` and the frozen model `rl`. A small encoder reads an item's semantic ID and text through the
frozen model's own embeddings and gives k vectors; in a prompt they stand in place of what the prompt says of the item (its ID, and its text
where the template shows one). It learns to leave the frozen model's answers as they were: the KL divergence at every token of an answer.
Writes the artefact `latents`: compressor.safetensors, compressor.json, vectors.arrow (one item; published by the stage `item_latents`),
metrics.jsonl and, in the manifest, what was measured on held-out prompts before and after training, and with the items left out; and the
artefact `brief`. To score with them: `scoring.models={rl: [score], latents: [score], brief: [score]}`.
A rerun is harmless: everything is seeded, and the artefact is published whole.

    gr2 stage latents --profile demo

Shapes: B prompts, T tokens, D hidden size, V vocabulary, I items, K vectors of an item, S tokens of an item's reading, R learned tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from gr2.config import Config, Latents
from gr2.context import Context, Result
from gr2.errors import InputError
from gr2.prompts import ANSWER_OPEN, LABELS, Template, format_answer, load_template
from schemas.base import FLOAT, INT, STRING, list_of
from scoring.compressed import encode_marked, known_items, marked, said_of, save
from scoring.model import autocast, encode, encode_all, hidden_states, label_ids, label_logprobs, load, right_padded
from training import brief
from training.fitting import manifest_of, publishing
from training.loop import device, train
from training.rollouts import MOST, Deck, Task, read_tasks

VECTORS = pa.schema([("item_id", STRING), ("vectors", list_of(FLOAT)), ("k", INT), ("text_tokens", INT)])


def run(cfg: Config, ctx: Context) -> Result:
    """Trains, measures, publishes. Raises MissingInputError, InputError (no prompt, or prompts without an item)."""
    base = ctx.model("rl")
    model, tokenizer = load(base.path)
    model.requires_grad_(False).to(device())  # the compressor reads through it where DeepSpeed trains the compressor
    items = read_items(ctx, cfg, tokenizer)
    template = load_template(cfg.prompt.template, cfg.prompt.evidence)
    learn, held_out = (
        texts(model, tokenizer, read_tasks(ctx, split, most), items, template)
        for split, most in (("rerank", MOST), ("valid", cfg.latents.validate_requests))
    )
    compressor = Compressor(model, items.readings_IS.shape[1], cfg.latents, cfg.seed).to(model.device)
    settings = cfg.latents.train
    stream = Stream(learn, settings.tokens_per_batch, cfg.seed)
    ctx.log(f"latents: {len(learn)} prompts, {settings.max_steps} steps, about {settings.max_steps * settings.tokens_per_batch:,} tokens")
    tables = {t: ctx.lake.content_version(t) for t in ("rl_prompts", "items", "semantic_ids")}
    manifest = manifest_of(cfg, "latents", "latents", settings, {"tables": tables, "models": {"rl": base.hash}})
    before = measure(model, compressor, tokenizer, items, held_out)
    checkpoint = ctx.work("latents", "checkpoint")
    with publishing(ctx, "latents", manifest, checkpoint) as folder:
        summary = train(
            compressor,
            stream,
            keeps_behaviour(model, items, settings.accumulation),
            settings,
            folder=folder,
            total_steps=max(1, settings.max_steps),
            ctx=ctx,
            checkpoint=checkpoint,
            seed=cfg.seed,
            fingerprint=manifest["fingerprint"],
            label="latents",
        )
        after = measure(model, compressor, tokenizer, items, held_out)
        dropped = measure(model, None, tokenizer, items, held_out)
        manifest |= {"steps": summary.steps, "before": before, "after": after, "items_left_out": dropped}
        write(folder, compressor, model, items, cfg.latents, base.id, template)
    shown = ", ".join(
        f"{name} {before[name]:.3f} -> {after[name]:.3f} (left out: {dropped[name]:.3f})" for name in ("kl", "same_first", "ndcg3")
    )
    ctx.log(f"latents: {after['saved']:.0%} fewer prompt tokens; {shown}; ndcg3 of the full prompt {after['ndcg3_full']:.3f}")
    shorter = brief.fit(cfg, ctx, model, tokenizer, base, template)
    return Result(rows_in=len(learn), rows_out=len(items.ids), tokens=stream.tokens, detail={"before": before, "after": after, **shorter})


# -- items and prompts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Items:
    """The catalogue as the compressor reads it: `readings_IS` holds the tokens of ID and text, filled at the right (`lengths_I`)."""

    ids: list[str]
    known: dict[str, tuple[str, str]]  # semantic ID -> item, text
    readings_IS: torch.Tensor
    lengths_I: torch.Tensor
    replaced: list[int]  # tokens that the prompt says an item with


def read_items(ctx: Context, cfg: Config, tokenizer: Any) -> Items:
    """Items with a semantic ID under the current tokenizer, in order of item_id."""
    known = known_items(ctx)
    words = load_template(cfg.prompt.template).text_words
    said = encode_all(tokenizer, [said_of(sid, text, words) for sid, (_, text) in known.items()])
    texts_ = encode_all(tokenizer, [text for _, text in known.values()])
    readings = [[*sid, *text[: cfg.latents.text_tokens]] for sid, text in zip(encode_all(tokenizer, list(known)), texts_, strict=True)]
    readings_IS, lengths_I = right_padded(readings, tokenizer.pad_token_id)
    return Items([item for item, _ in known.values()], known, readings_IS, lengths_I, [len(tokens) for tokens in said])


@dataclass(frozen=True)
class Text:
    """A prompt and an answer to it. `ids`: its tokens; `short`: the same, but each item n that the prompt says is the one place -n - 1."""

    task: Task
    ids: tuple[int, ...]
    short: tuple[int, ...]
    learned: int  # tokens at the end whose distribution is to be kept: the answer after its opening


def texts(model: Any, tokenizer: Any, tasks: Sequence[Task], items: Items, template: Template) -> list[Text]:
    """Prompts in the form that asks for no thought, each with the frozen model's own order as its answer."""
    prompts = [brief.asked(task, template).prompt for task in tasks]
    logp_BY = label_logprobs(model, tokenizer, prompts, list(LABELS))
    rows_of = {item: (number,) for number, item in enumerate(items.ids)}
    shorts = encode_marked(tokenizer, [marked(prompt, items.known, template.text_words) for prompt in prompts], rows_of)
    made = []
    for task, prompt, short, logp_Y in zip(tasks, prompts, shorts, logp_BY, strict=True):
        order = brief.order_of(task, logp_Y.tolist())
        answer = tuple(encode(tokenizer, format_answer(order).removeprefix(ANSWER_OPEN)))
        made.append(Text(task, (*encode(tokenizer, prompt), *answer), (*short, *answer), len(answer)))
    if not any(n < 0 for text in made for n in text.short):
        raise InputError(
            "no item was found in any prompt: rl_prompts and semantic_ids are of different tokenizers; run `gr2 stage rl_prompts`"
        )
    return made


class Stream:
    """Endless batches of texts of at most `tokens` tokens; its state is one number."""

    def __init__(self, found: Sequence[Text], tokens: int, seed: int) -> None:
        self.deck, self.tokens = Deck(found, seed), 0
        self.size = max(1, tokens // max(len(text.ids) for text in found))

    def __iter__(self) -> Iterator[list[Text]]:
        while True:
            batch = self.deck.take(self.size)
            self.tokens += sum(len(text.ids) + len(text.short) for text in batch)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands."""
        return {"taken": self.deck.taken, "tokens": self.tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` stood."""
        self.deck.taken, self.tokens = int(state["taken"]), int(state["tokens"])


# -- the compressor ---------------------------------------------------------------------------------------------------


class Compressor(torch.nn.Module):
    """One transformer layer over an item's reading, then K learned queries that attend to it.

    What it adds starts at zero, so that training starts from the mean of the embeddings.
    """

    def __init__(self, model: Any, longest: int, settings: Latents, seed: int) -> None:
        super().__init__()
        table_VD = model.get_input_embeddings().weight
        width, heads = table_VD.shape[1], model.config.num_attention_heads
        self.k, self.scale = settings.vectors, float(table_VD.float().pow(2).mean().sqrt())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.places_SD = torch.nn.Parameter(torch.randn(longest, width) * 0.1)
            self.queries_KD = torch.nn.Parameter(torch.randn(self.k, width) * 0.5)
            self.layer = torch.nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            self.attend = torch.nn.MultiheadAttention(width, heads, batch_first=True)
            self.out = torch.nn.Linear(width, width)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)

    @property
    def device(self) -> torch.device:
        """Where the compressor is."""
        return self.queries_KD.device

    def forward(self, embedded_ISD: torch.Tensor, lengths_I: torch.Tensor) -> torch.Tensor:
        """Item readings, embedded by the frozen model -> vectors_IKD in the space of its embeddings."""
        filling_IS = torch.arange(embedded_ISD.shape[1], device=embedded_ISD.device)[None] >= lengths_I[:, None]
        states_ISD = self.layer(embedded_ISD / self.scale + self.places_SD[: embedded_ISD.shape[1]], src_key_padding_mask=filling_IS)
        queries_IKD = self.queries_KD.expand(len(lengths_I), -1, -1)
        pooled_IKD = self.attend(queries_IKD, states_ISD, states_ISD, key_padding_mask=filling_IS, need_weights=False)[0]
        mean_ID = embedded_ISD.masked_fill(filling_IS[..., None], 0.0).sum(1) / lengths_I[:, None]
        return mean_ID[:, None] + self.scale * self.out(pooled_IKD)


def item_vectors(compressor: Compressor, model: Any, items: Items, numbers: torch.Tensor) -> torch.Tensor:
    """vectors_IKD of some items."""
    embedded_ISD = model.get_input_embeddings()(items.readings_IS[numbers].to(compressor.device))
    return compressor(embedded_ISD, items.lengths_I[numbers].to(compressor.device)).float()


def answer_logprobs(model: Any, compressor: Compressor | None, items: Items, batch: Sequence[Text], *, short: bool) -> torch.Tensor:
    """logp_RV: the frozen model's distributions along the answers, reading full prompts, or short ones with the items' vectors.

    Without a compressor the items of short prompts are left out.
    """
    table_VD = model.get_input_embeddings().weight
    k = compressor.k if compressor is not None else 0
    numbers = sorted({-n - 1 for text in batch for n in text.short if n < 0}) if short else []
    local = {number: place for place, number in enumerate(numbers)}
    if k and numbers:
        vectors_ND = item_vectors(compressor, model, items, torch.tensor(numbers)).reshape(-1, table_VD.shape[1])  # type: ignore[arg-type]
        table_VD = torch.cat([table_VD, vectors_ND])
    first = model.get_input_embeddings().weight.shape[0]
    rows = []
    for text in batch:
        row: list[int] = []
        for n in text.short if short else text.ids:
            row += [n] if n >= 0 else range(first + local[-n - 1] * k, first + (local[-n - 1] + 1) * k)
        rows.append(row)
    ids_BT, lengths_B = right_padded(rows, 0)
    # Plain indexing adds gradients of equal ids in any order, so that no rerun would repeat.
    embedded_BTD = torch.nn.functional.embedding(ids_BT.to(table_VD.device), table_VD)
    hidden_BTD = hidden_states(model, inputs_embeds=embedded_BTD, use_cache=False).last_hidden_state
    parts = [hidden_BTD[b, int(lengths_B[b]) - text.learned - 1 : int(lengths_B[b]) - 1] for b, text in enumerate(batch)]
    return torch.log_softmax(model.get_output_embeddings()(torch.cat(parts)).float(), dim=-1)


def keeps_behaviour(model: Any, items: Items, accumulation: int) -> Any:
    """The loss: mean KL(full prompt || vectors) over the answers' tokens; one of `accumulation` shares of a step."""

    def loss_fn(compressor: Compressor, batch: Sequence[Text]) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        with torch.no_grad():
            full_RV = answer_logprobs(model, None, items, batch, short=False)
        short_RV = answer_logprobs(model, compressor, items, batch, short=True)
        return kl(full_RV, short_RV).mean() / accumulation, {}

    return loss_fn


def kl(full_RV: torch.Tensor, short_RV: torch.Tensor) -> torch.Tensor:
    """KL(full || short) of each token, (R,)."""
    return (full_RV.exp() * (full_RV - short_RV)).sum(-1)


# -- what it is worth -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(
    model: Any, compressor: Compressor | None, tokenizer: Any, items: Items, held_out: Sequence[Text], batch: int = 16
) -> dict[str, float]:
    """What compressed prompts are worth on held-out requests, and the KL of what they make the model answer."""
    kls: list[float] = []
    tokens, orders = {True: 0, False: 0}, {True: list[list[str]](), False: list[list[str]]()}
    k, labels_Y = compressor.k if compressor is not None else 0, torch.tensor(label_ids(tokenizer))
    for start in range(0, len(held_out), batch):
        part = held_out[start : start + batch]
        with autocast(model):
            full_RV, short_RV = (answer_logprobs(model, compressor, items, part, short=short) for short in (False, True))
        kls += kl(full_RV, short_RV).tolist()
        at = 0
        for text in part:
            for short, logp_RV in ((False, full_RV), (True, short_RV)):
                orders[short].append(brief.order_of(text.task, logp_RV[at][labels_Y].tolist()))
            tokens[False] += len(text.ids) - text.learned
            tokens[True] += sum(1 if n >= 0 else k for n in text.short) - text.learned
            at += text.learned
    tasks = [text.task for text in held_out]
    return {"kl": float(np.mean(kls)), **brief.compared(tasks, orders[False], orders[True], tokens[False], tokens[True])}


@torch.inference_mode()
def write(
    folder: Path, compressor: Compressor, model: Any, items: Items, settings: Latents, base: str, template: Template, batch: int = 512
) -> None:
    """The compressor, its settings, and every item's vectors."""
    save(folder, compressor, base, template, vectors=compressor.k, text_tokens=settings.text_tokens, scale=compressor.scale)
    with pa.OSFile(str(folder / "vectors.arrow"), "wb") as sink, pa.ipc.new_file(sink, VECTORS) as writer:
        for start in range(0, len(items.ids), batch):
            numbers = torch.arange(start, min(start + batch, len(items.ids)))
            flat = item_vectors(compressor, model, items, numbers).flatten(1).cpu().tolist()
            chosen = slice(start, start + batch)
            columns = [items.ids[chosen], flat, [compressor.k] * len(flat), items.replaced[chosen]]
            writer.write_table(pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, VECTORS, strict=True)], schema=VECTORS))
