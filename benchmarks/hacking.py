"""Do policies learn to copy? Slots in a row or a grid, candidates shown shuffled or as they came, reward with and without its condition.

    python -m benchmarks.hacking --work FOLDER [--steps 120] [--only row/shuffled ...]        (about fifty minutes on two cores)

The demo's marketplace, lists from its log (the incoming order is the reading order of slots: people look from the top of a row, in a grid
at the middle first). For each layout and way of showing, the stages run up to SFT once; then the student is trained by RL twice, with
rl.conditional true and false. What its sampled answers do is read from the stored rollouts: copies of either order, Kendall's tau with
them, how far the first slot is favoured as first choice (1: as chance has it), reward, and N@3 of greedy answers to held-out requests. Only
prompts whose target was not moved count for copies and tau with the incoming order: where it was, that order is drawn. The curves of both
trainings, step by step, stand in ROOT/reports/index.html of each layout and way of showing.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stages import gr2, header
from gr2.answers import parse
from gr2.artifacts import resolve
from schemas.lake import Lake
from training.rollouts import load

LAYOUTS = {"row": "simulator.columns=1", "grid": "simulator.columns=5"}
SHOWN = {"shuffled": "prompt.shuffled=true", "as they came": "prompt.shuffled=false"}
REWARDS = {"conditional": "rl.conditional=true", "unconditional": "rl.conditional=false"}
SETTINGS = [
    "candidates.source=log", "candidates.n=5", "simulator.slate=10", "rl.reward=gr2", "rl.teacher.max_steps=1", "rl.validate_every=10",
    "sasrec.share=0", "midtrain.teacher.epochs=1", "sft.teacher.max_steps=50",
]  # fmt: skip


def steps_of(root: Path) -> list[dict[str, Any]]:
    """What the latest student's answers did, by step."""
    lake = Lake(root)
    student = resolve(root, "rl")
    curve = {line["step"]: line for line in map(json.loads, (student.path / "metrics.jsonl").read_text().splitlines())}
    prompts = {
        row["prompt_id"]: row
        for row in lake.read("rl_prompts", ["prompt_id", "incoming", "shown", "mode", "redrawn"], split="rerank").to_pylist()
    }
    found = []
    for path in sorted((root / "work" / "rollouts" / f"rl-{student.manifest['fingerprint']}").glob("step-*.arrow")):
        rollouts = load(path)
        orders = [(r, parse(r.text, prompts[r.prompt_id]["incoming"], prompts[r.prompt_id]["mode"]).order) for r in rollouts]
        valid = [(r, order, prompts[r.prompt_id]) for r, order in orders if order is not None]
        kept = [(r, order, prompt) for r, order, prompt in valid if not prompt["redrawn"]]
        step = int(path.stem.split("-")[1])
        found.append(
            {
                "step": step,
                "invalid": curve[step]["invalid"],
                "copies incoming": _mean(list(order) == prompt["incoming"] for _, order, prompt in kept),
                "copies shown": curve[step]["copy_shown"],
                "tau incoming": _mean(r.tau_incoming for r, _, _ in kept),
                "tau shown": curve[step]["tau_shown"],
                "first slot": _mean(order[0] == prompt["shown"][0] for _, order, prompt in valid) * len(valid[0][1]) if valid else 0.0,
                "reward": curve[step]["reward"],
                "valid N@3": curve[step].get("valid_ndcg3"),
            }
        )
    return found


def _mean(values: Any) -> float:
    numbers = [float(v) for v in values if v is not None]
    return float(np.mean(numbers)) if numbers else float("nan")


def show(name: str, found: list[dict[str, Any]]) -> None:
    """Means over quarters of a training."""
    at = max(1, len(found) // 4)
    for start in range(0, len(found), at):
        part = found[start : start + at]
        cells = [f"{_mean(step[key] for step in part):.3f}" for key in part[0] if key != "step"]
        print(f"| {name} | {part[0]['step']}-{part[-1]['step']} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Runs what is not there yet, prints all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--only", nargs="+", help="such as row/shuffled")
    given = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    roots = []
    for layout, shown in itertools.product(LAYOUTS, SHOWN):
        if given.only and f"{layout}/{shown}" not in given.only:
            continue
        root = given.work.resolve() / f"{layout}-{shown.replace(' ', '-')}"
        roots.append(root)
        settings = [LAYOUTS[layout], SHOWN[shown], f"rl.student.max_steps={given.steps}"]
        for reward, switch in REWARDS.items():
            done = root / f"{reward}.json"
            if not done.exists():
                gr2("demo", root, ["run", "--to", "rl"], [*SETTINGS, *settings, switch])
                for stage in ("rollouts", "report"):
                    gr2("demo", root, ["stage", stage], [*SETTINGS, *settings, switch])
                done.write_text(json.dumps(steps_of(root)))
            results[f"{layout}, {shown}, {reward}"] = json.loads(done.read_text())
    keys = [key for key in next(iter(results.values()))[0] if key != "step"]
    print(header("hacking", *roots) + "\n| slots, shown, reward | steps | " + " | ".join(keys) + " |\n| --- | --- |" + " --- |" * len(keys))
    for name, found in results.items():
        show(name, found)


if __name__ == "__main__":
    main()
