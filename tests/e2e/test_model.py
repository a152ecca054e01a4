"""Vocabularies and models: single tokens where they must be, growth of a base, safe files, label scores."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr2.config import Model
from gr2.errors import ModelError
from gr2.prompts import LABELS, format_answer, load_template, vocabulary_texts
from gr2.sids import sid_tokens, to_text
from scoring.model import (
    BOS,
    add_dropout,
    autocast,
    build_model,
    build_vocabulary,
    check_items,
    encode,
    graded_ids,
    grow_vocabulary,
    label_ids,
    label_logprobs,
    load,
    multiplies_bf16,
    prompt_text,
    save,
    sid_ids,
)

pytestmark = pytest.mark.e2e
TINY = Model(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, dropout=0.0)
TEXTS = ["<a_1><b_2> priorTwo nextBest argan shampoo 250 @C", "pattern argan shampoo because nextBest @A", '["A","B","C"]'] * 10


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_vocabulary(TEXTS, 340, sid_tokens(3, 8), tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def saved(vocabulary: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(build_model(TINY, vocabulary, None, seed=1), vocabulary, folder)
    return folder


def test_labels_sids_words_and_numbers_are_single_tokens(vocabulary: Any) -> None:
    pieces = vocabulary.convert_ids_to_tokens(encode(vocabulary, "<a_1><b_2><c_7> priorTwo nextBest shampoo 250 @C"))
    assert pieces == ["<a_1>", "<b_2>", "<c_7>", "ĠpriorTwo", "ĠnextBest", "Ġshampoo", "Ġ250", "Ġ@", "C"]
    answer = vocabulary.convert_ids_to_tokens(encode(vocabulary, f"<think>@A</think>{format_answer(LABELS[:3])}<eos>"))
    assert answer == ["<think>", "@", "A", "</think>", '["', "A", '","', "B", '","', "C", '"]', "<eos>"]
    assert len(set(label_ids(vocabulary))) == 20
    assert graded_ids(vocabulary) == {}, "no list with grades among the texts"
    table = sid_ids(vocabulary)
    assert table.shape == (3, 8)
    assert vocabulary.convert_ids_to_tokens(table[2].tolist()) == [f"<c_{code}>" for code in range(8)]


def test_a_label_and_its_grade_are_one_token_and_leave_other_labels_alone(tmp_path: Path) -> None:
    graded = build_vocabulary(vocabulary_texts(load_template("rerank_v5"), 2), 900, [], tmp_path)
    pieces = graded.convert_ids_to_tokens(encode(graded, " popTop @C6 @A0 @Z0 @C @B1x @T12"))
    assert pieces == ["ĠpopTop", "Ġ@C6", "Ġ@A0", "Ġ@Z0", "Ġ@", "C", "Ġ@", "B", "1", "x", "Ġ@", "T", "1", "2"]
    assert len(set(label_ids(graded))) == 20


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.lists(st.integers(0, 7), min_size=3, max_size=3))
def test_any_text_comes_back(vocabulary: Any, text: str, codes: list[int]) -> None:
    whole = f"{text}{to_text(codes)}<think>{text}</think>"
    if not any(mark in text for mark in ("<pad>", "<bos>", "<eos>")):
        assert vocabulary.decode(encode(vocabulary, whole), skip_special_tokens=True) == whole


def test_training_again_gives_the_same_vocabulary(vocabulary: Any, tmp_path: Path) -> None:
    again = build_vocabulary(TEXTS, 340, sid_tokens(3, 8), tmp_path)
    assert again.get_vocab() == vocabulary.get_vocab()
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_prompt_is_messages_after_a_start_token(vocabulary: Any) -> None:
    text = prompt_text(vocabulary, [{"role": "system", "content": "rank"}, {"role": "user", "content": "items @A"}])
    assert text == f"{BOS}rank\nitems @A\n"
    assert encode(vocabulary, text)[0] == vocabulary.bos_token_id
    assert encode(vocabulary, text).count(vocabulary.bos_token_id) == 1


def test_a_vocabulary_that_merges_labels_is_refused(vocabulary: Any, tmp_path: Path) -> None:
    vocabulary.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][-1], "id": len(vocabulary), "content": '["C'})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    from transformers import AutoTokenizer

    with pytest.raises(ModelError, match="label 'C' is not a token of its own"):
        label_ids(AutoTokenizer.from_pretrained(tmp_path))


def test_model_has_the_asked_shape_and_like_codes_start_alike(vocabulary: Any) -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 8, 5))
    vectors[1, 4] = vectors[1, 3] * 2.0  # same direction: same row
    model = build_model(TINY, vocabulary, vectors, seed=1)
    rows = model.get_input_embeddings().weight.detach()
    assert rows.shape == (len(vocabulary), 32)
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    ids = sid_ids(vocabulary)
    torch.testing.assert_close(rows[ids[1, 4]], rows[ids[1, 3]])
    similar = torch.nn.functional.cosine_similarity(rows[ids.reshape(-1)][:, None], rows[ids.reshape(-1)][None], dim=-1).numpy()
    flat = vectors.reshape(-1, 5) / np.linalg.norm(vectors.reshape(-1, 5), axis=1, keepdims=True)
    assert np.corrcoef(similar.ravel(), (flat @ flat.T).ravel())[0, 1] > 0.7
    again = build_model(TINY, vocabulary, vectors, seed=1).get_input_embeddings().weight
    assert torch.equal(again, rows)
    with pytest.raises(ModelError, match="codebook vectors"):
        build_model(TINY, vocabulary, vectors[:2], seed=1)
    with pytest.raises(ModelError, match="multiple of heads"):
        build_model(TINY.model_copy(update={"heads": 3}), vocabulary, None, seed=1)


def test_a_base_is_grown_without_changing_what_it_knew(tmp_path: Path) -> None:
    plain = build_vocabulary(TEXTS, 330, [], tmp_path / "plain")
    save(build_model(TINY, plain, None, seed=1), plain, tmp_path / "base")
    grown = grow_vocabulary(str(tmp_path / "base"), sid_tokens(2, 4))
    base, _ = load(tmp_path / "base")
    model = build_model(TINY.model_copy(update={"base": str(tmp_path / "base")}), grown, None, seed=2).eval()
    assert len(grown) == len(plain) + 8
    ids = torch.tensor([encode(grown, "argan shampoo @C")])
    torch.testing.assert_close(model(ids).logits[..., : len(plain)], base(ids).logits)
    rows = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(rows[sid_ids(grown)[1, 2]], rows[: len(plain)].mean(dim=0))
    vectors = np.random.default_rng(0).normal(size=(2, 4, 6))
    placed = build_model(TINY.model_copy(update={"base": str(tmp_path / "base")}), grown, vectors, seed=2).get_input_embeddings().weight
    assert not torch.equal(placed[sid_ids(grown)], rows[sid_ids(grown)])
    save(model, grown, tmp_path / "grown")
    again, vocabulary = load(tmp_path / "grown")
    assert len(vocabulary) == len(grown)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_saved_folder_holds_no_sampling_default_and_no_pickle(saved: Path) -> None:
    assert {p.suffix for p in saved.iterdir()} <= {".json", ".safetensors", ".jinja"}
    generation = json.loads((saved / "generation_config.json").read_text())
    assert set(generation) == {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    model, _ = load(saved)
    model.generation_config.temperature = 0.3  # a default that leaked in from a base
    _, tokenizer = load(saved)
    save(model, tokenizer, saved.parent / "again")
    assert json.loads((saved.parent / "again" / "generation_config.json").read_text()) == generation


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "custom.py", "old.pkl"])
def test_pickles_and_code_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    (folder / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelError, match="refused type"):
        load(folder)
    (folder / name).unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        load(folder)


def test_a_vocabulary_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    build_vocabulary(TEXTS, 340, sid_tokens(3, 16), folder)
    with pytest.raises(ModelError, match="do not belong together"):
        load(folder)
    with pytest.raises(ModelError, match="no semantic-ID tokens"):
        sid_ids(build_vocabulary(TEXTS, 300, [], tmp_path / "none"))


def test_dropout_acts_in_training_only_and_is_not_exported(saved: Path, tmp_path: Path) -> None:
    model, tokenizer = load(saved, dropout=0.5)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    names = set(model.state_dict())
    add_dropout(model, 0.5)
    assert set(model.state_dict()) == names
    save(model, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_label_scores_are_those_of_single_full_passes(saved: Path) -> None:
    model, tokenizer = load(saved)
    prompts = ['argan @C\n<think></think>["', 'x <a_1> shampoo shampoo nextBest @A\n<think></think>["', '["']
    scores = label_logprobs(model, tokenizer, prompts, ["B", "A", "T"], batch=2)
    for row, prompt in enumerate(prompts):
        logps = model(torch.tensor([encode(tokenizer, prompt)])).logits[0, -1].log_softmax(-1)
        np.testing.assert_allclose(scores[row], logps[[*label_ids(tokenizer, ["B", "A", "T"])]].detach().numpy(), atol=1e-5)


def test_a_vocabulary_without_tokens_of_our_items_is_refused(saved: Path) -> None:
    _, tokenizer = load(saved)
    check_items(tokenizer, ["<a_1><b_2>"], saved)
    with pytest.raises(ModelError, match=r"1 semantic-ID tokens of our items, such as <a_9999>.*gr2 stage midtrain"):
        check_items(tokenizer, ["<a_1><b_2>", "<a_9999><b_2>"], saved)


@pytest.mark.parametrize(("units", "dtype"), [("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_products_are_in_bf16_only_where_the_processor_has_units_for_it(
    monkeypatch: pytest.MonkeyPatch, units: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, units: True})
    multiplies_bf16.cache_clear()
    layer = torch.nn.Linear(4, 4)
    layer.device = torch.device("cpu")  # as models of transformers have it
    with autocast(layer):
        assert layer(torch.ones(1, 4)).dtype == dtype
    monkeypatch.undo()
    multiplies_bf16.cache_clear()
