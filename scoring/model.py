"""Language models and their vocabularies: build from scratch or grow a Hugging Face base, save, load, score labels.

    tokenizer = build_vocabulary(texts, 1536, sid_tokens(4, 256), folder)
    model = build_model(cfg.models.student, tokenizer, codebooks_LKD, seed=13)
    save(model, tokenizer, folder);  model, tokenizer = load(folder)

Both kinds go through the same code: a model is a causal LM with a body (`model.base_model`) and a head, a tokenizer has a chat
template, labels that are one token each, and one token for each part of a semantic ID. Only safetensors are read.

Shapes: B texts or rows, T tokens, D hidden size, V vocabulary, L levels, K codes of a level, Y labels.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gr2.config import Model
from gr2.errors import ModelError
from gr2.prompts import ANSWER_OPEN, ANSWER_SEPARATOR, END_THINK, GRADED, LABELS, THINK
from gr2.sids import LETTERS
from scoring import own_vectors

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
MAX_POSITIONS = 2048  # of a model built from scratch
REFUSED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".npy", ".joblib", ".msgpack", ".h5")
# The end of a prompt needs no mark of its own: every completion starts with <think>.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
)
# Pieces that no merge crosses: labels with their grade (` @C6`), words with the space before them, numbers of up to three digits, runs of
# other signs. Elsewhere a label stands between signs (` @C`, `["C","A"]`), so it is always a piece, and a token, of its own.
_PIECES = r" @[A-Z][0-9](?![\p{L}\p{N}])| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SID = re.compile(r"<([a-j])_([0-9]+)>")


# -- vocabulary -------------------------------------------------------------------------------------------------------


def build_vocabulary(texts: Iterable[str], size: int, sid_tokens: list[str], folder: Path) -> Any:
    """Trains a byte-level BPE of `size` tokens, adds the SID tokens, saves to `folder` and returns the tokenizer.

    `texts` should hold the profile's item texts and rendered prompts, so that their words and numbers become single tokens. No text is
    unknown to it (bytes). <think> and </think> stay in decoded text; <pad>, <bos>, <eos> do not. Raises ModelError where a label is not one
    token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[PAD, BOS, EOS], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator((_SID.sub("", text) for text in texts), trainer)
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in (THINK, END_THINK, *sid_tokens)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    label_ids(tokenizer)  # or raises
    tokenizer.save_pretrained(folder)
    return tokenizer


def grow_vocabulary(base: str, sid_tokens: list[str]) -> Any:
    """The tokenizer of a Hugging Face model with the SID tokens (and the thought's tags) added. Raises ModelError."""
    tokenizer = load_tokenizer(base)
    missing = [token for token in (THINK, END_THINK, *sid_tokens) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        raise ModelError(f"{base} has no chat template: take an instruction-tuned base")
    label_ids(tokenizer)  # or raises
    return tokenizer


def sid_ids(tokenizer: Any) -> NDArray[np.int64]:
    """(L, K) token ids of the semantic-ID tokens. Raises ModelError where they are not one full table."""
    found = {(LETTERS.index(m[1]), int(m[2])): i for token, i in tokenizer.get_vocab().items() if (m := _SID.fullmatch(token))}
    if not found:
        raise ModelError("the vocabulary has no semantic-ID tokens: build or grow it with `sid_tokens` first")
    levels, codes = (max(place) + 1 for place in zip(*found, strict=True))
    if len(found) != levels * codes:
        raise ModelError(f"the vocabulary has {len(found)} semantic-ID tokens, not {levels} levels of {codes} codes")
    return np.array([[found[level, code] for code in range(codes)] for level in range(levels)], dtype=np.int64)


def item_tokens(sid_ids_LK: NDArray[np.int64], codes_NL: NDArray[np.integer]) -> NDArray[np.int64]:
    """tokens_NL: the token of each code of each item."""
    return sid_ids_LK[np.arange(len(sid_ids_LK)), codes_NL]


def label_ids(tokenizer: Any, labels: Sequence[str] = LABELS) -> list[int]:
    """Token of each label, as it stands after the opening of an answer. Raises ModelError where it is not one token everywhere."""
    ids = []
    for label in labels:
        own = encode(tokenizer, label)
        for before in (ANSWER_OPEN, f"{ANSWER_OPEN}B{ANSWER_SEPARATOR}", " @"):
            if len(own) != 1 or encode(tokenizer, before + label) != encode(tokenizer, before) + own:
                raise ModelError(f"label {label!r} is not a token of its own after {before!r}: this vocabulary cannot rank labels")
        ids.append(own[0])
    if len(set(ids)) != len(ids):
        raise ModelError("two labels share a token")
    return ids


def graded_ids(tokenizer: Any) -> dict[int, tuple[int, int]]:
    """Tokens that are a label with its grade (` @C6`, `gr2.prompts.GRADED`), each with the tokens of label and digit."""
    texts = [(text, *parts) for text, parts in GRADED.items()]
    whole, labels, grades = (encode_all(tokenizer, own) for own in zip(*texts, strict=True))
    return {w[0]: (a[0], b[0]) for w, a, b in zip(whole, labels, grades, strict=True) if len(w) == len(a) == len(b) == 1}


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as it stands: nothing is put before or after it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of many texts at once."""
    return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []


def prompt_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Chat messages as the text that the model goes on from."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


# -- models -----------------------------------------------------------------------------------------------------------


def build_model(settings: Model, tokenizer: Any, sid_vectors: NDArray[np.floating] | None, seed: int) -> Any:
    """A Qwen3 from scratch, or with `settings.base` that model with its vocabulary grown to the tokenizer's (METHOD 3).

    `sid_vectors`: codebook vectors, (L, K, D) or (L*K, D) in the order of `gr2.sids.sid_tokens`; the SID tokens' rows start as a seeded
    projection of them, so that like codes start alike. Without them, rows of a grown model start at the mean row. Qwen3 itself knows only
    attention dropout; `settings.dropout` is instead applied to what each block adds (`add_dropout`).
    """
    if settings.base:
        model = _pretrained(settings.base)
        known = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > known:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            for table_VD in token_tables(model):
                table_VD[known:] = table_VD[:known].mean(dim=0)
    else:
        model = _from_scratch(settings, tokenizer, seed)
    model.generation_config = _generation_config(tokenizer)
    if sid_vectors is not None:
        _place_sids(model, tokenizer, np.asarray(sid_vectors, dtype=np.float32), seed)
    add_dropout(model, settings.dropout)
    return model


def _from_scratch(settings: Model, tokenizer: Any, seed: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if settings.hidden % settings.heads or settings.heads % settings.kv_heads:
        raise ModelError(f"hidden {settings.hidden} must be a multiple of heads {settings.heads}, and that of kv_heads {settings.kv_heads}")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def token_tables(model: Any) -> list[torch.Tensor]:
    """Rows of the input embeddings, and of the head where it is not tied to them, without gradient."""
    tables = [model.get_input_embeddings().weight.data]
    head = model.get_output_embeddings().weight.data
    return tables if head.data_ptr() == tables[0].data_ptr() else [*tables, head]


def _place_sids(model: Any, tokenizer: Any, vectors: NDArray[np.float32], seed: int) -> None:
    """Sets the rows of the SID tokens to a random projection of the codebook vectors, each as long as a usual row."""
    ids = torch.from_numpy(sid_ids(tokenizer).reshape(-1))
    vectors_SD = torch.from_numpy(vectors.reshape(-1, vectors.shape[-1]))
    if len(vectors_SD) != len(ids):
        raise ModelError(f"{len(vectors_SD)} codebook vectors for {len(ids)} semantic-ID tokens")
    for table_VD in token_tables(model):
        generator = torch.Generator().manual_seed(seed)
        others_VD = table_VD[: int(ids.min())] if int(ids.min()) else table_VD
        rows_SD = vectors_SD @ torch.randn(vectors_SD.shape[1], table_VD.shape[1], generator=generator)
        length = others_VD.float().norm(dim=1).median()
        table_VD[ids] = (torch.nn.functional.normalize(rows_SD, dim=1) * length).to(table_VD.dtype)


def add_dropout(model: Any, share: float) -> None:
    """Drops values of the embeddings and of what each block adds, while training. Adds no parameter, so exports stay plain."""
    if share <= 0:
        return

    def drop(module: torch.nn.Module, _: Any, output_BTD: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output_BTD, share, training=module.training)

    model.get_input_embeddings().register_forward_hook(drop)
    for name, module in model.named_modules():
        if name.endswith((".o_proj", ".down_proj")):
            module.register_forward_hook(drop)


def hidden_states(model: Any, **inputs: Any) -> Any:
    """The body's output (`last_hidden_state`, `past_key_values`), without the head, whose logits are costly and mostly not needed."""
    return model.base_model(**inputs)


def autocast(model: Any, bf16: bool = True) -> AbstractContextManager[Any]:
    """bf16 matrix products around a model whose weights stay as they are, where the machine has units for them."""
    kind = model.device.type
    return torch.autocast(kind, dtype=torch.bfloat16) if bf16 and multiplies_bf16(kind) else nullcontext()


@cache
def multiplies_bf16(kind: str) -> bool:
    """Whether devices of a kind have units for products in bf16: on processors AVX512-BF16, AMX, or ARM's bf16.

    With them bf16 is about four times as fast as fp32; a processor without them emulates it, forty times slower (docs/log.md).
    """
    if kind != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


# -- files ------------------------------------------------------------------------------------------------------------


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a Hugging Face folder (safetensors) that loads without our code; its generation config holds no sampling default."""
    model.generation_config = _generation_config(tokenizer)
    own_vectors.detach(model, folder)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def load(path: Path | str, dropout: float = 0.0) -> tuple[Any, Any]:
    """Model (eval mode) and tokenizer of a folder, or of a Hugging Face id. Trainers give `dropout`.

    Raises ModelError for a folder with pickled weights or code, without safetensors, or with a vocabulary that is not the model's.
    """
    tokenizer = checked(path)
    model = _pretrained(str(path))
    model.generation_config = _generation_config(tokenizer)
    add_dropout(model, dropout)
    return model.eval(), tokenizer


def checked(path: Path | str) -> Any:
    """The tokenizer of a model that may be loaded, by whatever engine. Raises ModelError as `load` does."""
    from transformers import AutoConfig

    if Path(path).is_dir():  # else a Hugging Face id: `use_safetensors` holds there too
        _check_folder(Path(path))
    tokenizer = load_tokenizer(path)
    try:
        rows = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config().vocab_size
    except (OSError, ValueError) as error:
        raise ModelError(f"no model can be loaded from {path}: {error}") from None
    if (top := max(tokenizer.get_vocab().values(), default=-1)) >= rows:
        raise ModelError(
            f"{path}: the vocabulary has token {top}, the model only {rows} rows: tokenizer and model do not belong together; "
            "publish both from one training"
        )
    return tokenizer


def check_items(tokenizer: Any, sids: Iterable[str], path: Path | str) -> None:
    """Raises ModelError where a part of an item's semantic ID is no token of a model's vocabulary: it would be read in pieces."""
    known = tokenizer.get_vocab()
    if missing := sorted({m[0] for sid in sids for m in _SID.finditer(sid)} - known.keys()):
        raise ModelError(
            f"{path}: the vocabulary lacks {len(missing)} semantic-ID tokens of our items, such as {missing[0]}: the model is of another "
            "tokenizer; run `gr2 stage midtrain` and what follows it again"
        )


def _check_folder(folder: Path) -> None:
    refused = sorted(p.name for p in folder.rglob("*") if p.suffix in REFUSED)
    if refused:
        raise ModelError(
            f"{folder} holds files of a refused type ({', '.join(refused)}): only safetensors and JSON are loaded; remove them"
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no .safetensors weights: save the model with `safe_serialization=True`")


def _pretrained(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"no causal language model can be loaded from {path}: {error}") from None


def load_tokenizer(path: Path | str) -> Any:
    """The vocabulary alone, for stages that render prompts and run no model. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer can be loaded from {path}: {error}") from None


def _generation_config(tokenizer: Any) -> Any:
    from transformers import GenerationConfig

    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GenerationConfig(**ids)


# -- scoring labels ---------------------------------------------------------------------------------------------------


def right_padded(ids: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids_BT, lengths_B)`: rows filled at the right. Causal attention then needs no mask: no real token sees the filling."""
    lengths_B = torch.tensor([len(row) for row in ids])
    ids_BT = torch.full((len(ids), int(lengths_B.max())), pad)
    for row, values in enumerate(ids):
        ids_BT[row, : len(values)] = torch.tensor(values)
    return ids_BT, lengths_B


def by_length(ids: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """Places of `ids` in batches of like length, longest first (so that memory is at its height at once)."""
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    yield from (order[start : start + batch] for start in range(0, len(order), batch))


@torch.inference_mode()
def label_logprobs(
    model: Any, tokenizer: Any, prompts: list[str], labels: list[str], batch: int = 64, bf16: bool = False
) -> NDArray[np.float32]:
    """(B, Y) log-probability of each label as the token after each prompt, from one prefill: the `score` mode (METHOD 5)."""
    wanted, ids = label_ids(tokenizer, labels), encode_all(tokenizer, prompts)
    result_BY = np.zeros((len(prompts), len(labels)), dtype=np.float32)
    model.eval()
    for places in by_length(ids, batch):
        ids_BT, lengths_B = right_padded([ids[i] for i in places], tokenizer.pad_token_id)
        with autocast(model, bf16):
            hidden_BTD = hidden_states(model, input_ids=ids_BT.to(model.device), use_cache=False).last_hidden_state
            logits_BV = model.get_output_embeddings()(hidden_BTD[torch.arange(len(places)), lengths_B - 1])
        result_BY[places] = logits_BV.float().log_softmax(dim=-1)[:, wanted].cpu().numpy()
    return result_BY
