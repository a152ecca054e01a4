"""Batch re-scoring: the stage against bare `vllm.LLM.generate`, vLLM against transformers, `score` against `think`.

    python -m benchmarks.scoring --root var/beauty --profile beauty        # a finished root; about ten minutes on two cores

All ask the model `rl` about the same requests. The stage runs as a user runs it (its own process: Spark, rendering, one engine, parsing,
audits, Delta), on a copy of the tables that it reads; bare vLLM is one call on ready prompts. Both are given with the start of the engine
and without; vLLM begins with an empty prefix cache each time. transformers generates greedily in padded batches of 64, sorted by length, in
the type of `scoring.dtype`, as vLLM does.
"""

import argparse
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from benchmarks.stages import gr2, header
from gr2 import pipeline
from gr2.config import Config, load
from gr2.context import Context
from gr2.environment import set_defaults
from gr2.prompts import LABELS
from scoring.engine import Ask
from scoring.model import encode_all
from scoring.model import load as load_model
from scoring.vllm_engine import VLLMEngine
from spark_jobs.rerank_scores import asks

MODEL = "rl"
LONG = 512  # tokens of a thought as a language model of billions of parameters writes it


def copied(root: Path, there: Path) -> None:
    """What the stage reads, in a root of its own: models by link, tables copied."""
    there.mkdir(parents=True)
    (there / "models").symlink_to(root.resolve() / "models")
    for name in pipeline.get("rerank_scores").reads:
        if (root / "tables" / name).exists():  # item_latents: only where the compressor was trained
            shutil.copytree(root / "tables" / name, there / "tables" / name)


def bare(engine: VLLMEngine, ids: list[list[int]], most: int, least: int = 0) -> float:
    """Seconds of one call of `LLM.generate` on ready prompts; no answer ends before `least` tokens."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    engine._llm.reset_prefix_cache()
    started = time.perf_counter()
    params = SamplingParams(max_tokens=most, min_tokens=least, temperature=0.0)
    engine._llm.generate([TokensPrompt(prompt_token_ids=i) for i in ids], params, use_tqdm=False)
    return time.perf_counter() - started


def of_transformers(path: Path, ids: list[list[int]], most: int, dtype: str, batch: int = 64) -> float:
    """Seconds of greedy generation in padded batches."""
    import torch

    model, tokenizer = load_model(path)
    model = model.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32).eval()
    ids = sorted(ids, key=len)
    started = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(ids), batch):
            part = ids[start : start + batch]
            width = max(map(len, part))
            rows = torch.tensor([[tokenizer.pad_token_id] * (width - len(i)) + i for i in part])
            mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in part])
            model.generate(
                rows, attention_mask=mask, max_new_tokens=most, do_sample=False,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
    return time.perf_counter() - started


def of_the_stage(profile: str, root: Path, settings: list[str]) -> tuple[int, float, float, str]:
    """(answers, seconds of the command, of its engine alone, what it said of its engines)."""
    started = time.perf_counter()
    gr2(profile, root, ["stage", "rerank_scores"], settings)
    whole = time.perf_counter() - started
    log = (root / "logs" / "gr2.log").read_text()
    table = DeltaTable(str(root / "tables" / "rerank_scores")).to_pyarrow_table(columns=["seconds"])
    said = re.findall(r"rerank_scores: (\d+ chunks answered.*)", log)
    return table.num_rows, whole, sum(table["seconds"].to_pylist()), said[-1] if said else ""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--profile", default="beauty")
    parser.add_argument("--requests", type=int, default=2000, help="at most; those whose list holds the target")
    chosen = parser.parse_args()
    set_defaults()
    print(header("scoring"))
    with tempfile.TemporaryDirectory(dir=chosen.root.resolve().parent) as folder:
        _measure(chosen.profile, chosen.root, Path(folder) / "root", chosen.requests)


def _measure(profile: str, root: Path, there: Path, most: int) -> None:
    copied(root, there)
    settings = [
        f"scoring.models={{{MODEL}: [think]}}", "scoring.miss_sample=1", "scoring.audit_requests=1", "scoring.audit_replicas=1",
        "release.gate=false",
    ]  # fmt: skip
    cfg: Config = load(profile, [f"paths.root={there}", *settings])
    ctx = Context(cfg)
    model = ctx.model(MODEL)
    table: list[dict[str, Any]] = asks(cfg, ctx, [model]).to_pylist()[:most]
    prompts, room = [row["prompts"][0] for row in table], table[0]["max_tokens"]
    scoring = cfg.model_copy(update={"scoring": cfg.scoring.model_copy(update={"models": {MODEL: ("score",)}})})
    of_score = [prompts[0] for prompts in asks(scoring, ctx, [model])["prompts"].to_pylist()[:most]]
    count, whole, job, said = of_the_stage(profile, there, settings)
    started = time.perf_counter()
    engine = VLLMEngine(model.path, cfg.scoring)
    start = time.perf_counter() - started
    ids = encode_all(engine.tokenizer, prompts)
    bare(engine, ids[:64], room)  # what is done once, at the first call
    generate = bare(engine, ids, room)
    engine._llm.reset_prefix_cache()
    again = time.perf_counter()
    engine.generate([Ask(str(i), prompt, room, 0.0, 0) for i, prompt in enumerate(prompts)])
    adapter = time.perf_counter() - again
    engine._llm.reset_prefix_cache()
    again = time.perf_counter()
    engine.label_logprobs(of_score, LABELS[: cfg.candidates.n])
    score = time.perf_counter() - again
    some = ids[:256]
    slowest = len(some) / bare(engine, some, LONG, LONG)
    engine.close()
    slow = of_transformers(model.path, some, room, cfg.scoring.dtype)
    print("| what | requests | requests/s | ratio |\n| --- | --- | --- | --- |")
    rate = len(ids) / generate
    print(f"| bare `LLM.generate` | {len(ids)} | {rate:.1f} | 1 |")
    print(f"| the adapter on the same prompts | {len(ids)} | {len(ids) / adapter:.1f} | {generate / adapter:.2f} of bare |")
    print(f"| the stage, its engine's time | {count} | {count / job:.1f} | {count / job / rate:.2f} of bare |")
    bare_whole = len(ids) / (start + generate)
    print(f"| bare with its start ({start:.0f} s) | {len(ids)} | {bare_whole:.1f} | 1 |")
    print(f"| the stage, whole command ({whole:.0f} s) | {count} | {count / whole:.1f} | {count / whole / bare_whole:.2f} of that |")
    print(f"| transformers | {len(some)} | {len(some) / slow:.1f} | vLLM {rate / (len(some) / slow):.1f} times as fast |")
    print(f"| think, forced to {LONG} tokens | {len(some)} | {slowest:.1f} | |")
    quick = len(ids) / score
    print(f"| score | {len(ids)} | {quick:.1f} | {quick / rate:.1f} times think, {quick / slowest:.1f} times {LONG} tokens |")
    print(f"\nThe stage: {said}", flush=True)


if __name__ == "__main__":
    main()
