"""Traces end to end: what is sampled, when it stops, what is refused and why; reruns; a service as teacher."""

import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prompt_world import settle

import schemas
from gr2.answers import parse
from gr2.config import Config
from gr2.context import Context
from gr2.errors import ConfigError, EngineError, MissingInputError
from gr2.prompts import format_answer, format_thought
from scoring.engine import Answer
from spark_jobs import reasoning_traces, sft_examples
from spark_jobs.prompting import views
from spark_jobs.reasoning_traces import chosen, judge, most_relevant, rank_of, teacher

pytestmark = pytest.mark.spark


def same(one: list[dict], other: list[dict]) -> bool:
    """Equal content in the columns that a rerun leaves equal."""
    stable = schemas.get("reasoning_traces").stable()
    return [{k: r[k] for k in stable} for r in one] == [{k: r[k] for k in stable} for r in other]


def test_samples_stop_verdicts_and_reruns(make_ctx):
    ctx = settle(make_ctx(["traces.accepted_per_request=2", "traces.max_attempts=5", "traces.no_target_requests=6"]))
    cfg = ctx.cfg
    result = reasoning_traces.run(cfg, ctx)
    rows = ctx.lake.read("reasoning_traces", order_by=["sample_id"]).to_pylist()
    assert result.rows_out == len(rows) > 150
    assert {r["teacher"] for r in rows} == {result.detail["teacher"]}
    assert result.detail["teacher"].startswith("evidence:5+trees:3@"), "a program says that it is one"
    requests = {r["request_id"]: r for r in ctx.lake.read("candidates", split="rerank").to_pylist()}
    drawn = defaultdict(list)
    for row in sorted(rows, key=lambda r: r["attempt"]):
        request = requests[row["request_id"]]
        drawn[row["mode"], row["request_id"]].append(row)
        assert row["incoming_rank"] == request["target_rank"]
        order = [row["labels"].index(label) for label in parse(row["text"], row["labels"], "think").order]
        assert [request["candidate_ids"][place] for place in order] == row["answer"]
        if row["target_rank"]:
            assert row["answer"][row["target_rank"] - 1] == request["target_id"]
            assert (row["verdict"], row["reason"]) == (
                ("accepted", "") if row["target_rank"] == 1 else ("refused", f"rank_{row['target_rank']}")
            )
        else:
            assert (row["verdict"], request["target_rank"]) == ("no_target", None)
        assert 0 < row["completion_tokens"] < row["prompt_tokens"]
    for (mode, _), samples in drawn.items():
        verdicts = [s["verdict"] for s in samples]
        assert [s["attempt"] for s in samples] == list(range(1, len(samples) + 1))
        assert len({tuple(s["labels"]) for s in samples}) == len({tuple(s["shown"]) for s in samples}) == len(samples), (
            "each attempt is shuffled anew"
        )
        if mode == "targeted" or verdicts[0] == "no_target":
            assert len(samples) == 1
        else:
            assert verdicts.count("accepted") == 2 or len(samples) == 5
            assert verdicts[-1] == "accepted" or len(samples) == 5
    assert sum(r["verdict"] == "no_target" for r in rows) == 6
    told = [r["verdict"] == "accepted" for r in rows if r["mode"] == "targeted"]
    assert sum(told) > 0.9 * len(told)
    _figures(ctx, drawn)
    version = ctx.lake.version("reasoning_traces")
    again = reasoning_traces.run(cfg, ctx)
    assert (again.rows_out, ctx.lake.version("reasoning_traces")) == (0, version), "a rerun adds nothing"
    assert same(ctx.lake.read("reasoning_traces", order_by=["sample_id"]).to_pylist(), rows)
    with pytest.raises(MissingInputError, match="tokenizer"):
        settle_without_tokenizer(ctx, cfg)


def settle_without_tokenizer(ctx: Context, cfg: Config) -> None:
    """What a run says where the vocabulary is gone."""
    (ctx.root / "models" / "tokenizer" / "current.json").unlink()
    list(views(ctx, cfg, "rerank"))


def _figures(ctx: Context, drawn: dict) -> None:
    """The figures left for the audit table say what the samples say."""
    found = {f["subject"]: f for f in json.loads((ctx.work("audits") / "reasoning_traces.json").read_text())}
    assert set(next(iter(found.values()))) == {"audit", "subject", "value", "low", "high", "passed", "detail"}
    ever = {k[1]: any(s["verdict"] == "accepted" for s in v) for k, v in drawn.items() if k[0] == "rejection" and v[0]["incoming_rank"]}
    accepted = found["rejection: requests accepted"]["value"]
    assert accepted == pytest.approx(sum(ever.values()) / len(ever))
    assert accepted > found["rejection: accepted by chance"]["value"] + 0.2, "the program must know more than chance"
    assert found["rejection: accepted at the first attempt"]["value"] > 0.3
    assert 0 <= found["told and untold samples told apart"]["value"] <= 1
    assert found["rejection: tokens per accepted"]["value"] > found["targeted: tokens per accepted"]["value"] * 0.8
    assert found["rejection: leaks"]["value"] == 0.0


class Service(BaseHTTPRequestHandler):
    """A teacher that puts the best pair first, and by the seed answers well, with a leak, with nonsense, or not at all."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        best = prompt.partition("pairTop @")[2][:1]
        labels = sorted((line[-1] for line in prompt.splitlines() if re.match("<a_.*@.$", line)), key=lambda label: label != best)
        kind = body["seed"] % 4
        thought = "The answer is clear." if kind == 1 else "need nextBest. compare."
        text = "I cannot." if kind == 2 else format_thought(thought) + format_answer(labels)
        usage = {"prompt_tokens": 200, "completion_tokens": 30, "total_tokens": 230}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": usage, "choices": [choice]}
        data = json.dumps(reply).encode()
        self.send_response(401 if self.path.startswith("/closed") else 500 if kind == 3 else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def service() -> Iterator[str]:
    """The teacher's URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service_as_teacher_keeps_its_failures_as_rows(make_ctx, service, monkeypatch):
    monkeypatch.setenv("GR2_TEACHER_KEY", "sk-not-for-tables")
    settings = [f"traces.url={service}", "traces.model=m", "traces.teacher=openai", "traces.retries=0", "traces.mode=rejection"]
    ctx = settle(
        make_ctx([*settings, "traces.max_requests=12", "traces.no_target_requests=3", "traces.max_attempts=3", "traces.price_prompt=1000"])
    )
    result = reasoning_traces.run(ctx.cfg, ctx)
    rows = ctx.lake.read("reasoning_traces", order_by=["sample_id"]).to_pylist()
    assert {r["teacher"] for r in rows} == {result.detail["teacher"]}
    assert result.detail["teacher"].startswith("openai:m@")
    verdicts = {1: {"refused"}, 2: {"refused"}, 3: {"failed"}, 0: {"accepted", "refused", "no_target"}}
    for row in rows:
        kind = row["seed"] % 4
        assert row["verdict"] in verdicts[kind]
        assert kind != 1 or row["reason"] == "leak:correct_answer"
        assert kind != 2 or (row["reason"], row["answer"]) == ("missing_thought", None)
        assert kind != 3 or "Error" in row["reason"]
        assert row["cost"] == (0.0 if kind == 3 else pytest.approx(0.2))
    assert {r["seed"] % 4 for r in rows} == {0, 1, 2, 3}
    said = [json.dumps(ctx.lake.read(name).to_pylist(), default=str) for name in schemas.NAMES if ctx.lake.exists(name)]
    said += [path.read_bytes().decode(errors="ignore") for path in ctx.root.rglob("*") if path.is_file()]
    assert len(said) > 20, "tables, their logs, manifests, the run's log"
    assert not [text for text in said if "sk-not-for-tables" in text]
    assert any(r["verdict"] == "accepted" for r in rows)
    assert sft_examples.run(ctx.cfg, ctx).rows_out > 0, "its traces become examples like a program's"


def test_a_service_that_refuses_everybody_ends_the_stage_and_publishes_nothing(make_ctx, service):
    settings = [f"traces.url={service.replace('/v1', '/closed')}", "traces.model=m", "traces.teacher=openai", "traces.retries=0"]
    ctx = settle(make_ctx([*settings, "traces.max_requests=2"]))
    with pytest.raises(EngineError, match="GR2_TEACHER_KEY"):
        reasoning_traces.run(ctx.cfg, ctx)
    assert not ctx.lake.exists("reasoning_traces")
    silent = make_ctx(["traces.url=http://127.0.0.1:1/v1", *settings[1:], "traces.max_requests=2"])
    with pytest.raises(EngineError, match="failed on every request"):
        reasoning_traces.run(silent.cfg, silent)


def test_the_teachers_name_follows_what_decides_its_draws(make_ctx, monkeypatch):
    ctx = settle(make_ctx())
    base = teacher(ctx.cfg, ctx).name
    assert base == teacher(ctx.cfg, ctx).name
    for change in ("traces.temperature=0.2", "seed=99", "prompt.history_items=2", "traces.template=rerank_llm_v1", "traces.accept_rank=2"):
        assert teacher(make_ctx([change]).cfg, ctx).name != base
    for change in ("traces.max_attempts=2", "traces.accepted_per_request=3", "rl.group=4"):
        assert teacher(make_ctx([change]).cfg, ctx).name == base
    with monkeypatch.context() as patched:
        patched.setattr(reasoning_traces, "DIGEST", "other patterns of leaks")
        assert teacher(ctx.cfg, ctx).name != base
    with pytest.raises(ConfigError, match=r"traces\.model"):
        teacher(make_ctx(["traces.teacher=vllm"]).cfg, ctx)
    held = set(chosen(make_ctx(["traces.max_requests=10", "traces.no_target_requests=4"]).cfg, ctx))
    relevant = {r["request_id"] for r in ctx.lake.read("candidates", split="rerank").to_pylist() if any(r["grades"])}
    assert (len(held & relevant), len(held - relevant)) == (10, 4)


def test_judging(ctx):
    settle(ctx)
    row, view = next((r, v) for r, v in views(ctx, ctx.cfg, "rerank") if r["target_rank"])
    grades, target = row["grades"], most_relevant(row["candidate_ids"], row["grades"])
    best = [view.label_of(target), *(label for label in view.labels if label != view.label_of(target))]

    def verdict(text: str = "", accept: int = 1, error: str = "", of: list[int] = grades) -> tuple[str, str]:
        return judge(Answer("k", text, error=error), view, of, accept)[:2]

    assert verdict(format_thought("x") + format_answer(best)) == ("accepted", "")
    second = [best[1], best[0], *best[2:]]
    assert verdict(format_thought("x") + format_answer(second)) == ("refused", "rank_2")
    assert verdict(format_thought("x") + format_answer(second), accept=2) == ("accepted", "")
    assert verdict(format_thought("the target is @A") + format_answer(best)) == ("refused", "leak:target_named")
    assert verdict(format_answer(best)) == ("refused", "missing_thought")
    assert verdict(format_thought("x") + format_answer(best[:-1])) == ("refused", "missing_label")
    assert verdict("", error="TimeoutError: too slow") == ("failed", "TimeoutError: too slow")
    assert verdict(format_thought("x") + format_answer(best), of=[0] * len(grades)) == ("no_target", "")
    graded = {"a": 0, "b": 1, "c": 2}
    assert (rank_of(["a", "b", "c"], graded), rank_of(["c", "a", "b"], graded), rank_of(["a"], {"a": 0})) == (3, 1, None)
    assert most_relevant(["a", "b", "c"], [0, 1, 2]) == "c"
    assert most_relevant(["a", "b"], [0, 0]) is None
