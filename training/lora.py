"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft, put into a model in place: its body, head and names stay where trainers seek them.

    tuner = adapt(model, Lora(rank=8), seed=13);  ...train what requires a gradient...;  tuner.merge_and_unload()

After `merge` the model is what it was before, with other weights: a plain Hugging Face folder when saved.
"""

from typing import Any

import torch

from gr2.errors import ConfigError, EnvironmentProblem
from gr2.sections import Lora


def adapt(model: Any, settings: Lora, seed: int) -> Any:
    """Freezes the model but for new adapters (and its token tables, if asked) and returns what `merge` takes.

    Raises EnvironmentProblem without peft, ConfigError where the model has none of the targets.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError:
        raise EnvironmentProblem("lora needs peft: install it with `uv sync --extra lora`, or set lora to null") from None
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tuner = LoraModel(model, {"default": config}, "default")
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error}") from None
    for layer in tuner.modules():
        base = getattr(layer, "base_layer", None)
        if base is not None:  # dropout is of what a block adds, the adapter's part too (`scoring.model.add_dropout`)
            layer._forward_hooks.update(base._forward_hooks)
            base._forward_hooks.clear()
    if settings.tables:
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight.requires_grad_(True)
    return tuner
