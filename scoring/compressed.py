"""Compressed contexts: the prompts of `rl` with items in learned vectors, or without words that can be spared (METHOD 9).

    base = base_of(ctx, compressor)                             # the model that reads them
    prompts = compressing(cfg, ctx, compressor)(prompts)        # latents: marks stand for items; brief: words are left out
    engine.vectors = vectors_of(ctx, compressor.id, prompts)    # the marked items' rows of the table `item_latents`

A mark is the item's id between two control characters, which `gr2.prompts.clean` keeps out of every text from outside.

Shapes: P pieces of prompts, F of them free to go, N vectors, D hidden size, V vocabulary.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gr2 import artifacts
from gr2.artifacts import Artifact
from gr2.config import Config
from gr2.context import Context
from gr2.errors import ConfigError, MissingInputError
from gr2.prompts import ANSWER_OPEN, Template, clean, load_template
from scoring.model import encode_all, load_tokenizer

_SID = re.compile(r"(?:<[a-j]_\d+>)+")
_MARK = re.compile("\x02([^\x02\x03]+)\x03")
_PIECE = re.compile(r"\s*\S+(?: @[A-Z]\b)*")  # a word, with the labels that it lists
_LABEL = re.compile(r" @[A-Z]$")  # ends a candidate's line
LINES, PLACES = 16, 32  # what a piece's line and place in it are counted up to
Known = Mapping[str, tuple[str, str]]  # semantic ID -> item, text


# -- the latent form --------------------------------------------------------------------------------------------------


def said_of(sid: str, text: str, words: int) -> str:
    """What a prompt says of an item beside its evidence: the ID, and the first words of its text where the template shows them."""
    return f"{sid} {clean(text, words)}".strip()


def marked(prompt: str, known: Known, words: int) -> str:
    """A prompt with a mark in place of all that it says of each known item."""
    parts, end = [], 0
    for match in _SID.finditer(prompt):
        if match[0] in known:
            item, text = known[match[0]]
            said = said_of(match[0], text, words)
            parts += [prompt[end : match.start()], f"\x02{item}\x03"]
            end = match.start() + len(said) if prompt.startswith(said, match.start()) else match.end()
    return "".join([*parts, prompt[end:]])


def encode_marked(tokenizer: Any, prompts: Sequence[str], rows_of: Mapping[str, Sequence[int]]) -> list[list[int]]:
    """Token ids, and for each mark the item's rows of a table of vectors: row r is written -r - 1."""
    split = [_MARK.split(prompt) for prompt in prompts]  # text, item, text, ..., text
    texts = iter(encode_all(tokenizer, [text for parts in split for text in parts[::2]]))
    found = []
    for parts in split:
        ids = next(texts)
        for item in parts[1::2]:
            ids += [*(-row - 1 for row in rows_of[item]), *next(texts)]
        found.append(ids)
    return found


def items_in(prompt: str) -> list[str]:
    """The items that a prompt marks, in order."""
    return _MARK.findall(prompt)


@dataclass(frozen=True)
class Vectors:
    """Items as an engine reads them."""

    vectors_ND: torch.Tensor
    rows_of: Mapping[str, Sequence[int]]


def vectors_of(ctx: Context, compressor: str, prompts: Iterable[str]) -> Vectors:
    """The rows of `item_latents` for what these prompts mark."""
    items = sorted({item for prompt in prompts for item in items_in(prompt)})
    table = ctx.lake.read("item_latents", ["item_id", "vectors", "k"], ["item_id"], compressor=compressor, item_id=items)
    if not table.num_rows:  # no prompt marks an item that has vectors: all are read in words
        return Vectors(torch.zeros(0, 1), {})
    k = table["k"][0].as_py()
    flat = torch.tensor(table["vectors"].to_pylist())
    rows_of = {item: range(n * k, (n + 1) * k) for n, item in enumerate(table["item_id"].to_pylist())}
    return Vectors(flat.reshape(len(rows_of) * k, -1), rows_of)


# -- the text form ----------------------------------------------------------------------------------------------------


Piece = tuple[str, tuple[int, int, int] | None]  # text; section, line and place, or nothing where it always stays


def pieces(prompt: str, template: Template) -> list[Piece]:
    """A prompt in pieces that add up to it. What stays: all before the history, titles, candidates' labels, and from the question on."""
    title = f"\n{template.history_title}\n"
    if title not in prompt:
        return [(prompt, None)]
    start = prompt.index(title) + len(title) - 1
    end = prompt.rfind(f"\n{template.closing['direct']}")
    found: list[Piece] = [(prompt[:start], None)]
    lines, section = prompt[start:end].split("\n")[1:], 0
    titles = [n for n, line in enumerate(lines) if line == template.candidates_title]
    for number, line in enumerate(lines):
        found.append(("\n", None))
        if number in titles or line.startswith(ANSWER_OPEN):
            found.append((line, None))
            continue
        of_item = bool(_SID.search(line))
        section = (0 if titles and number < titles[0] else 1) if of_item else 2
        label = _LABEL.search(line) if section == 1 else None
        last = titles[0] - 1 - number if section == 0 else 0  # of the history, from its end
        words = _PIECE.findall(line[: label.start()] if label else line)
        found += [(word, (section, min(last, LINES - 1), min(place, PLACES - 1))) for place, word in enumerate(words)]
        if label:
            found.append((label[0], None))
    return [*found, (prompt[end:], None)]


def read(tokenizer: Any, found: Sequence[Piece]) -> list[list[int]]:
    """Token ids of the pieces that may go."""
    return encode_all(tokenizer, [text for text, where in found if where])


class Shortener(torch.nn.Module):
    """Which pieces stay: a log-linear policy of a piece's tokens (their mean), its section and line, its section and place.

    It reads no context and costs next to nothing, so that shortening does not cost what it saves. It starts by keeping three of five.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens = torch.nn.EmbeddingBag(vocabulary, 1, mode="mean")
        self.lines, self.places = torch.nn.Embedding(3 * LINES, 1), torch.nn.Embedding(3 * PLACES, 1)
        for table in (self.tokens, self.lines, self.places):
            torch.nn.init.zeros_(table.weight)
        self.bias = torch.nn.Parameter(torch.tensor([0.4]))

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.bias.device

    def forward(self, found: Sequence[Piece], ids_F: Sequence[Sequence[int]]) -> torch.Tensor:
        """logits_P of keeping each piece; infinite for what always stays. `ids_F`: what `read` gives of the others."""
        free = [n for n, (_, where) in enumerate(found) if where]
        logits_P = torch.full((len(found),), torch.inf, device=self.device)
        if not free:
            return logits_P
        ids = [torch.tensor(i, device=self.device) for i in ids_F]
        starts = torch.tensor([0, *(len(i) for i in ids[:-1])], device=self.device).cumsum(0)
        where_P3 = torch.tensor([found[n][1] for n in free], device=self.device)
        own = self.tokens(torch.cat(ids), starts) + self.lines(where_P3[:, 0] * LINES + where_P3[:, 1])
        own = (own + self.places(where_P3[:, 0] * PLACES + where_P3[:, 2])).squeeze(1) + self.bias
        return logits_P.index_put((torch.tensor(free, device=self.device),), own.float())


def joined(found: Sequence[Piece], kept: Sequence[bool]) -> str:
    """The pieces that are kept, without lines that are empty now."""
    parts: list[str] = []
    for (text, _), stays in zip(found, kept, strict=True):
        if stays and text.startswith("\n") and parts and parts[-1] == "\n":
            parts.pop()
        if stays:
            parts.append(text)
    return "".join(parts)


@torch.inference_mode()
def shortened(policy: Shortener, tokenizer: Any, template: Template, prompts: Sequence[str]) -> list[str]:
    """Each prompt without what the policy would rather leave out."""
    cut = [pieces(prompt, template) for prompt in prompts]
    return [joined(found, (policy(found, read(tokenizer, found)) >= 0).tolist()) for found in cut]


# -- compressors as they are published --------------------------------------------------------------------------------


def save(folder: Path, module: torch.nn.Module, base: str, template: Template, **more: Any) -> None:
    """The weights, and what they belong to."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, folder / "compressor.safetensors")
    (folder / "compressor.json").write_text(json.dumps({"base": base, "template": template.digest, **more}, indent=1))


def said_by(compressor: Artifact) -> dict[str, Any]:
    """What `save` wrote of it."""
    return dict(json.loads((compressor.path / "compressor.json").read_text()))


def base_of(ctx: Context, compressor: Artifact) -> Artifact:
    """The model that a compressor was trained for. Raises MissingInputError where that version is gone."""
    name, _, digest = said_by(compressor)["base"].partition("@")
    return artifacts.resolve(ctx.root, name, digest)


def compressing(cfg: Config, ctx: Context, compressor: Artifact) -> Callable[[Sequence[str]], list[str]]:
    """The function that shortens prompts in the form `direct` or `score`.

    An item without a row in `item_latents`, such as a night's newest, stays said in words. Raises ConfigError for a compressor that was
    trained with another template, MissingInputError where `item_latents` has nothing of it.
    """
    template = load_template(cfg.prompt.template, cfg.prompt.evidence)
    if said_by(compressor)["template"] != template.digest:
        raise ConfigError(
            f"{compressor.id} was trained on prompts of another template than {cfg.prompt.template!r}: "
            "run `gr2 stage latents` and `gr2 stage item_latents` with this one, or leave it out of scoring.models and scoring.live"
        )
    if compressor.name == "brief":
        tokenizer = load_tokenizer(base_of(ctx, compressor).path)
        policy = _shortener(compressor.path)
        return lambda prompts: shortened(policy, tokenizer, template, prompts)
    cached = ctx.lake.read("item_latents", ["item_id"], compressor=compressor.id)["item_id"].to_pylist()
    if not cached:
        raise MissingInputError(f"item_latents holds no vectors of {compressor.id}: run `gr2 stage item_latents` first")
    known = known_items(ctx, set(cached))
    return lambda prompts: [marked(prompt, known, template.text_words) for prompt in prompts]


def known_items(ctx: Context, among: set[str] | None = None) -> dict[str, tuple[str, str]]:
    """Semantic ID -> item and text, of all items that have an ID under the current tokenizer, in order of item."""
    codes = ctx.lake.read("semantic_ids", ["item_id", "token_text"], ["item_id"], tokenizer=ctx.model("tokenizer").id)
    table = ctx.lake.read("items", ["item_id", "text"])
    text_of = dict(zip(table["item_id"].to_pylist(), table["text"].to_pylist(), strict=True))
    pairs = zip(codes["item_id"].to_pylist(), codes["token_text"].to_pylist(), strict=True)
    return {sid: (item, text_of[item]) for item, sid in pairs if item in text_of and (among is None or item in among)}


def _shortener(folder: Path) -> Shortener:
    from safetensors.torch import load_file

    state = load_file(folder / "compressor.safetensors")
    policy = Shortener(len(state["tokens.weight"]))
    policy.load_state_dict(state)
    return policy.eval()
