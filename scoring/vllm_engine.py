"""vLLM in this process: batched generation, label scoring, and weights that follow a trainer.

    engine = VLLMEngine(artifact.path, cfg.scoring)

The engine lives in the caller's process (no worker processes: a start takes seconds, and weights can be pushed). It makes
`torch.set_num_threads` a no-op there, so set threads before. Nothing of a generation config is used: what an Ask does not say is vLLM's
own neutral default. Log-probabilities are of the distribution that was sampled from: after temperature. Prompts may hold marks of
items (`scoring.compressed`): give their vectors as `engine.vectors` first.

Shapes: B prompts, T tokens, D hidden size, Y labels.
"""

import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gr2.config import Scoring
from gr2.environment import set_defaults
from gr2.errors import ConfigError, EngineError, ModelError
from gr2.prompts import ANSWER_CLOSE, ANSWER_OPEN, ANSWER_SEPARATOR, END_THINK, THINK
from scoring.compressed import Vectors, encode_marked
from scoring.engine import Answer, Ask, failed
from scoring.model import checked, encode, label_ids, load

CPU_BLOCK = 32  # tokens; by default 128, and what two prompts share would rarely fill one
NEUTRAL = "vllm"  # the generation config of vLLM itself: whatever a model folder says about sampling is not read


class VLLMEngine:
    """One model, loaded once. `path`: a folder that `scoring.model.save` wrote, or any Hugging Face causal LM.

    Raises EngineError where vLLM is not installed or the model cannot be served, ModelError for labels that are not single tokens.
    """

    def __init__(self, path: Path | str, settings: Scoring, max_len: int | None = None) -> None:
        set_defaults()
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache_gib))
        try:
            from vllm import LLM
            from vllm.exceptions import VLLMError
        except ImportError as error:
            raise EngineError(f"vLLM cannot be imported ({error}): install the extra `cpu` or `gpu`") from None
        machine = _machine(settings)
        checked(path)
        self.vectors: Vectors | None = None
        try:
            self._llm = LLM(
                model=str(path),
                dtype=settings.dtype,
                seed=0,
                max_model_len=max_len,
                enable_prefix_caching=True,
                enable_chunked_prefill=False,  # a prompt read in parts rewinds its seeded generator, which the CPU's cannot
                enable_prompt_embeds="latents" in {*settings.models, *settings.live},
                trust_remote_code=False,
                load_format="safetensors",
                generation_config=NEUTRAL,
                logprobs_mode="processed_logprobs",
                max_logprobs=32,
                disable_log_stats=True,
                structured_outputs_config={"backend": "guidance"},  # the one whose grammars count tokens
                **machine,
            )
        except (RuntimeError, ValueError, OSError, VLLMError) as error:
            raise EngineError(f"vLLM cannot serve {path}: {error}") from error
        self._tokenizer: Any = self._llm.get_tokenizer()
        self._failures = (RuntimeError, ValueError, TypeError, VLLMError)  # of a request; vLLM's own are no ValueErrors
        self._limit = int(self._llm.model_config.max_model_len)
        self._labels: dict[tuple[str, ...], list[int]] = {}
        self._several = settings.tensor_parallel > 1

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, with which callers render prompts."""
        return self._tokenizer

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """What the model reads: token ids, and numbers below zero for vectors of marked items. Their count is what a prompt costs."""
        return encode_marked(self._tokenizer, prompts, self.vectors.rows_of if self.vectors else {})

    def generate(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer an ask. A prompt that is empty or leaves no room fails alone; a batch that breaks is retried one by one.

        Raises EngineError where none of several succeeds.
        """
        prompts = self.encode([a.prompt for a in asks])
        answers: dict[int, Answer] = {}
        for place, (ask, ids) in enumerate(zip(asks, prompts, strict=True)):
            if problem := self._problem(ids, ask.max_tokens):
                answers[place] = failed(ask, problem)
        fine = [i for i in range(len(asks)) if i not in answers]
        made = self._batch([asks[i] for i in fine], [prompts[i] for i in fine])
        if len(made) > 1 and all(a.error for a in made):
            raise EngineError(f"vLLM fails on every request: {made[0].error}")
        answers |= dict(zip(fine, made, strict=True))
        return [answers[i] for i in range(len(asks))]

    def label_logprobs(self, prompts: Sequence[str], labels: Sequence[str]) -> NDArray[np.float32]:
        """(B, Y) log-probability of each label as the next token; one prefill a prompt. NaN where a prompt cannot be read or fails."""
        from vllm import SamplingParams

        wanted = self._label_ids(labels)
        ids = self.encode(prompts)
        fine = [i for i in range(len(ids)) if not self._problem(ids[i], 1)]
        result_BY = np.full((len(prompts), len(labels)), np.nan, dtype=np.float32)
        params = SamplingParams(max_tokens=1, temperature=1.0, logprob_token_ids=wanted, detokenize=False)  # the sampled token is not used
        for place, output in zip(fine, self._each([ids[i] for i in fine], [lambda: params] * len(fine)), strict=True):
            if not isinstance(output, Exception):
                found = output.outputs[0].logprobs[0]
                result_BY[place] = [found[token].logprob for token in wanted]
        return result_BY

    def push_weights(self, model: Any) -> None:
        """Takes over a trainer's weights (same architecture) and forgets cached prefixes.

        vLLM packs matrices for the CPU when it loads them. Reloading packs them again, except a head that is tied to the embeddings:
        that one is packed by hand, else it stays stale without a word.
        """
        tied = bool(model.config.tie_word_embeddings)
        weights = ((k, v.detach()) for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight"))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if tied:
            self._llm.apply_model(_repack_head)
        if not self._llm.reset_prefix_cache():
            raise EngineError("the prefix cache could not be emptied after new weights: requests are still running")

    def load_weights(self, path: Path | str) -> None:
        """Becomes another model of the same architecture and vocabulary, in a fraction of a start. Raises ModelError where they differ."""
        if self._several:
            raise ModelError("weights are pushed within one process: with scoring.tensor_parallel a model has an engine of its own")
        model, tokenizer = load(path)
        if tokenizer.get_vocab() != self._tokenizer.get_vocab():
            raise ModelError(f"{path} has another vocabulary than the engine's model")
        mine = self._llm.model_config.hf_config
        if any(
            getattr(mine, k) != getattr(model.config, k) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        ):
            raise ModelError(f"{path} has another architecture than the engine's model")
        self.push_weights(model)

    def close(self) -> None:
        """Gives the model and its cache back."""
        if self.__dict__.pop("_llm", None) is not None:
            gc.collect()

    # -- one batch ------------------------------------------------------------------------------------------------

    def _problem(self, ids: list[int], room: int) -> str:
        if not ids:
            return "the prompt is empty"
        if len(ids) + room > self._limit:
            return f"the prompt has {len(ids)} tokens and {room} more are asked for; the model holds {self._limit}"
        return ""

    def _batch(self, asks: list[Ask], prompts: list[list[int]]) -> list[Answer]:
        started = time.monotonic()
        outputs = self._each(prompts, [partial(self._params, ask) for ask in asks])
        share = (time.monotonic() - started) / max(len(asks), 1)
        return [
            failed(ask, output) if isinstance(output, Exception) else _answer(ask, output, share)
            for ask, output in zip(asks, outputs, strict=True)
        ]

    def _each(self, prompts: list[list[int]], params: Sequence[Callable[[], Any]]) -> list[Any]:
        """The output of each prompt, or its error: a batch that breaks is run again one by one."""
        try:
            return self._run(prompts, [make() for make in params])
        except self._failures as error:
            return [error] if len(prompts) == 1 else [self._each([ids], [make])[0] for ids, make in zip(prompts, params, strict=True)]

    def _run(self, prompts: list[list[int]], params: Any) -> list[Any]:
        if not prompts:
            return []
        # On CPUs vLLM's helpers would be compiled at their first use, for seconds, to count what a line of torch counts as fast.
        with nullcontext() if torch.cuda.is_available() else torch.compiler.set_stance("force_eager"):
            return list(self._llm.generate([self._read(ids) for ids in prompts], params, use_tqdm=False))

    def _read(self, ids: list[int]) -> Any:
        """A prompt as vLLM takes it."""
        from vllm.inputs import EmbedsPrompt, TokensPrompt

        if self.vectors is None or min(ids) >= 0:
            return TokensPrompt(prompt_token_ids=ids)
        said_T = [n >= 0 for n in ids]
        rows = [-n - 1 for n in ids if n < 0]
        dtype: Any = self._llm.model_config.dtype
        embeds_TD = torch.zeros(len(ids), self.vectors.vectors_ND.shape[1], dtype=dtype)
        embeds_TD[~torch.tensor(said_T)] = self.vectors.vectors_ND[rows].to(dtype)
        return EmbedsPrompt(prompt_embeds=embeds_TD, prompt_token_ids=[max(n, 0) for n in ids], prompt_is_token_ids=said_T)

    def _params(self, ask: Ask) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        return SamplingParams(
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            seed=ask.seed,
            logprobs=0 if ask.logprobs else None,  # of the sampled token only
            skip_special_tokens=True,
            spaces_between_special_tokens=False,
            structured_outputs=StructuredOutputsParams(grammar=self._grammar(ask.labels, ask.thought)) if ask.labels else None,
        )

    def _grammar(self, labels: tuple[str, ...], thought: int) -> str:
        """A completion as a grammar of llguidance (Lark) over token ids, as we write it: so it takes a known number of tokens at most."""

        def said(text: str) -> str:
            return " ".join(f"<[{token}]>" for token in encode(self._tokenizer, text))

        label = f"<[{','.join(map(str, self._label_ids(labels)))}]>"
        answer = f"{said(ANSWER_OPEN)} {label} ({said(ANSWER_SEPARATOR)} {label}){{{len(labels) - 1}}} {said(ANSWER_CLOSE)}"
        if not thought:
            return f"start: {answer}"
        return f"start: {said(THINK)} thought {said(END_THINK)} {answer}\nthought[max_tokens={thought}]: /[^<]*/"

    def _label_ids(self, labels: Sequence[str]) -> list[int]:
        key = tuple(labels)
        if key not in self._labels:
            self._labels[key] = label_ids(self._tokenizer, labels)
        return self._labels[key]


def _machine(settings: Scoring) -> dict[str, Any]:
    """Settings of the engine that hold for this kind of machine. Raises ConfigError for those that it cannot follow."""
    if torch.cuda.is_available():
        return {"gpu_memory_utilization": settings.gpu_memory_utilization, "tensor_parallel_size": settings.tensor_parallel}
    if settings.tensor_parallel > 1:
        raise ConfigError("scoring.tensor_parallel is for GPUs and there is none here: leave it at 1, and set scoring.workers")
    return {"enforce_eager": True, "block_size": CPU_BLOCK}


def _answer(ask: Ask, output: Any, seconds: float) -> Answer:
    made = output.outputs[0]
    ids = tuple(made.token_ids)
    return Answer(
        key=ask.key,
        text=made.text,
        prompt_tokens=len(output.prompt_token_ids),
        completion_tokens=len(ids),
        token_ids=ids,
        logprobs=tuple(step[token].logprob for step, token in zip(made.logprobs, ids, strict=True)) if made.logprobs else (),
        prompt_token_ids=tuple(output.prompt_token_ids),
        seconds=seconds,
    )


def _repack_head(model: Any) -> None:
    head = model.lm_head
    head.quant_method.process_weights_after_loading(head)
