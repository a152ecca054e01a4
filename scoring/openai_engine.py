"""Any OpenAI-compatible service as an engine: chat completions, a bounded number at a time, each with its own timeout and retries.

The key comes from the environment (GR2_TEACHER_KEY) and stays in a SecretStr: no log, table or error holds it. A request that times out, is
refused or brings nonsense becomes an `Answer` with an `error`; a service that refuses the key or does not know the model raises.
"""

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import SecretStr

from gr2.config import Traces
from gr2.errors import ConfigError, EngineError
from gr2.prompts import THINK, format_thought
from scoring.engine import Answer, Ask, failed

KEY = "GR2_TEACHER_KEY"
PER_MILLION = 1e6


class OpenAIEngine:
    """A service at `settings.url`. Raises ConfigError for a URL that is not http(s) or a missing model name."""

    def __init__(self, settings: Traces, key: SecretStr | None = None) -> None:
        from openai import DefaultHttpxClient, OpenAI

        if urlsplit(settings.url).scheme not in ("http", "https") or not urlsplit(settings.url).hostname:
            raise ConfigError(f"traces.url {settings.url!r}: write the service's base URL, such as http://localhost:8000/v1")
        if urlsplit(settings.url).username:
            raise ConfigError(f"traces.url holds credentials: put the key into the variable {KEY}")
        if not settings.model:
            raise ConfigError("traces.model: name the service's model")
        self._key = key or SecretStr(os.environ.get(KEY, ""))
        self._settings = settings
        secret = self._key.get_secret_value() or "none"  # local services take any
        self._lock, self._next = threading.Lock(), 0.0
        self._client = OpenAI(
            base_url=settings.url,
            api_key=secret,
            timeout=settings.timeout_seconds,
            max_retries=settings.retries,
            http_client=DefaultHttpxClient(event_hooks={"request": [self._wait]}),
        )

    def generate(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer an ask, `traces.concurrency` at a time. Retries wait longer each time, with jitter, or as long as the service says in
        Retry-After (up to a minute), at most `traces.retries` times. They too count for `traces.requests_per_minute`.

        Raises EngineError where the service refuses the key or does not know the model: every other request would fail too.
        """
        with ThreadPoolExecutor(max_workers=self._settings.concurrency) as pool:
            return list(pool.map(self._one, asks))

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float32]:
        """A chat service gives no probability of chosen tokens: raises EngineError."""
        raise EngineError("a chat service gives no log-probabilities of labels: serve the model with vllm")

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _wait(self, _: Any) -> None:
        """Lets requests go out evenly, `traces.requests_per_minute` of them."""
        if rate := self._settings.requests_per_minute:
            with self._lock:
                turn = self._next = max(self._next + 60 / rate, time.monotonic())
            time.sleep(max(0.0, turn - time.monotonic()))

    def _one(self, ask: Ask) -> Answer:
        from openai import APIError, AuthenticationError, NotFoundError, OpenAIError, PermissionDeniedError

        started = time.monotonic()
        messages: Any = [dict(m) for m in ask.messages] or [{"role": "user", "content": ask.prompt}]
        if not any(str(m.get("content", "")).strip() for m in messages):
            return failed(ask, "the prompt is empty")
        try:
            reply = self._client.chat.completions.create(
                model=self._settings.model,
                messages=messages,
                max_tokens=ask.max_tokens,
                temperature=ask.temperature,
                top_p=1.0,  # else a server may take what the model's folder says
                seed=ask.seed,
            )
            return self._answer(ask, reply, time.monotonic() - started)
        except (AuthenticationError, PermissionDeniedError, NotFoundError) as error:
            raise EngineError(self._safe(f"the teacher service refuses: {error}; check traces.model, traces.url and {KEY}")) from None
        except (APIError, OpenAIError, ValueError, TypeError, AttributeError) as error:
            return failed(ask, self._safe(f"{type(error).__name__}: {error}"), time.monotonic() - started)

    def _answer(self, ask: Ask, reply: Any, seconds: float) -> Answer:
        """Reads a reply without trusting its form. Raises ValueError for nonsense."""
        choices: Any = getattr(reply, "choices", None)
        message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
        content = getattr(message, "content", None)
        if not isinstance(content, str):
            raise ValueError("the reply holds no text")
        usage = getattr(reply, "usage", None)
        read, written = (_count(getattr(usage, name, 0)) for name in ("prompt_tokens", "completion_tokens"))
        price = read * self._settings.price_prompt + written * self._settings.price_completion
        return Answer(
            key=ask.key,
            text=_with_reasoning(message, content),
            prompt_tokens=read,
            completion_tokens=written,
            seconds=seconds,
            cost=price / PER_MILLION,
        )

    def _safe(self, text: str) -> str:
        """An error's text without the key, should a service repeat it."""
        secret = self._key.get_secret_value()
        return text.replace(secret, "***") if secret else text


def _with_reasoning(message: Any, content: str) -> str:
    """Services that split the thought off put it back into its tags, so that every engine's text has one form."""
    thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if not isinstance(thought, str) or content.lstrip().startswith(THINK):
        return content
    return format_thought(thought.strip()) + content


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
