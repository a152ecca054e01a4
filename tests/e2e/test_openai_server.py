"""vLLM's own server on a model that `save` wrote, alone, and our client of services against it."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gr2.config import Model, Traces
from gr2.errors import EngineError
from gr2.sids import sid_tokens
from scoring.engine import Ask
from scoring.model import build_model, build_vocabulary, encode, load, prompt_text, save
from scoring.openai_engine import OpenAIEngine

pytestmark = pytest.mark.e2e
SIZE = Model(hidden=64, layers=2, heads=2, kv_heads=2, mlp=128, dropout=0.0)
TEXTS = [f"<bos>put item {i} first <a_{i}><b_{i + 1}>\n" for i in range(6)]
NAME, KEY = "tiny", "sk-of-this-server"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[tuple[Path, str]]:
    """(folder of the model, URL); the server runs in an empty folder without our code."""
    home = tmp_path_factory.mktemp("served")
    tokenizer = build_vocabulary([*TEXTS, "some words to merge, some words"], 400, sid_tokens(2, 16), home / "vocabulary")
    save(build_model(SIZE, tokenizer, None, seed=3), tokenizer, home / "model")
    port = str(free_port())
    words = ["--model", str(home / "model"), "--served-model-name", NAME, "--host", "127.0.0.1", "--port", port, "--dtype", "float32"]
    words += ["--max-model-len", "256", "--enforce-eager", "--generation-config", "vllm", "--api-key", KEY]
    environment = {**os.environ, "PYTHONPATH": "", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    log = (home / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words], cwd=home, env=environment, stdout=log, stderr=log
    )
    try:
        for _ in range(400):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                    break
            except OSError:
                assert server.poll() is None, (home / "log").read_text()[-3000:]
                time.sleep(0.5)
        yield home / "model", f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)
        log.close()


def test_answers_are_those_of_the_model_itself(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, url = served
    monkeypatch.setenv("GR2_TEACHER_KEY", KEY)
    engine = OpenAIEngine(Traces(teacher="openai", model=NAME, url=url, concurrency=4, price_prompt=1.0, price_completion=2.0))
    messages = [[{"role": "system", "content": "Rank."}, {"role": "user", "content": text.removeprefix("<bos>")}] for text in TEXTS]
    asks = [Ask(str(i), "", 10, 0.0, 0, messages=tuple(said)) for i, said in enumerate(messages)]
    asks.append(Ask("long", "", 10, 0.0, 0, messages=({"role": "user", "content": "words " * 400},)))
    *answers, long = engine.generate(asks)
    engine.close()
    assert "256" in long.error, "what does not fit is an error of its own"
    model, tokenizer = load(folder)
    for said, answer in zip(messages, answers, strict=True):
        ids = encode(tokenizer, prompt_text(tokenizer, said))
        with torch.inference_mode():
            made = model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False, attention_mask=torch.ones(1, len(ids)))
        expected = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True, spaces_between_special_tokens=False)
        assert not answer.error
        assert answer.text == expected
        assert (answer.prompt_tokens, answer.cost > 0) == (len(ids), True)


def test_the_key_is_needed_and_never_told(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GR2_TEACHER_KEY", "sk-wrong-0123456789")
    engine = OpenAIEngine(Traces(teacher="openai", model=NAME, url=served[1]))
    with pytest.raises(EngineError, match="refuses") as told:
        engine.generate([Ask("1", "some words", 4, 0.0, 0)])
    assert "sk-wrong-0123456789" not in str(told.value)
