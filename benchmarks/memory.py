"""Memory and time of training a large model, from its configuration: arithmetic, no weights and no GPU.

    python -m benchmarks.memory                                                  # Qwen3-8B as conf/production.yaml trains it, 8 GPUs
    python -m benchmarks.memory --model /mnt/models/Qwen3-32B --training sft.teacher --gpus 16 --memory 141

Weights, gradients and optimizer: DeepSpeed's own estimator for ZeRO-3. Activations: 34 bytes a token, layer and hidden unit in bf16 with an
attention that keeps no scores (Korthikanti et al., arXiv 2205.05198, equation 2 without its 5as/h), once with everything kept and once
with a checkpoint a layer; beside them the attention mask of `training.data` (a byte a pair of a row's places) and one chunk of logits
in fp32 with its gradient. Time: 6 FLOPs a parameter and token (8 with checkpoints, which compute forward twice).
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from gr2.config import Training, load
from training.loop import CHUNK

GIB = 2**30
QWEN3_8B: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


def shape_of(folder: Path | None) -> Any:
    """A model's configuration: its folder's, else that of Qwen3-8B."""
    return AutoConfig.from_pretrained(str(folder), local_files_only=True) if folder else Qwen3Config(**QWEN3_8B)


def parameters(config: Any) -> tuple[int, int]:
    """(all parameters, those of the largest layer), counted on a model without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    return sum(p.numel() for p in model.parameters()), largest


def states(total: int, largest: int, gpus: int) -> list[tuple[str, float, float]]:
    """(offloading, GiB of the CPU, GiB a GPU) by the formulas of DeepSpeed's estimator."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as needs

    nodes, each = (max(1, gpus // 8), min(gpus, 8))
    found = []
    for name, optimizer, params in (("none", False, False), ("optimizer", True, False), ("optimizer and weights", True, True)):
        cpu, gpu, _ = needs(total, largest, each, nodes, cpu_offload=optimizer, cpu_offload_params=params, zero_init=True)
        found.append((name, cpu / GIB, gpu / GIB))
    return found


def activations(config: Any, rows: int, width: int) -> tuple[float, float]:
    """GiB a GPU of one micro-batch: with everything kept, with a checkpoint a layer."""
    tokens, layers, hidden = rows * width, config.num_hidden_layers, config.hidden_size
    kept = 34 * tokens * hidden * layers
    checkpointed = 2 * tokens * hidden * layers + 34 * tokens * hidden
    mask = rows * width * width
    logits = 2 * 4 * min(tokens, CHUNK) * config.vocab_size
    return (kept + mask + logits) / GIB, (checkpointed + mask + logits) / GIB


def seconds(total: int, tokens: int, gpus: int, peak: float, share: float, passes: int) -> float:
    """Of reading so many tokens once."""
    return passes * total * tokens / (gpus * peak * 1e12 * share)


def training_of(name: str) -> Training:
    """A training of the production profile, such as sft.student."""
    section, _, size = name.partition(".")
    found = getattr(getattr(load("production"), section), size)
    if not isinstance(found, Training):
        raise SystemExit(f"{name} is no training of conf/production.yaml")
    return found


def main() -> None:
    """Prints the arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with config.json; default: the shape of Qwen3-8B")
    parser.add_argument("--training", default="midtrain.student", help="of conf/production.yaml")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--memory", type=float, default=80, help="GB of a GPU")
    parser.add_argument("--peak", type=float, default=989, help="dense bf16 TFLOP/s of a GPU (H100: 989)")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that training reaches: an assumption, not a measurement")
    chosen = parser.parse_args()
    config, settings = shape_of(chosen.model), training_of(chosen.training)
    total, largest = parameters(config)
    rows = max(1, settings.tokens_per_batch // chosen.gpus // settings.row_tokens)
    room = chosen.memory * 1e9 / GIB
    print(f"{total:,} parameters, {largest:,} in the largest layer; {chosen.gpus} GPUs of {room:.0f} GiB; {chosen.training}:")
    print(f"{rows} rows of {settings.row_tokens} tokens a GPU and micro-batch, {settings.accumulation} micro-batches a step\n")
    print("| ZeRO-3, offloaded | CPU GiB a node | states, GiB a GPU | + activations kept | + a checkpoint a layer |")
    print("| --- | --- | --- | --- | --- |")
    for name, cpu, gpu in states(total, largest, chosen.gpus):
        sums = [gpu + size for size in activations(config, rows, settings.row_tokens)]
        told = [f"{value:.0f} ({'fits' if value < 0.9 * room else 'does not fit'})" for value in sums]
        print(f"| {name} | {cpu:.0f} | {gpu:.0f} | {told[0]} | {told[1]} |")
    for passes, name in ((6, "kept"), (8, "a checkpoint a layer")):
        hours = seconds(total, 10**9, chosen.gpus, chosen.peak, chosen.share, passes) / 3600
        print(f"\nA billion tokens, activations {name}: {hours:.1f} hours ({1e9 / hours / 3600:,.0f} tokens/s)", end="")
    print(f", at {chosen.share:.0%} of {chosen.peak:.0f} TFLOP/s a GPU")


if __name__ == "__main__":
    main()
