"""The method's own questions: one switch at a time on one data set, from the same small retriever's lists.

    python -m benchmarks.method --root var/beauty --work FOLDER [--profile beauty] [--only "RL without SFT" ...]

The root has come as far as `candidates`. On a copy of it the reference is built: traces, SFT of 2,000 steps of Muon, RL of 40, on-policy
distillation. Its teacher is the reference's own student after RL, which has had all traces, unless the question is the teacher. Each
variant is a copy of the reference in which the stages run again that its switch touches; kept are the figures of the models that answer
its question. What is finished is not run again; the table of all that is finished is printed each time: users whose target is in the
list, the tokens of an answer, and the difference to the reference (RL, thinks), paired over users, with its 95 % bootstrap interval.

With --stages only those of the stages run, for what is asked for, and nothing is judged: so another machine may do the training.
--sampler torch makes it sample without vLLM (`benchmarks.sampler`), --set says what else is its own.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stages import gr2, header, told
from gr2.artifacts import resolve

REFERENCE = "reference"
BASE = (
    "sft.start=midtrain",  # what SFT, traces and evidence lines do is asked of a model that knows items alone
    "sft.student.optimizer=muon", "sft.student.zero_stage=0", "sft.student.lr=4.0e-3",
    "sft.student.max_steps=2000", "sft.student.tokens_per_batch=4352",
    "rl.student.max_steps=40", "opd.train.max_steps=20", "opd.train.tokens_per_batch=8192",
    "traces.no_target_requests=4000",
    "scoring.shuffles=1", "scoring.miss_sample=0", "scoring.audit_requests=1", "evaluation.baselines=[lambdamart]",
)  # fmt: skip
LEFT_OUT = ("tmp", "staging", "lock", "logs", "reports")


@dataclass(frozen=True)
class Variant:
    """Settings, the stages that run again (then those models are scored), and which systems (model, mode) answer the question."""

    stages: tuple[str, ...]
    settings: tuple[str, ...] = ()
    systems: tuple[tuple[str, str], ...] = (("sft", "think"), ("rl", "think"))


MODES = tuple((model, mode) for model in ("sft", "rl") for mode in ("think", "direct", "score"))
ON_POLICY = (("sft", "think"), ("opd", "think"), ("opd+rl", "think"))
TAUGHT = ("sft_examples", "sft")
EQUAL = "models.teacher={hidden: 192, layers: 4, heads: 6, kv_heads: 6, mlp: 512}"  # OPD's: the reference's own student after RL
LARGER = (
    "models.teacher={hidden: 320, layers: 6, heads: 10, kv_heads: 10, mlp: 896, dropout: 0.2}",
    "midtrain.teacher={processes: 2, max_steps: 1100, lr: 0.002, row_tokens: 80, tokens_per_batch: 3200, average: 0.997}",
    "sft.teacher={processes: 2, optimizer: muon, zero_stage: 0, max_steps: 2000, lr: 0.004, row_tokens: 544, tokens_per_batch: 4352, "
    "average: 0.99}",
    "rl.teacher={lr: 0.0003, warmup: 0.1, max_steps: 40, tokens_per_batch: 8192}",
)
VARIANTS: dict[str, Variant] = {
    REFERENCE: Variant(
        ("reasoning_traces", *TAUGHT, "rl_prompts", "rl", "opd", "baselines"), (), (*MODES, *ON_POLICY[1:])
    ),
    "RL without SFT": Variant(("rl",), ("rl.start=midtrain",), (("rl", "think"),)),
    # Of a request there is one targeted trace and up to four rejected ones, and no targeted one of lists without a target: as many of each.
    "targeted traces": Variant((*TAUGHT, "rl"), ("sft.traces=targeted", "sft.max_traces=2000")),
    "rejected traces, as many": Variant((*TAUGHT, "rl"), ("sft.no_target=false", "sft.max_traces=2000")),
    "1,000 traces": Variant((*TAUGHT, "opd"), ("sft.max_traces=1000", "sft.drills=0"), ON_POLICY),
    "4,000 traces": Variant((*TAUGHT, "opd"), ("sft.max_traces=4000", "sft.drills=0"), ON_POLICY),
    "16,000 traces": Variant(
        ("reasoning_traces", *TAUGHT, "opd"),
        ("traces.accepted_per_request=10", "traces.max_attempts=40", "sft.max_traces=16000", "sft.drills=0"),
        ON_POLICY,
    ),
    "reward gr2": Variant(("rl",), ("rl.reward=gr2",), (("rl", "think"),)),
    "unconditional reward": Variant(("rl",), ("rl.conditional=false",), (("rl", "think"),)),
    "no evidence lines": Variant(("reasoning_traces", *TAUGHT, "rl_prompts", "rl"), ("prompt.evidence=false",), MODES),
    "larger teacher": Variant(("midtrain", "sft", "rl", "opd"), LARGER, (("rl-teacher", "think"), *ON_POLICY[1:])),
    "thoughts distilled": Variant(
        ("distill_examples", "distill"),
        ("distill.source=rl", "distill.start=sft", "distill.thoughts=4", "distill.temperature=0.8", "distill.replicas=1",
         "distill.max_requests=4000"),
        (("fast", "score"),),
    ),
}  # fmt: skip
STAGES = sorted({stage for variant in VARIANTS.values() for stage in variant.stages})


@dataclass(frozen=True)
class Bench:
    """Where all takes place, and how stages run on this machine."""

    root: Path
    work: Path
    profile: str
    sampler: str
    settings: tuple[str, ...]

    def folder(self, name: str) -> Path:
        """The root of a variant."""
        return self.work / "".join(c if c.isalnum() else "-" for c in name)

    def stage(self, name: str, stage: str, settings: tuple[str, ...] = ()) -> None:
        """Runs a stage of a variant, unless that was done: in a copy of the reference, with models of it that the variant lacks."""
        folder, base = self.folder(name), self.folder(REFERENCE)
        done = folder / "done" / stage
        if done.exists():
            return
        if not folder.exists():
            copied(self.root if name == REFERENCE else base, folder)
        for model in (base / "models").iterdir():
            if (model / "current.json").exists() and not (folder / "models" / model.name).exists():
                shutil.copytree(model, folder / "models" / model.name)
        module = "benchmarks.sampler" if self.sampler == "torch" and stage in ("rl", "opd") else "gr2"
        teacher = [EQUAL] if stage == "opd" else []  # no other stage is to train one, unless the variant asks
        gr2(self.profile, folder, ["stage", stage], [*BASE, *teacher, *VARIANTS[name].settings, *settings, *self.settings], module)
        if name == REFERENCE and stage == "rl":
            teach(folder)
        done.parent.mkdir(exist_ok=True)
        done.touch()


def copied(root: Path, folder: Path) -> None:
    """A root's tables, models and records."""
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(root, draft, ignore=shutil.ignore_patterns(*LEFT_OUT, "done"))
    draft.rename(folder)


def teach(folder: Path) -> None:
    """The student after RL as the teacher, too."""
    pointer = {"hash": resolve(folder, "rl").hash}
    shutil.copytree(folder / "models" / "rl", folder / "models" / "rl-teacher", dirs_exist_ok=True)
    (folder / "models" / "rl-teacher" / "current.json").write_text(json.dumps(pointer))


def run(bench: Bench, name: str) -> dict[str, Any]:
    """Runs what is left of a variant, or reads what an earlier call came to."""
    from benchmarks.ranking import SHOWN, Run  # reads as Spark's stages do, and a machine that only trains may have no Spark

    variant, folder = VARIANTS[name], bench.folder(name)
    done = bench.work / f"{folder.name}.json"
    if done.exists():
        return dict(json.loads(done.read_text()))
    asked: dict[str, list[str]] = {}
    for model, mode in variant.systems:
        asked.setdefault(model, []).append(mode)
    modes = ", ".join(f"{model}: [{', '.join(each)}]" for model, each in asked.items())
    scored = f"scoring.models={{{modes}}}"
    for stage in (*variant.stages, "rerank_scores"):
        bench.stage(name, stage, (scored,) if stage == "rerank_scores" else ())
    made = Run(bench.profile, folder, [*variant.settings, scored])
    found: dict[str, Any] = {"/".join((*s, metric)): made.values[(*s, metric)] for s in variant.systems for metric in SHOWN}
    found |= {"/".join((*s, "tokens")): made.tokens[s] for s in variant.systems}
    done.write_text(json.dumps(found))
    if name != REFERENCE:
        shutil.rmtree(folder)
    return found


def show(results: dict[str, dict[str, Any]], root: Path) -> None:
    """The table."""
    from benchmarks.ranking import SHOWN

    columns = ("variant", "order", "users", "R@1", "R@3", "N@3", "N@3 over the reference (RL, thinks)", "tokens")
    print(header("method", root) + "\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    base = results[REFERENCE]["rl/think/ndcg@3"]
    for name, found in results.items():
        for system in dict.fromkeys(key.rsplit("/", 1)[0] for key in found):
            own = found[f"{system}/ndcg@3"]
            shared = sorted(own.keys() & base.keys())
            means = [float(np.mean(list(found[f"{system}/{m}"].values()) or [0.0])) for m in SHOWN]
            over = told([own[u] - base[u] for u in shared], signed=True)
            figures = " | ".join(f"{v:.4f}" for v in means)
            print(f"| {name} | {system} | {len(own):,} | {figures} | {over} | {found[f'{system}/tokens']:.0f} |", flush=True)


def main() -> None:
    """Variants one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--profile", default="beauty")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="names of variants; the reference always comes first")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="only these, and no figures")
    parser.add_argument("--sampler", choices=("vllm", "torch"), default="vllm", help="who samples in `rl` and `opd`")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of every stage, such as the machine's")
    given = parser.parse_args()
    bench = Bench(given.root.resolve(), given.work.resolve(), given.profile, given.sampler, tuple(given.set))
    bench.work.mkdir(parents=True, exist_ok=True)
    if given.stages:
        for name in given.only or VARIANTS:
            for stage in (s for s in VARIANTS[name].stages if s in given.stages):
                bench.stage(name, stage)
        return
    results = {}
    for name in [REFERENCE, *(n for n in given.only or VARIANTS if n != REFERENCE)]:
        results[name] = run(bench, name)
        show(results, bench.root)


if __name__ == "__main__":
    main()
