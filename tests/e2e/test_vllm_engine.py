"""The engine on a tiny real model: sampling, label scores, failures one by one, and weights that follow a trainer."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gr2.answers import parse
from gr2.config import Model, Scoring
from gr2.draws import seed_of
from gr2.errors import ConfigError, ModelError
from gr2.prompts import LABELS
from gr2.sids import sid_tokens
from scoring.engine import Ask
from scoring.model import build_model, build_vocabulary, encode, label_logprobs, load, save

pytestmark = pytest.mark.e2e
SIZE = Model(hidden=64, layers=2, heads=2, kv_heads=2, mlp=128, dropout=0.0)  # vLLM on CPU needs heads of at least 32
PROMPTS = [f"<bos>put the item first <a_{i}><b_{i + 1}> next high @{LABELS[i % 20]}\n" for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose folder asks for other sampling than ours: it must not be heard."""
    home = tmp_path_factory.mktemp("tiny")
    tokenizer = build_vocabulary([*PROMPTS, "some words to merge, some words"], 400, sid_tokens(2, 16), home / "vocabulary")
    save(build_model(SIZE, tokenizer, None, seed=3), tokenizer, home / "model")
    (home / "model" / "generation_config.json").write_text(
        '{"temperature": 0.01, "top_k": 1, "repetition_penalty": 5.0, "max_new_tokens": 2}'
    )
    return home / "model"


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Any]:
    """One engine for the file: a start takes many seconds."""
    from scoring.vllm_engine import VLLMEngine

    made = VLLMEngine(folder, Scoring(kv_cache_gib=1), max_len=256)
    yield made
    made.close()


def ask(i: int, **changed: Any) -> Ask:
    """A sampled request."""
    given = {
        "key": str(i),
        "prompt": PROMPTS[i % 8],
        "max_tokens": 12,
        "temperature": 1.0,
        "seed": seed_of("test", i),
        "logprobs": True,
    } | changed
    return Ask(**given)


def exact(model: Any, prompt: list[int], completion: list[int], temperature: float = 1.0) -> np.ndarray:
    """Log-probability of each completion token by transformers."""
    with torch.inference_mode():
        logits_TV = model(input_ids=torch.tensor([prompt + completion])).logits[0].float() / temperature
    rows_TV = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows_TV[torch.arange(len(completion)), torch.tensor(completion)].numpy()


def test_samples_carry_their_own_log_probabilities_and_no_default_of_the_model(engine: Any, folder: Path) -> None:
    model, tokenizer = load(folder)
    answers = engine.generate([ask(i, temperature=t) for i, t in enumerate((1.0, 1.0, 0.5, 2.0))])
    for answer, temperature in zip(answers, (1.0, 1.0, 0.5, 2.0), strict=True):
        assert not answer.error
        assert answer.completion_tokens == len(answer.token_ids) == 12 or answer.token_ids[-1] == tokenizer.eos_token_id
        assert answer.prompt_token_ids == tuple(encode(tokenizer, PROMPTS[int(answer.key)]))
        wanted = exact(model, list(answer.prompt_token_ids), list(answer.token_ids), temperature)
        np.testing.assert_allclose(answer.logprobs, wanted, atol=2e-4)
    many = engine.generate([ask(i, prompt=PROMPTS[0], max_tokens=1) for i in range(64)])
    assert len({a.token_ids for a in many}) > 20, "top_k = 1 of the model's folder was heard"


def test_a_seed_decides_its_sample_whatever_else_is_in_the_batch(engine: Any) -> None:
    alone = engine.generate([ask(5)])[0]
    among = engine.generate([ask(i) for i in range(8)])[5]
    assert alone.token_ids == among.token_ids
    assert engine.generate([ask(5, seed=1)])[0].token_ids != alone.token_ids


def test_log_probabilities_come_only_where_asked_for(engine: Any) -> None:
    for temperature in (0.0, 1.0):
        asked, plain = (engine.generate([ask(i, temperature=temperature, logprobs=lp) for i in range(8)]) for lp in (True, False))
        assert [a.token_ids for a in asked] == [a.token_ids for a in plain]
        assert {a.logprobs for a in plain} == {()}
        assert all(len(a.logprobs) == len(a.token_ids) for a in asked)


def test_a_random_model_writes_the_form_that_is_forced(engine: Any) -> None:
    statuses = {}
    for mode, thought, prefilled in (("think", 6, ""), ("direct", 0, "<think></think>")):
        shapes: tuple[dict[str, Any], ...] = ({}, {"labels": LABELS[:3], "thought": thought})
        for name, shape in zip(("free", "forced"), shapes, strict=True):
            asks = [ask(i, prompt=PROMPTS[i % 8] + prefilled, max_tokens=thought + 15, **shape) for i in range(32)]
            statuses[mode, name] = {parse(a.text, LABELS[:3], mode).status for a in engine.generate(asks)}  # type: ignore[arg-type]
    assert statuses["think", "free"] == {"missing_thought"}
    assert "ok" not in statuses["direct", "free"]
    assert statuses["think", "forced"] == statuses["direct", "forced"] == {"ok", "repeated_label"}


def test_what_prompts_share_is_read_once(engine: Any) -> None:
    shared = "<bos>" + "<a_1><b_2>" * 40
    rows = [encode(engine.tokenizer, f"{shared} @{label}<a_3> next high") for label in LABELS[:6]]
    params = engine._params(ask(0, max_tokens=1))
    cached = [output.num_cached_tokens for output in engine._run(rows, params)]
    assert cached == [0] + [64] * 5, "81 tokens are two blocks"


@pytest.mark.parametrize(
    ("broken", "says"), [("pickle", "training_args.bin"), ("weights", r"no \.safetensors"), ("vocabulary", "do not belong together")]
)
def test_folders_that_cannot_be_served_are_refused_before_a_start(folder: Path, tmp_path: Path, broken: str, says: str) -> None:
    from scoring.vllm_engine import VLLMEngine

    shutil.copytree(folder, tmp_path / "model")
    if broken == "pickle":
        (tmp_path / "model" / "training_args.bin").write_bytes(b"\x80")
    elif broken == "weights":
        (tmp_path / "model" / "model.safetensors").unlink()
    else:
        build_vocabulary(PROMPTS, 400, sid_tokens(2, 64), tmp_path / "model")
    with pytest.raises(ModelError, match=says):
        VLLMEngine(tmp_path / "model", Scoring())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's refusal")
def test_gpu_settings_are_refused_on_a_cpu(folder: Path) -> None:
    from scoring.vllm_engine import VLLMEngine

    with pytest.raises(ConfigError, match=r"scoring\.tensor_parallel"):
        VLLMEngine(folder, Scoring(tensor_parallel=2))


def test_poisoned_prompts_fail_alone(engine: Any) -> None:
    bad = [ask(1, prompt=""), ask(2, prompt="word " * 400), ask(3, max_tokens=300), ask(4, temperature=-1.0)]
    answers = engine.generate([ask(0), *bad, ask(5)])
    assert [bool(a.error) for a in answers] == [False, True, True, True, True, False]
    assert "empty" in answers[1].error
    assert "holds 256" in answers[2].error
    assert answers[5].token_ids == engine.generate([ask(5)])[0].token_ids


def test_a_prompt_that_breaks_the_engine_fails_alone(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own, poison = engine._run, encode(engine.tokenizer, PROMPTS[3])

    def breaking(prompts: list[list[int]], params: Any) -> list[Any]:
        if poison in prompts:
            raise RuntimeError("a kernel died of this prompt")
        return own(prompts, params)

    scores, answers = engine.label_logprobs(PROMPTS, LABELS), engine.generate([ask(i) for i in range(8)])
    monkeypatch.setattr(engine, "_run", breaking)
    survivors = [i for i in range(8) if i != 3]
    broken = engine.label_logprobs(PROMPTS, LABELS)
    assert np.isnan(broken[3]).all()
    np.testing.assert_allclose(broken[survivors], scores[survivors], atol=2e-4)
    again = engine.generate([ask(i) for i in range(8)])
    assert "a kernel died" in again[3].error
    assert [again[i].token_ids for i in survivors] == [answers[i].token_ids for i in survivors]


def test_label_log_probabilities_equal_transformers(engine: Any, folder: Path) -> None:
    model, tokenizer = load(folder)
    found = engine.label_logprobs([*PROMPTS, ""], LABELS)
    np.testing.assert_allclose(found[:-1], label_logprobs(model, tokenizer, PROMPTS, list(LABELS)), atol=2e-4)
    assert np.isnan(found[-1]).all()


def test_pushed_weights_are_used_everywhere(engine: Any, folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder)
    before = engine.label_logprobs(PROMPTS, LABELS)
    for seed in (11, 12):
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.05)
        engine.push_weights(model)
        np.testing.assert_allclose(
            engine.label_logprobs(PROMPTS, LABELS), label_logprobs(model, tokenizer, PROMPTS, list(LABELS)), atol=5e-4
        )
        answer = engine.generate([ask(0)])[0]
        np.testing.assert_allclose(answer.logprobs, exact(model, list(answer.prompt_token_ids), list(answer.token_ids)), atol=5e-4)
    assert np.abs(engine.label_logprobs(PROMPTS, LABELS) - before).max() > 0.01
    engine.load_weights(folder)
    np.testing.assert_allclose(engine.label_logprobs(PROMPTS, LABELS), before, atol=5e-4)
    other = build_model(SIZE.model_copy(update={"layers": 1}), tokenizer, None, seed=1)
    save(other, tokenizer, tmp_path / "other")
    with pytest.raises(ModelError, match="architecture"):
        engine.load_weights(tmp_path / "other")
