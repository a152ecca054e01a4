"""Rollouts from plain torch, for a GPU where vLLM is not to be had: stages `rl` and `opd` as ever, but for who samples.

    python -m benchmarks.sampler stage rl --profile beauty ...      # what `gr2 stage rl --profile beauty ...` does

One forward pass a token over rows padded on the left, with a cache of keys and values; a row that has ended goes on unheard until its batch
has. For models of a few million parameters, whose steps are short whatever the batch. Greedy answers are vLLM's, up to rounding; samples
are of the same distribution, from a generator of the batch.

Shapes: B rows, T tokens, V vocabulary.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gr2.config import Scoring
from scoring.engine import Answer, Ask
from scoring.model import encode_all, load

ROWS = 1024  # of a batch
LOOK = 8  # tokens after which it is asked whether all rows have ended


class TorchSampler:
    """What `training.rl.Sampler` needs of an engine."""

    def __init__(self, path: Path | str, settings: Scoring, max_len: int | None = None) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model, self.tokenizer = load(path)
        self.model = model.to(self.device, torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32)
        self.limit = max_len

    def generate(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer an ask. Batches are of prompts of like length."""
        prompts = encode_all(self.tokenizer, [ask.prompt for ask in asks])
        order = sorted(range(len(asks)), key=lambda i: len(prompts[i]))
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), ROWS):
            part = order[start : start + ROWS]
            answers |= dict(zip(part, self._batch([asks[i] for i in part], [prompts[i] for i in part]), strict=True))
        return [answers[i] for i in range(len(asks))]

    def push_weights(self, model: Any) -> None:
        """Takes over a trainer's weights."""
        self.model.load_state_dict(model.state_dict(), strict=False)  # own vectors are no part of the language model

    def close(self) -> None:
        """Gives the model back."""
        del self.model

    @torch.inference_mode()
    def _batch(self, asks: Sequence[Ask], prompts: Sequence[list[int]]) -> list[Answer]:
        started, width, most = time.monotonic(), max(map(len, prompts)), max(ask.max_tokens for ask in asks)
        ids_BT = torch.full((len(asks), width), self.tokenizer.pad_token_id)
        there_BT = torch.zeros(len(asks), width + most, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
            there_BT[row, width - len(prompt) :] = 1
        heat_B = torch.tensor([ask.temperature for ask in asks], device=self.device)
        room_B = torch.tensor([ask.max_tokens for ask in asks], device=self.device)
        generator = torch.Generator(self.device).manual_seed(asks[0].seed)
        ids_BT, there_BT = ids_BT.to(self.device), there_BT.to(self.device)
        place_BT = (there_BT.cumsum(1) - 1).clamp_min(0)
        cache, inputs_BT, tokens, logps = None, ids_BT, [], []
        ended_B = torch.zeros(len(asks), dtype=torch.bool, device=self.device)
        for step in range(most):
            seen = width + step
            out = self.model(
                input_ids=inputs_BT,
                attention_mask=there_BT[:, :seen],
                position_ids=place_BT[:, seen - inputs_BT.shape[1] : seen],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            token_B, logp_B = drawn(out.logits[:, -1].float(), heat_B, generator)
            tokens.append(token_B)
            logps.append(logp_B)
            ended_B |= (token_B == self.tokenizer.eos_token_id) | (room_B == step + 1)
            if step % LOOK == LOOK - 1 and bool(ended_B.all()):
                break
            inputs_BT = token_B[:, None]
        written_BT, logps_BT = torch.stack(tokens, 1).cpu(), torch.stack(logps, 1).cpu()
        share = (time.monotonic() - started) / len(asks)
        return [self._answer(*row, share) for row in zip(asks, prompts, written_BT.tolist(), logps_BT.tolist(), strict=True)]

    def _answer(self, ask: Ask, prompt: list[int], written: list[int], logps: list[float], seconds: float) -> Answer:
        """A row up to its end token, or its limit."""
        end = self.tokenizer.eos_token_id
        ids = written[: ask.max_tokens]
        stopped = end in ids
        ids = ids[: ids.index(end) + 1] if stopped else ids
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(
            key=ask.key,
            text=text,
            prompt_tokens=len(prompt),
            completion_tokens=len(ids),
            token_ids=tuple(ids),
            logprobs=tuple(logps[: len(ids)]) if ask.logprobs else (),
            prompt_token_ids=tuple(prompt),
            seconds=seconds,
        )


def drawn(logits_BV: torch.Tensor, heat_B: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`(token_B, logp_B)`: samples at these temperatures (0: the likeliest), and their log-probabilities under what they are drawn from."""
    logp_BV = torch.log_softmax(logits_BV / torch.where(heat_B > 0, heat_B, 1.0)[:, None], dim=-1)
    noise_BV = torch.empty_like(logp_BV).exponential_(generator=generator).log()  # Gumbel's, with its sign turned
    token_B = torch.where((heat_B > 0)[:, None], logp_BV - noise_BV, logp_BV).argmax(-1)
    return token_B, logp_BV.gather(1, token_B[:, None])[:, 0]


def main() -> None:
    """The command line of `gr2`, with this sampler."""
    import training.rl
    from gr2.cli import main as cli

    training.rl.VLLMEngine = TorchSampler  # type: ignore[misc, assignment]
    cli()


if __name__ == "__main__":
    main()
