"""The method's own questions on a finished run: one switch at a time, everything behind it trained and scored again.

    python -m benchmarks.method --root var/beauty --work FOLDER [--profile beauty] [--only "RL without SFT" ...]

Each variant works on a copy of the root, runs from the first stage that its switch touches to the evaluation, and keeps the figures of the
models that answer its question. What is finished is not run again; the table of all that is finished is printed each time: users whose
target is in the list, and the difference to the run as it is (RL, thinks), paired over users, with its 95 % bootstrap interval.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ranking import SHOWN, Run
from benchmarks.stages import gr2, told

REFERENCE = "as it is"


@dataclass(frozen=True)
class Variant:
    """Settings, the first stage they touch, and which systems (model, mode) answer the question."""

    first: str
    settings: tuple[str, ...]
    systems: tuple[tuple[str, str], ...] = (("sft", "think"), ("rl", "think"))


MODES = tuple((model, mode) for model in ("sft", "rl") for mode in ("think", "direct", "score"))
ON_POLICY = (("sft", "think"), ("opd", "think"), ("opd+rl", "think"))
VARIANTS: dict[str, Variant] = {
    REFERENCE: Variant("rerank_scores", (), (*MODES, ("opd", "think"), ("opd+rl", "think"), ("fast", "score"))),
    "RL without SFT": Variant("rl", ("rl.start=midtrain",), (("rl", "think"),)),
    "targeted traces": Variant("sft_examples", ("sft.traces=targeted",)),
    "1,000 traces": Variant("sft_examples", ("sft.max_traces=1000", "sft.drills=0"), ON_POLICY),
    "4,000 traces": Variant("sft_examples", ("sft.max_traces=4000", "sft.drills=0"), ON_POLICY),
    "16,000 traces": Variant(
        "reasoning_traces", ("traces.accepted_per_request=10", "traces.max_attempts=40", "sft.max_traces=16000", "sft.drills=0"), ON_POLICY
    ),
    "reward gr2": Variant("rl", ("rl.reward=gr2",), (("rl", "think"),)),
    "unconditional reward": Variant("rl", ("rl.conditional=false",), (("rl", "think"),)),
    "no evidence lines": Variant("reasoning_traces", ("prompt.evidence=false",), (("sft", "think"), ("rl", "think"), ("rl", "score"))),
    "lists without target taught": Variant(
        "reasoning_traces",
        ("traces.no_target_requests=10000", "sft.no_target=true", "sft.student.max_steps=5200"),
        (("sft", "think"), ("sft", "score"), ("rl", "think"), ("rl", "score")),
    ),
    "thoughts distilled": Variant(
        "distill_examples",
        (
            "distill.source=rl",
            "distill.start=sft",
            "distill.thoughts=4",
            "distill.temperature=0.8",
            "distill.replicas=1",
            "distill.max_requests=8000",
        ),
        (("fast", "score"),),
    ),
    "20 candidates": Variant("candidates", ("candidates.n=20", "prompt.max_prompt_tokens=480", "sft.student.row_tokens=560")),
}
SCORED = "scoring.models={sft: [think, direct, score], rl: [think, direct, score], opd: [think], opd+rl: [think], fast: [score]}"


def run(root: Path, work: Path, profile: str, name: str, variant: Variant) -> dict[str, Any]:
    """Runs a variant, or reads what an earlier call came to."""
    folder = work / "".join(c if c.isalnum() else "-" for c in name)
    done = work / f"{folder.name}.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root, folder, ignore=shutil.ignore_patterns("tmp", "staging", "lock", "logs", "reports"))
    words = ["run", "--from", variant.first, "--to", "evaluation"]
    gr2(profile, folder, words, [SCORED, *variant.settings])
    values = Run(profile, folder).values
    found = {"/".join((*system, metric)): values.get((*system, metric), {}) for system in variant.systems for metric in SHOWN}
    done.write_text(json.dumps(found))
    shutil.rmtree(folder)
    return found


def show(results: dict[str, dict[str, Any]]) -> None:
    """The table."""
    print("\n| variant | order | users | R@1 | R@3 | N@3 | N@3 over RL, thinks, as it is |\n| --- | --- | --- | --- | --- | --- | --- |")
    base = results[REFERENCE]["rl/think/ndcg@3"]
    for name, found in results.items():
        for system in dict.fromkeys(key.rsplit("/", 1)[0] for key in found):
            own = found[f"{system}/ndcg@3"]
            shared = sorted(own.keys() & base.keys())
            means = [float(np.mean(list(found[f"{system}/{m}"].values()) or [0.0])) for m in SHOWN]
            over = told([own[u] - base[u] for u in shared], signed=True)
            print(f"| {name} | {system} | {len(own):,} | " + " | ".join(f"{v:.4f}" for v in means) + f" | {over} |", flush=True)


def main() -> None:
    """Variants one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--profile", default="beauty")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="names of variants; the run as it is always comes first")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in [REFERENCE, *(n for n in given.only or VARIANTS if n != REFERENCE)]:
        results[name] = run(given.root.resolve(), given.work.resolve(), given.profile, name, VARIANTS[name])
        show(results)


if __name__ == "__main__":
    main()
