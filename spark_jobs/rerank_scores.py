"""What each model makes of each request: one Spark job, one vLLM engine a Python worker, every model in turn (DESIGN contract 9).

Reads: `candidates`, `candidate_features`, `items`, `semantic_ids`, and those of scoring.models that exist (at least one); `item_latents`
where `latents` is among them.
Writes: `rerank_scores` (one request, model, mode and replica; key of these four), insert-only.
Scored are, without --date, the requests of scoring.splits with something relevant in the list, a seeded sample of the others
(scoring.miss_sample: no order of them can score), and a seeded sample in further replicas for the position audit; with --date the night's
lists, by the released versions of scoring.live. Unless release.gate is off, scoring.live also answers for a sample of validation lists.
A rerun is harmless: what the table holds is not asked again, though prompts or settings changed (`work/audits` says how much of it);
decoding is greedy. Answers are kept chunk by chunk, then parsed, audited, published: a run that was killed goes on where it stopped. A
request that cannot be read or answered is a row with the failure's name.

Modes: think and direct generate; score orders by the labels' log-probabilities at the first answer position, less the label's prior
(what its name alone is worth, over all lists of the experiment that the model scored: no night is scored without), summed over
scoring.shuffles of the list (permutation self-consistency, METHOD 5: all their prompts count as tokens). `latents` and `brief` in
scoring.models (modes direct and score) are what the model `rl` answers to compressed contexts (METHOD 9); their rows count the tokens of
what it read.

    gr2 stage rerank_scores --profile P [--date 2026-01-05]
"""

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql.pandas.types import from_arrow_schema

import schemas
from gr2 import artifacts
from gr2.answers import parse
from gr2.artifacts import Artifact, write_whole
from gr2.config import COMPRESSORS, Config
from gr2.context import Context, Result
from gr2.errors import EngineError, MissingInputError, ModelError
from gr2.pipeline import builder_of
from gr2.prompts import Mode, View, make_view, prompt_hash
from schemas.base import DOUBLE, FLOAT, INT, STRING, list_of
from schemas.candidates import EXPERIMENT
from scoring.compressed import base_of, compressing, vectors_of
from scoring.engine import Ask
from scoring.model import check_items, load_tokenizer
from spark_jobs.engine_pool import Rows, Spec, answered, engine_for, portable
from spark_jobs.prompting import render_texts, sample, template_of, views
from spark_jobs.publish import publish
from validation import gate
from validation.findings import finding

RENDERED = 512  # prompts rendered at once
TURN = 1000  # more than a request has replicas
ROOM = 4  # tokens beyond thought and answer: the tags and the end
UNREADABLE, ENGINE = "prompt_too_long", "engine_error"
ASKED = pa.schema(
    [
        ("request_id", STRING), ("model_id", STRING), ("model", STRING), ("mode", STRING), ("replica", INT), ("split", STRING),
        ("night", STRING), ("path", STRING), ("prompts", list_of(STRING)), ("prompt_hash", STRING), ("max_tokens", INT),
        ("candidates", list_of(STRING)), ("labels", list_of(STRING)), ("shown", list_of(INT)),
    ]
)  # fmt: skip
ANSWERED = pa.schema(
    [
        ("text", STRING),
        ("error", STRING),
        ("logprobs", list_of(FLOAT)),
        ("prompt_tokens", INT),
        ("completion_tokens", INT),
        ("seconds", DOUBLE),
    ]
)
KEY = ("request_id", "model_id", "mode", "replica")


def run(cfg: Config, ctx: Context) -> Result:
    """Scores what is not in the table yet.

    Raises MissingInputError if no configured model exists, or one has no label priors for a night, EngineError if none can be served.
    """
    models = scored_models(cfg, ctx)
    if ctx.date:
        check_priors(cfg, ctx, models)
    asked = asks(cfg, ctx, models)
    ctx.log(f"rerank_scores: {asked.num_rows} answers to come from {', '.join(m.id for m in models)}")
    if not asked.num_rows:
        if ctx.lake.exists("rerank_scores"):
            ctx.pin("tables", "rerank_scores", ctx.lake.version("rerank_scores"))
        return Result(detail={"models": [m.id for m in models]})
    with answered(ctx, "rerank_scores", asked, _answering(portable(cfg, ctx)), pa.schema([*ASKED, *ANSWERED])) as frame:
        values = frame.select("model_id", "mode", "labels", "logprobs", "prompt_tokens", "completion_tokens").toArrow()
        if values.num_rows != asked.num_rows:
            raise EngineError(
                f"the engine job gave {values.num_rows} of {asked.num_rows} answers, nothing was published: see the worker's log above"
            )
        earlier = scored_earlier(ctx, models)
        prior = label_priors(earlier) if ctx.date else label_priors(values, earlier)  # so that the order of nights does not matter
        judged = frame.mapInArrow(_judged(prior), from_arrow_schema(schemas.get("rerank_scores").arrow()))
        added = publish(ctx, "rerank_scores", judged)
    statuses = _statuses(ctx, models)
    ctx.log(f"rerank_scores: {statuses}")
    tokens = sum(sum(values[c].to_pylist()) for c in ("prompt_tokens", "completion_tokens"))
    return Result(rows_in=asked.num_rows, rows_out=added, tokens=tokens, detail={"models": [m.id for m in models], "statuses": statuses})


# -- what is asked ----------------------------------------------------------------------------------------------------


def scored_models(cfg: Config, ctx: Context) -> list[Artifact]:
    """The configured models that exist: of a night the released versions. Raises MissingInputError if there is none."""
    there = set(artifacts.names(ctx.root))
    wanted = modes_of(cfg, ctx)
    if missing := [name for name in wanted if name not in there]:
        ctx.log(f"rerank_scores: not trained, so not scored: {', '.join(missing)}")
    models = [ctx.model(name) for name in wanted if name in there]
    if not models:
        makers = " and ".join(f"`gr2 stage {stage}`" for stage in dict.fromkeys(map(builder_of, wanted)))
        raise MissingInputError(f"none of the models {', '.join(wanted)} exists under {ctx.root}: run {makers} first")
    return models


def modes_of(cfg: Config, ctx: Context) -> dict[str, tuple[Mode, ...]]:
    """Model -> modes in which it answers: those of the experiment, or of a night."""
    return dict(cfg.scoring.live if ctx.date else cfg.scoring.models)


def chosen(cfg: Config, ctx: Context, split: str) -> tuple[list[str], list[str]]:
    """(requests to score, those of them that the position audit asks again): hits and a sample of misses; a sample of all of these."""
    table = ctx.lake.read("candidates", ["request_id", "grades"], order_by=["request_id"], split=split)
    ids, grades = table["request_id"].to_pylist(), table["grades"].to_pylist()
    hits = [i for i, g in zip(ids, grades, strict=True) if any(g)]
    misses = [i for i, g in zip(ids, grades, strict=True) if not any(g)]
    some = sample(misses, cfg.scoring.miss_sample, cfg.seed, "misses") if cfg.scoring.miss_sample else []
    scored = sorted([*hits, *some])
    return scored, sample(scored, cfg.scoring.audit_requests, cfg.seed, "position")


def asks(cfg: Config, ctx: Context, models: list[Artifact]) -> pa.Table:
    """One row for each answer that the table does not hold yet (schema ASKED)."""
    nights = nights_of(ctx, models) if ctx.date else {EXPERIMENT: None}
    known, stale = _known(ctx, models, list(nights)), Counter[tuple[str, str]]()
    bases = {model.name: base_of(ctx, model) if model.name in COMPRESSORS else model for model in models}
    renderers = _renderers(cfg, ctx, models, bases)
    parts = [ASKED.empty_table()]
    modes = modes_of(cfg, ctx)
    if ctx.date:
        shown = [(views(ctx, cfg, "live", lists, night=night), modes) for night, lists in nights.items()]
    else:
        shown = [(_shown(cfg, ctx, split), modes) for split in cfg.scoring.splits]
    if not ctx.date and cfg.release.gate and "valid" not in cfg.scoring.splits:
        shown.append((_gate_views(cfg, ctx), dict(cfg.scoring.live)))
    for stream, asked in shown:
        for part in _chunks(cfg, stream):
            for model in models:
                for mode in asked.get(model.name, ()):
                    texts = renderers[model.name](part, mode)
                    path = bases[model.name].path
                    rows = [_ask(cfg, model, path, mode, *told, own) for told, own in zip(part, texts, strict=True)]
                    there = [known.get(tuple(r[k] for k in KEY)) for r in rows]
                    stale[model.name, mode] += sum(was not in (None, r["prompt_hash"]) for was, r in zip(there, rows, strict=True))
                    parts.append(pa.Table.from_pylist([r for was, r in zip(there, rows, strict=True) if was is None], schema=ASKED))
    _tell_stale(ctx, stale)
    found = pa.concat_tables(parts)
    return found.sort_by([(name, "ascending") for name in ("model", "mode", "request_id", "replica")])  # a worker becomes each model once


Shown = tuple[dict[str, Any], View]
Turned = tuple[dict[str, Any], list[View]]  # the request as asked, and as the mode score shows it beside


def _shown(cfg: Config, ctx: Context, split: str) -> Iterator[Shown]:
    scored, audited = chosen(cfg, ctx, split)
    once = tuple(range(cfg.scoring.replicas))
    again = tuple(range(cfg.scoring.replicas, cfg.scoring.audit_replicas))
    yield from views(ctx, cfg, split, scored, once)
    if again and audited:
        yield from views(ctx, cfg, split, audited, again)


def nights_of(ctx: Context, models: list[Artifact]) -> dict[str, list[str] | None]:
    """Night -> its lists to ask about: all (None) of the run's night; of others that these models answered for, those made again since.

    Whichever version was out then: what it answered stands.
    """
    lists = ctx.lake.read("candidates", ["night", "request_id"], split="live")
    scored = (
        ctx.lake.read("rerank_scores", ["night", "request_id"], split="live", model=[model.name for model in models])
        if ctx.lake.exists("rerank_scores")
        else lists.slice(0, 0)
    )
    answered, known = set(scored["request_id"].to_pylist()), set(scored["night"].to_pylist())
    found: dict[str, list[str] | None] = {str(ctx.date): None}
    for night, request in zip(lists["night"].to_pylist(), lists["request_id"].to_pylist(), strict=True):
        if night in known and request not in answered and (again := found.setdefault(night, [])) is not None:
            again.append(request)
    return dict(sorted(found.items()))


def _gate_views(cfg: Config, ctx: Context) -> Iterator[Shown]:
    """What `release` compares models by: those of a sample of the validation requests whose target is in the list."""
    table = ctx.lake.read("candidates", ["request_id", "target_rank"], order_by=["request_id"], split="valid")
    ranks = dict(zip(table["request_id"].to_pylist(), table["target_rank"].to_pylist(), strict=True))
    return views(ctx, cfg, "valid", [r for r in gate.sample(ranks, cfg) if ranks[r] is not None])


def _chunks(cfg: Config, stream: Iterator[Shown]) -> Iterator[list[Turned]]:
    while part := list(itertools.islice(stream, RENDERED)):
        yield [(row, _turned(cfg, row, view)) for row, view in part]


def _turned(cfg: Config, row: dict[str, Any], view: View) -> list[View]:
    """The view, and the same request under other shuffles, which no replica has."""
    more = [row["replica"] + TURN * turn for turn in range(1, cfg.scoring.shuffles)]
    return [view, *(make_view(view.request_id, view.history, view.candidates, replica, cfg.prompt.shuffled) for replica in more)]


Renderer = Callable[[list[Turned], Mode], list[list[str]]]  # the prompts of each request: one, or in the mode score one a turn


def _renderers(cfg: Config, ctx: Context, models: list[Artifact], bases: dict[str, Artifact]) -> dict[str, Renderer]:
    """Model -> function that renders a chunk as prompts ("" where unreadable); models with the same tokenizer share the work.

    Raises ModelError for a vocabulary that lacks tokens of our items.
    """
    by_content: dict[str, Renderer] = {}
    found = {}
    sids = ctx.lake.read("semantic_ids", ["token_text"], tokenizer=ctx.model("tokenizer").id)["token_text"].to_pylist()
    for model in models:
        path = bases[model.name].path
        parts = sorted(p for p in path.iterdir() if p.name.startswith(("tokenizer", "chat_template", "special_tokens", "added_tokens")))
        content = hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()
        if content not in by_content:
            tokenizer = load_tokenizer(path)
            check_items(tokenizer, sids, path)
            by_content[content] = _renderer(cfg, tokenizer)
        found[model.name] = by_content[content]
        if model.name in COMPRESSORS:
            found[model.name] = _shorter(found[model.name], compressing(cfg, ctx, model))
    return found


def _shorter(render: Renderer, compress: Callable[[list[str]], list[str]]) -> Renderer:
    return lambda part, mode: [compress(prompts) for prompts in render(part, mode)]


def _renderer(cfg: Config, tokenizer: Any) -> Renderer:
    last: dict[str, tuple[Any, list[list[str]]]] = {}

    def render(part: list[Turned], mode: Mode) -> list[list[str]]:
        if mode not in last or last[mode][0] is not part:
            asked = [shown if mode == "score" else shown[:1] for _, shown in part]
            texts = iter(_rendered(cfg, tokenizer, [view for shown in asked for view in shown], mode))
            last[mode] = (part, [list(itertools.islice(texts, len(shown))) for shown in asked])
        return last[mode][1]

    return render


def _rendered(cfg: Config, tokenizer: Any, shown: list[View], mode: Mode) -> list[str]:
    """Each view's prompt; where one cannot be made short enough, it alone is given back empty."""
    try:
        return render_texts(tokenizer, shown, cfg, mode)
    except ModelError:
        if len(shown) == 1:
            return [""]
        return [_rendered(cfg, tokenizer, [view], mode)[0] for view in shown]


def _ask(
    cfg: Config, model: Artifact, path: Path, mode: Mode, row: dict[str, Any], shown: list[View], prompts: list[str]
) -> dict[str, Any]:
    thought = cfg.prompt.max_thought_tokens if mode == "think" else 0
    most = thought + cfg.prompt.max_answer_tokens + ROOM
    decides = [cfg.scoring.dtype, *([] if mode == "score" else [cfg.scoring.structured, thought, most])]  # beside what is read
    return {
        "request_id": row["request_id"],
        "model_id": model.id,
        "model": model.name,
        "mode": mode,
        "replica": row["replica"],
        "split": row["split"],
        "night": row["night"],
        "path": str(path),
        "prompts": prompts if all(prompts) else [],
        "prompt_hash": prompt_hash(template_of(cfg.prompt), "\n".join([*prompts, *map(str, decides)])),
        "max_tokens": most,
        "candidates": [c.item_id for c in shown[0].candidates],
        "labels": [label for view in shown[: len(prompts)] for label in view.labels],
        "shown": list(shown[0].shown),
    }


def _known(ctx: Context, models: list[Artifact], nights: list[str]) -> dict[tuple[Any, ...], str]:
    """Key -> prompt_hash of the answers that are there."""
    if not ctx.lake.exists("rerank_scores"):
        return {}
    table = ctx.lake.read("rerank_scores", [*KEY, "prompt_hash"], model_id=[m.id for m in models], night=nights)
    return dict(zip(zip(*(table[k].to_pylist() for k in KEY), strict=True), table["prompt_hash"].to_pylist(), strict=True))


def _tell_stale(ctx: Context, stale: Counter[tuple[str, str]]) -> None:
    """How many of the kept answers are not those that would be given today: to the log and, of an experiment, to the audits."""
    if total := stale.total():  # the table is insert-only: what a release pins stays as it was
        ctx.log(
            f"rerank_scores: {total} answers that are kept were given to other prompts than today's, or under other settings: lists, "
            "prompt, scoring.shuffles, .dtype or .structured changed since. Models that are trained anew are asked anew; for these, take "
            "another paths.root"
        )
    if not ctx.date:
        detail = "kept answers that were given to other prompts than today's, or under other settings: figures are theirs"
        found = [finding("stale_answers", f"{model}/{mode}", float(n), detail=detail) for (model, mode), n in sorted(stale.items())]
        write_whole(ctx.work("audits") / "rerank_scores.json", json.dumps(found, indent=1))


# -- the engine job ---------------------------------------------------------------------------------------------------


def _answering(cfg: Config) -> Callable[[Rows], Callable[[Rows], Rows]]:
    """Runs in a Python worker: chunks through its one engine, which becomes one model after the other."""

    def answer(rows: Rows) -> Rows:
        made = []
        for (name, path, mode), same in itertools.groupby(rows, key=lambda r: (r["model_id"], r["path"], r["mode"])):
            engine: Any = engine_for(Spec("vllm", f"vllm:{name}", path), cfg)
            part = list(same)
            engine.vectors = (
                vectors_of(Context(cfg), name, itertools.chain(*(r["prompts"] for r in part))) if name.startswith("latents@") else None
            )
            answers = _scores(engine, part) if mode == "score" else _texts(engine, part, cfg)
            made += [{**row, **answer} for row, answer in zip(part, answers, strict=True)]
        return made

    return lambda _: answer


def _texts(engine: Any, rows: list[dict[str, Any]], cfg: Config) -> list[dict[str, Any]]:
    """Greedy answers in the form ANSWERED."""
    readable = [r for r in rows if r["prompts"]]
    asks = [
        Ask(
            _key(r),
            r["prompts"][0],
            r["max_tokens"],
            temperature=0.0,
            seed=0,
            labels=tuple(sorted(r["labels"])) if cfg.scoring.structured else (),
            thought=cfg.prompt.max_thought_tokens if r["mode"] == "think" else 0,
        )
        for r in readable
    ]
    answers = {_key(r): a for r, a in zip(readable, engine.generate(asks) if asks else [], strict=True)}
    made = []
    for row in rows:
        answer = answers.get(_key(row))
        if answer is None:
            made.append(_failed(UNREADABLE))
        elif answer.error:
            made.append({**_failed(ENGINE), "text": answer.error, "prompt_tokens": answer.prompt_tokens, "seconds": answer.seconds})
        else:
            fields = ("text", "prompt_tokens", "completion_tokens", "seconds")
            made.append({"error": "", "logprobs": None, **{f: getattr(answer, f) for f in fields}})
    return made


def _scores(engine: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log-probabilities of each candidate's label at the first answer position, turn after turn, in the form ANSWERED."""
    prompts = [prompt for row in rows for prompt in row["prompts"]]
    names = sorted({label for row in rows for label in row["labels"]})
    started = time.monotonic()
    found_BY = engine.label_logprobs(prompts, names) if prompts else np.zeros((0, len(names)))
    seconds = (time.monotonic() - started) / max(1, len(prompts))
    answers = zip(found_BY, [len(ids) for ids in engine.encode(prompts)], strict=True)
    made = []
    for row in rows:
        turns = list(itertools.islice(answers, len(row["prompts"])))
        if not turns:
            made.append(_failed(UNREADABLE))
            continue
        listed = np.array_split(row["labels"], len(turns))
        own = [float(values[names.index(label)]) for labels, (values, _) in zip(listed, turns, strict=True) for label in labels]
        base = {"text": "", "prompt_tokens": sum(n for _, n in turns), "completion_tokens": len(turns), "seconds": seconds * len(turns)}
        broken = not np.isfinite(own).all()
        made.append({**base, "error": ENGINE if broken else "", "logprobs": None if broken else own})
    return made


def _key(row: dict[str, Any]) -> str:
    return f"{row['request_id']}#{row['replica']}"


def _failed(error: str) -> dict[str, Any]:
    return {"text": "", "error": error, "logprobs": None, "prompt_tokens": 0, "completion_tokens": 0, "seconds": 0.0}


# -- from answers to rows ---------------------------------------------------------------------------------------------


def check_priors(cfg: Config, ctx: Context, models: list[Artifact]) -> None:
    """Raises MissingInputError for a model that a night asks in mode score and that scored none of the experiment's lists."""
    asked = [model for model in models if "score" in modes_of(cfg, ctx)[model.name]]
    part = {"model_id": [model.id for model in asked], "mode": "score", "night": EXPERIMENT, "status": "ok"}
    there = set(ctx.lake.read("rerank_scores", ["model_id"], **part)["model_id"].to_pylist()) if ctx.lake.exists("rerank_scores") else set()
    for model in asked:
        if model.id not in there:
            latest = artifacts.resolve(ctx.root, model.name).id
            raise MissingInputError(
                f"{model.id} scored none of the experiment's lists, whose label priors a night needs: run `gr2 stage rerank_scores "
                f"--set scoring.models.{model.name}=[score]` first, without --date"
                + (f"; that asks {latest}, which must be released before" if latest != model.id else "")
            )


def scored_earlier(ctx: Context, models: list[Artifact]) -> pa.Table:
    """What these models gave the labels of the experiment's lists in earlier runs."""
    columns = ["model_id", "mode", "labels", "label_logprobs"]
    if not ctx.lake.exists("rerank_scores"):
        return pa.schema([*ASKED, *ANSWERED]).empty_table()
    part = {"model_id": [model.id for model in models], "mode": "score", "night": EXPERIMENT}
    return ctx.lake.read("rerank_scores", columns, **part).rename_columns([*columns[:3], "logprobs"])


def label_priors(*answers: pa.Table) -> dict[str, dict[str, float]]:
    """Model -> label -> what its name alone is worth, over all answers in mode score (columns model_id, mode, labels, logprobs).

    That is the label's effect beside the list's, fitted to the log-probabilities by least squares. Where all lists are of one length it is
    the label's mean, less a constant; else the mean would favour the last labels, which only long lists have, at lower probabilities.
    """
    lists: dict[str, list[tuple[list[str], list[float]]]] = {}
    for table in answers:
        for row in table.select(["model_id", "mode", "labels", "logprobs"]).to_pylist():
            if row["mode"] == "score" and row["logprobs"] is not None:
                lists.setdefault(row["model_id"], []).append((row["labels"], row["logprobs"]))
    return {model: _label_effects(own) for model, own in lists.items()}


def _label_effects(lists: list[tuple[list[str], list[float]]]) -> dict[str, float]:
    """The normal equations of value = effect of its list + effect of its label; effects of labels add up to zero."""
    centred: dict[str, list[float]] = {}
    for labels, values in lists:
        for label, value in zip(labels, np.subtract(values, np.mean(values)).tolist(), strict=True):
            centred.setdefault(label, []).append(value)
    names = sorted(centred)
    normal_LL = np.zeros((len(names), len(names)))
    for held, count in sorted(Counter(tuple(sorted(labels)) for labels, _ in lists).items()):
        has_L = np.array([held.count(name) for name in names], float)
        normal_LL += count * (np.diag(has_L) - np.outer(has_L, has_L) / len(held))
    sums_L = [np.sort(centred[name]).sum() for name in names]  # sorted, so that no order of lists shows in the last digits
    return dict(zip(names, np.linalg.lstsq(normal_LL, sums_L, rcond=1e-9)[0].tolist(), strict=True))


def _judged(priors: dict[str, dict[str, float]]) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Answers -> rows of `rerank_scores`."""
    contract = schemas.get("rerank_scores").arrow()

    def judge_all(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield pa.RecordBatch.from_pylist([judge(row, priors.get(row["model_id"], {})) for row in batch.to_pylist()], schema=contract)

    return judge_all


def judge(row: dict[str, Any], prior: dict[str, float]) -> dict[str, Any]:
    """One answer as a row: a permutation of the request's candidates, or the failure's name. Nothing is repaired."""
    order, status, thought = None, row["error"], ""
    if not status and row["mode"] == "score":
        order, status = score_order(row["candidates"], row["labels"], row["logprobs"], prior), "ok"
    elif not status:
        parsed = parse(row["text"], row["labels"], row["mode"])
        status, thought = parsed.status, parsed.thought
        items = dict(zip(row["labels"], row["candidates"], strict=True))
        order = [items[label] for label in parsed.order] if parsed.order is not None else None
    return {**row, "status": status, "new_order": order, "reasoning": thought, "label_logprobs": row["logprobs"]}


def score_order(candidates: list[str], labels: list[str], logprobs: list[float], prior: dict[str, float]) -> list[str]:
    """Candidates by descending label log-probability less the label's prior, summed over turns; ties in incoming order."""
    gains = [value - prior.get(label, 0.0) for label, value in zip(labels, logprobs, strict=True)]
    gain = np.reshape(gains, (-1, len(candidates))).sum(axis=0).tolist()
    return [candidates[place] for place in sorted(range(len(candidates)), key=lambda place: (-gain[place], place))]


def _statuses(ctx: Context, models: list[Artifact]) -> dict[str, dict[str, int]]:
    """Model and mode -> status -> rows, over all that the table holds of these models."""
    columns = ("model", "mode", "status")
    table = ctx.lake.read("rerank_scores", list(columns), model_id=[m.id for m in models])
    counts = Counter(zip(*(table[c].to_pylist() for c in columns), strict=True))
    found: dict[str, dict[str, int]] = {}
    for (model, mode, status), count in sorted(counts.items()):
        found.setdefault(f"{model}/{mode}", {})[status] = count
    return found
