"""What tests of the training loop share: a tiny model, examples with something to learn, a training in a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gr2.config import Model, Training
from scoring.model import build_model, save
from training.data import Batch, Example, batches, pack
from training.loop import planned_steps, token_logprobs, train

TINY = Model(hidden=32, layers=2, heads=2, kv_heads=1, mlp=64, dropout=0.1)
FAST = Training(lr=1e-2, row_tokens=48, tokens_per_batch=48 * 4, precision="fp32", max_steps=12)


def examples(count: int = 60) -> list[Example]:
    generator = torch.Generator().manual_seed(5)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 250, (length,), generator=generator).sort().values.tolist()  # sorted: there is something to learn

    return [Example(draw(1, 8), [(draw(2, 10), 0.3), (draw(2, 14), 1.0)]) for _ in range(count)]


def loss_fn(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
    logps_BT = token_logprobs(model, batch)
    return -(logps_BT * batch.weights_BT).sum() / batch.norm, {"learned": float(batch.learned_BT.sum())}


def run(tokenizer: Any, folder: Path, settings: Training = FAST, **more: Any) -> tuple[Any, list[dict[str, float]]]:
    """A training from a fixed start: the model, and its curve without the seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(TINY, tokenizer, None, seed=7)
    loader = batches(pack(examples(), settings.row_tokens), settings.tokens_per_batch, seed=9)
    train(model, loader, more.pop("loss", loss_fn), settings, folder=folder, total_steps=planned_steps(loader, settings), seed=1, **more)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return model, [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def same_weights(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def plain_logits(model: Any, tokenizer: Any, folder: Path) -> float:
    """What transformers alone reads from the export; all its weights must be found."""
    save(model, tokenizer, folder / "export")
    assert not list((folder / "export").glob("*adapter*"))
    code = (
        "import sys, transformers as t\n"
        "m, told = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not told['missing_keys'] and not told['unexpected_keys'], told\n"
        "k = t.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(m.eval()(**k('some words', return_tensors='pt')).logits.double().sum().item())"
    )
    environment = {**os.environ, "PYTHONPATH": ""}
    words = [sys.executable, "-c", code, str(folder / "export")]
    return float(subprocess.run(words, capture_output=True, text=True, check=True, cwd=folder, env=environment).stdout)


class Stop(Exception):
    """Stands for a kill."""


def stop_after(calls: int) -> Any:
    left = iter(range(calls))

    def stopping(model: Any, batch: Batch) -> Any:
        if next(left, None) is None:
            raise Stop
        return loss_fn(model, batch)

    return stopping
