"""Training: the loop against a bare torch loop, packed rows against padded ones, and how much of the machine's matmul peak it uses.

    GR2_DATA=/path/to/amazon2014_beauty python -m benchmarks.training        # a few minutes on two cores

Loop: the same model, packed batches, loss, optimizer, clipping and bf16 autocast, once through `training.loop.Engine` (DeepSpeed, norms
over ranks, metrics), once as ten lines of torch; they take turns. Packing: one history of Beauty an example (3 tokens an item), packed,
against batches of as many examples padded to their longest. Utilisation: FLOPs of a step (6 a parameter and token for what tokens are
multiplied by, 12 * layers * hidden * row for attention, over all of a row, as PaLM counts, arXiv 2204.02311 appendix B) against a
matmul of 4,096 x 4,096 (on a GPU 8,192) in the same type, in the same process. A GPU trains larger models there, on rows of 2,048 tokens.
"""

import argparse
import csv
import gzip
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.stages import header
from gr2.config import Model, Training, load
from gr2.sids import sid_tokens
from scoring.model import autocast, build_model, build_vocabulary, multiplies_bf16
from training.data import Batch, Example, Rows, batches, pack, to_batch
from training.fitting import supervised
from training.loop import Engine, learned_states
from training.optimizers import make_optimizer

SEED, CODES, LEVELS = 13, 1024, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = ("input_ids", "position_ids", "segment_ids", "weights")
Step = Callable[[Batch], Any]


def lengths(most: int) -> tuple[list[int], str]:
    """(items of each user, where they are from): Beauty's where GR2_DATA says where it is, else as many, drawn."""
    folder = load("beauty").data.path
    if folder is None:
        return np.minimum(4 + np.random.default_rng(SEED).geometric(0.2, 20_000), most).tolist(), "drawn histories"
    with gzip.open(folder / "interactions.csv.gz", "rt") as file:
        users = Counter(row["user_id"] for row in csv.DictReader(file))
    return [min(count, most) for count in users.values()], "Beauty's histories"


def histories(tokenizer: Any, counts: list[int]) -> list[Example]:
    """Each user as one example of as many random SIDs as the user has items: lengths are real, codes do not matter."""
    draw, low = np.random.default_rng(SEED), len(tokenizer) - CODES * LEVELS
    return [Example([0], [(draw.integers(low, len(tokenizer), LEVELS * count).tolist(), 1.0)]) for count in counts]


def padded(examples: list[Example], rows: int) -> Iterator[Batch]:
    """Batches of `rows` examples, each padded to its longest: rows that hold one example."""
    order = np.random.default_rng(SEED).permutation(len(examples))
    for start in range(0, len(order) - rows + 1, rows):
        part = [examples[i] for i in order[start : start + rows]]
        width = max(example.tokens for example in part)
        yield to_batch(one_a_row(part, width), slice(None))


def one_a_row(examples: Sequence[Example], width: int) -> Rows:
    """Each example in a row of its own, filled up to the width."""
    alone = [pack([example], width) for example in examples]
    return Rows(**{name: np.concatenate([getattr(rows, name) for rows in alone]) for name in COLUMNS}, extra={})


def bare(model: Any, settings: Training) -> Step:
    """Ten lines of torch."""
    optimizer = make_optimizer(model.to(DEVICE), settings)

    def step(batch: Batch) -> None:
        batch = batch.to(DEVICE)
        with autocast(model, True):
            hidden_MD, targets_M = learned_states(model, batch)
            loss = torch.nn.functional.cross_entropy(model.get_output_embeddings()(hidden_MD).float(), targets_M)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def rate(step: Step, stream: Iterator[Batch], steps: int) -> float:
    """Useful tokens a second."""
    chosen = [next(stream) for _ in range(steps)]
    started = time.perf_counter()
    for batch in chosen:
        step(batch)
    wait()
    return sum(batch.tokens for batch in chosen) / (time.perf_counter() - started)


def wait() -> None:
    """Until a GPU has done what it was asked to."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def turns(first: tuple[Step, Iterator[Batch]], second: tuple[Step, Iterator[Batch]], steps: int, rounds: int) -> tuple[float, float]:
    """Medians of both rates, taken in turns after a round that does not count."""
    rates = [[rate(*pair, steps) for pair in (first, second)] for _ in range(rounds + 1)][1:]
    one, other = np.median(rates, axis=0)
    return float(one), float(other)


def engine_step(model: Any, settings: Training) -> tuple[Step, Engine]:
    """One step of the project's loop."""
    engine = Engine(model, settings, 10**6, SEED)
    return (lambda batch: engine.backward_and_step(supervised, [batch])), engine


def flops(model: Any, batch: Batch) -> float:
    """Of one step: forward and backward."""
    size, (rows, width) = model.config, batch.input_ids_BT.shape
    table = model.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters() if p.ndim > 1) - table * (1 if size.tie_word_embeddings else 2)
    learned = int(batch.learned_BT.sum())
    attention = 12 * size.num_hidden_layers * size.hidden_size * width
    return float((6 * body + attention) * rows * width + 6 * table * learned)


def matmul_peak() -> float:
    """FLOPs a second of matrix products in what training multiplies in (bf16 where the machine has units for it), the best of ten."""
    size = 8192 if DEVICE == "cuda" else 4096
    kind = torch.bfloat16 if multiplies_bf16(DEVICE) else torch.float32
    one, other = (torch.randn(size, size, dtype=kind, device=DEVICE) for _ in range(2))
    seconds = []
    for _ in range(10):
        wait()
        started = time.perf_counter()
        one @ other
        wait()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def utilisation(tokenizer: Any, examples: list[Example], settings: Training, student: Model, steps: int, rounds: int) -> None:
    """The table of sizes: what a step computes, of what the machine can."""
    print("| size | parameters | rows | tokens/s | TFLOP/s | of the matmul peak |\n| --- | --- | --- | --- | --- | --- |")
    peak = matmul_peak()
    sizes = [(student, 160, 3200), (student.model_copy(update={"hidden": 384, "layers": 6, "mlp": 1024}), 160, 3200)]
    if DEVICE == "cuda":
        deep = {"layers": 28, "heads": 16, "kv_heads": 8}
        sizes += [(student.model_copy(update=deep | {"hidden": 1024, "mlp": 3072}), 2048, 32768)]
        sizes += [(student.model_copy(update=deep | {"hidden": 2048, "mlp": 6144}), 2048, 16384)]
    for size, row, tokens in sizes:
        stream = iter(batches(pack(examples, row, SEED, drop_long=True), tokens, SEED))
        model = build_model(size, tokenizer, None, SEED)
        step, engine = engine_step(model, settings)
        found = np.median([rate(step, stream, steps) for _ in range(rounds + 1)][1:])
        batch = next(stream)
        used, count = flops(model, batch) / batch.tokens * found, sum(p.numel() for p in model.parameters())
        engine.close()
        print(
            f"| {size.hidden} x {size.layers} | {count / 1e6:,.0f}M | {tokens // row} x {row} | {found:,.0f} | {used / 1e12:.3f} "
            f"| {used / peak:.2f} of {peak / 1e12:.2f} |",
            flush=True,
        )


def main() -> None:
    """Prints three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    print(header("training"))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_vocabulary(["history of items"] * 5, 1536, sid_tokens(LEVELS, CODES), Path(folder))
    cfg = load("beauty")
    counts, source = lengths(cfg.data.max_history)
    examples = histories(tokenizer, counts)
    settings = cfg.midtrain.student.model_copy(update={"processes": 1, "average": 0.0, "optimizer": "adamw"})
    stream = iter(batches(pack(examples, 160, SEED, drop_long=True), 3200, SEED))
    shape = cfg.models.student.model_copy(update={"dropout": 0.0})

    print("| loop (student, packed rows of 160) | tokens/s | of the bare loop |\n| --- | --- | --- |")
    step, engine = engine_step(build_model(shape, tokenizer, None, SEED), settings)
    plain = bare(build_model(shape, tokenizer, None, SEED).train(), settings)
    ours, theirs = turns((step, stream), (plain, stream), chosen.steps, chosen.rounds)
    print(f"| bare torch | {theirs:,.0f} | |\n| training.loop | {ours:,.0f} | {ours / theirs:.2f} |\n", flush=True)

    print(f"| {source} | useful tokens/s | ratio |\n| --- | --- | --- |")
    alone = padded(examples * 20, 64)
    packed, spread = turns((step, stream), (step, alone), chosen.steps, chosen.rounds)
    print(f"| padded to the longest of 64 | {spread:,.0f} | |\n| packed | {packed:,.0f} | {packed / spread:.2f} |\n", flush=True)
    engine.close()

    utilisation(tokenizer, examples, settings, shape, chosen.steps, chosen.rounds)


if __name__ == "__main__":
    main()
