"""The generation engine: one protocol for a model in this process (vLLM), a service (any OpenAI-compatible URL) and the evidence program.

    engine.generate([Ask("r1", prompt, max_tokens=96, temperature=0.7, seed=gr2.draws.seed_of("r1", 1))])

One failed request is one `Answer` with an `error`; the others are not touched. An engine that cannot work at all raises EngineError.
Each ask has a seed of its own, so a sample does not depend on which others were asked with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gr2.prompts import View


@dataclass(frozen=True)
class Ask:
    """One request. `prompt` is the whole text that the model goes on from (chat template and prefill included).

    `messages`: the same as chat messages, for services that apply the template themselves. `view`, `target` (an item id; targeted mode
    only) and `user` are the request as data: only a program reads them. `logprobs`: the answer's tokens come with theirs, which costs
    time. `labels` force the form of what a model writes (vLLM only): a list of as many labels, each one of these, after a thought of at
    most `thought` tokens (0: none); that none comes twice cannot be forced.
    """

    key: str
    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    view: View | None = None
    target: str | None = None
    user: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    logprobs: bool = False
    labels: tuple[str, ...] = ()
    thought: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back. `error` is empty where generation succeeded.

    `token_ids`: the end token included; empty for engines that have no tokens of their own. `logprobs`: log-probability of each under the
    distribution sampled from, where asked for. `seconds`: its share of the wall time. `cost`: in the service's currency.
    """

    key: str
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    seconds: float = 0.0
    cost: float = 0.0
    error: str = ""


class Engine(Protocol):
    """What traces, scoring and RL rollouts generate with."""

    def generate(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer an ask, in the same order. Raises EngineError only where the engine as a whole failed."""
        ...

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float32]:
        """(B, Y) log-probability of each label as the next token of each prompt; a row of NaN where a prompt cannot be read.

        Raises EngineError for an engine without token probabilities.
        """
        ...

    def close(self) -> None:
        """Gives memory and connections back."""
        ...


def failed(ask: Ask, error: BaseException | str, seconds: float = 0.0) -> Answer:
    """The answer of a request that failed: its error in one line of at most 300 characters."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Answer(ask.key, seconds=seconds, error=" ".join(text.split())[:300] or "unknown error")
