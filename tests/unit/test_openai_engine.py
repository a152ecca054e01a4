"""The OpenAI-compatible engine against a real HTTP server that behaves, stalls, breaks, lies and hangs up."""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import SecretStr

from gr2.config import Traces
from gr2.errors import ConfigError, EngineError
from scoring.engine import Ask
from scoring.openai_engine import OpenAIEngine

pytestmark = pytest.mark.unit
KEY = "sk-very-secret-0123456789"


class Handler(BaseHTTPRequestHandler):
    """Does what the last message says."""

    seen: Counter[str]
    running = 0
    most = 0
    bodies: list[dict[str, Any]]
    lock = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wish = body["messages"][-1]["content"]
        with self.lock:
            self.seen[wish] += 1
            Handler.running += 1
            Handler.most = max(Handler.most, Handler.running)
            self.bodies.append(body)
        try:
            self.act(wish)
        finally:
            with self.lock:
                Handler.running -= 1

    def act(self, wish: str) -> None:
        if wish == "stall":
            time.sleep(1.5)
        elif wish == "hang up":
            self.connection.close()
        elif wish == "broken" or (wish == "once broken" and self.seen[wish] == 1):
            self.reply(500, {"error": {"message": f"out of order, key {KEY}"}})
        elif wish == "busy":
            self.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})
        elif wish == "wait a second" and self.seen[wish] == 1:
            self.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "1"})
        elif wish == "who are you":
            self.reply(401, {"error": {"message": f"bad key {self.headers['Authorization']}"}})
        elif wish == "not json":
            self.send(200, b"<html>welcome</html>", "text/html", {})
        elif wish == "half json":
            self.send(200, b'{"choices": [', "application/json", {})
        elif wish == "no choices":
            self.reply(200, {"choices": []})
        elif wish == "no text":
            self.reply(200, {"choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "stop"}]})
        else:
            time.sleep(0.02)
            message = {"role": "assistant", "content": f"said {wish}"}
            if wish == "reason":
                message |= {"content": '["A"]', "reasoning_content": " because "}
            usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": usage, "choices": [choice]})

    def reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), "application/json", headers or {})

    def send(self, status: int, data: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


class Server(ThreadingHTTPServer):
    """Keeps quiet about connections that went away."""

    def handle_error(self, *_: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    """A server of this test's own."""
    Handler.seen, Handler.bodies, Handler.most = Counter(), [], 0
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def engine(url: str, **changed: Any) -> OpenAIEngine:
    """An engine of a small model."""
    given = {
        "url": url,
        "model": "m",
        "timeout_seconds": 0.5,
        "retries": 1,
        "concurrency": 4,
        "price_prompt": 1.0,
        "price_completion": 10.0,
    }
    return OpenAIEngine(Traces(**(given | changed)), SecretStr(KEY))


def ask(wish: str) -> Ask:
    """One request."""
    return Ask(wish, wish, 16, 0.7, 42)


def test_answers_in_order_with_usage_and_price(url: str) -> None:
    asks = [ask(f"q{i}") for i in range(12)] + [ask("reason")]
    answers = engine(url).generate(asks)
    assert [a.text for a in answers[:12]] == [f"said q{i}" for i in range(12)]
    assert [a.key for a in answers] == [a.key for a in asks]
    assert (answers[0].prompt_tokens, answers[0].completion_tokens) == (7, 3)
    assert answers[0].cost == pytest.approx(37e-6)
    assert answers[12].text == '<think>because</think>["A"]'
    assert 1 < Handler.most <= 4
    body = next(b for b in Handler.bodies if b["messages"][-1]["content"] == "q0")
    assert {k: body[k] for k in ("model", "max_tokens", "temperature", "top_p", "seed")} == {
        "model": "m", "max_tokens": 16, "temperature": 0.7, "top_p": 1.0, "seed": 42}  # fmt: skip


def test_chat_messages_are_sent_as_they_are(url: str) -> None:
    messages = ({"role": "system", "content": "be short"}, {"role": "user", "content": "hello"})
    assert engine(url).generate([Ask("k", "ignored", 4, 0.0, 1, messages=messages)])[0].text == "said hello"
    assert Handler.bodies[0]["messages"] == [dict(m) for m in messages]


@pytest.mark.parametrize(
    ("wish", "says", "tries"),
    [
        ("stall", "timed out", 2),
        ("hang up", "Connection", 2),
        ("broken", "out of order", 2),
        ("busy", "slow down", 2),
        ("not json", "", 1),
        ("half json", "", 1),
        ("no choices", "no text", 1),
        ("no text", "no text", 1),
    ],
)
def test_one_failure_is_one_row_after_bounded_retries(url: str, wish: str, says: str, tries: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answers = engine(url).generate([ask("before"), ask(wish), ask("after")])
    assert [bool(a.error) for a in answers] == [False, True, False]
    assert says in answers[1].error
    assert Handler.seen[wish] == tries
    assert answers[1].seconds > 0
    assert KEY not in repr(answers) + caplog.text


def test_a_retry_can_succeed(url: str) -> None:
    assert engine(url).generate([ask("once broken")])[0].text == "said once broken"
    assert Handler.seen["once broken"] == 2


def test_a_busy_service_is_asked_again_when_it_says(url: str) -> None:
    answer = engine(url, timeout_seconds=5.0).generate([ask("wait a second")])[0]
    assert (answer.text, Handler.seen["wait a second"]) == ("said wait a second", 2)
    assert 1.0 <= answer.seconds < 3.0


def test_requests_a_minute_are_kept_retries_included(url: str) -> None:
    started = time.monotonic()
    answers = engine(url, requests_per_minute=600, retries=2).generate([ask(f"q{i}") for i in range(4)] + [ask("busy")])
    assert time.monotonic() - started >= 0.6, "seven requests, a tenth of a second apart"
    assert ([bool(a.error) for a in answers], Handler.seen["busy"]) == ([False] * 4 + [True], 3)


def test_an_empty_prompt_is_not_sent(url: str) -> None:
    assert "empty" in engine(url).generate([ask(" ")])[0].error
    assert not Handler.seen


def test_a_refused_key_ends_the_engine_and_is_not_repeated(url: str) -> None:
    made = engine(url)
    with pytest.raises(EngineError, match="GR2_TEACHER_KEY") as caught:
        made.generate([ask("who are you")])
    assert KEY not in str(caught.value)
    assert "***" in str(caught.value)
    assert KEY not in repr(made) + str(vars(made).get("_settings"))


def test_no_service_there_is_a_row(url: str) -> None:
    answer = engine("http://127.0.0.1:1/v1", retries=0).generate([ask("hello")])[0]
    assert "Connection" in answer.error


@pytest.mark.parametrize("changed", [{"url": "ftp://host/v1"}, {"url": "host"}, {"url": "http://user:pw@host/v1"}, {"model": ""}])
def test_settings_that_cannot_work_are_refused(changed: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="traces"):
        OpenAIEngine(Traces(**({"url": "http://host/v1", "model": "m"} | changed)))


def test_the_key_comes_from_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GR2_TEACHER_KEY", KEY)
    made = OpenAIEngine(Traces(url=url, model="m", retries=0))
    assert made.generate([ask("hi")])[0].text == "said hi"
    with pytest.raises(EngineError) as caught:
        made.generate([ask("who are you")])
    assert "Bearer ***" in str(caught.value)
    made.close()
