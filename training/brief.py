"""The text form of the context compressor: a policy that leaves words of a context out (METHOD 9). Part of the stage `latents`.

The policy (`scoring.compressed.Shortener`) keeps or drops each piece of a prompt between the instructions and the question. It learns by
policy gradient: several drafts a prompt, each paid for the tokens it saves and for the share of the frozen model's N@3 that it keeps
(`gr2.rewards.compression_reward`); advantages are those within a prompt's group. What the tokens saved are worth is a sum over pieces, so
its gradient is taken exactly; that of the rest of the reward is estimated. It only deletes: a small model from scratch cannot rewrite a
text in other words.

Shapes: B prompts, P pieces of a prompt, Y labels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gr2.artifacts import Artifact
from gr2.config import Config
from gr2.context import Context
from gr2.metrics import kendall_tau, ndcg_at
from gr2.prompts import ANSWER_OPEN, EMPTY_THOUGHT, LABELS, Template
from gr2.rewards import compression_reward
from scoring.compressed import Piece, Shortener, joined, pieces, read, save, shortened
from scoring.model import encode_all, label_logprobs
from training.fitting import manifest_of, publishing
from training.loop import train
from training.losses import group_advantages
from training.rollouts import MOST, Deck, Task, read_tasks

Orders = Sequence[Sequence[str]]  # labels, best first

REFERENCE = 256  # prompts that say what the full context's N@3 is


def fit(cfg: Config, ctx: Context, model: Any, tokenizer: Any, base: Artifact, template: Template) -> dict[str, Any]:
    """Trains and publishes `brief` against the frozen model; returns what was measured on held-out prompts."""
    settings = cfg.latents.brief
    splits = (("rerank", MOST), ("valid", cfg.latents.validate_requests))
    learn, held_out = ([asked(task, template) for task in read_tasks(ctx, split, most)] for split, most in splits)
    some = Deck(learn, cfg.seed).take(min(REFERENCE, len(learn)))
    full = float(ndcg_at([rank_of(task, order) for task, order in zip(some, orders(model, tokenizer, some), strict=True)], 3).mean())
    policy = Shortener(model.get_input_embeddings().weight.shape[0])
    lengths = [len(ids) for ids in encode_all(tokenizer, [task.prompt for task in some])]
    deck, size = Deck(learn, cfg.seed), max(1, settings.tokens_per_batch // (cfg.latents.group * max(lengths)))
    inputs = {"tables": {"rl_prompts": ctx.lake.content_version("rl_prompts")}, "models": {"rl": base.hash}}
    manifest = manifest_of(cfg, "latents", "brief", settings, inputs)
    drafts = Drafts(model, tokenizer, template, cfg.latents.group, cfg.latents.alpha, full or 1.0, settings.accumulation)
    with publishing(ctx, "brief", manifest) as folder:
        train(
            policy,
            (deck.take(size) for _ in itertools.count()),
            drafts.loss,
            settings,
            folder=folder,
            total_steps=max(1, settings.max_steps),
            ctx=ctx,
            seed=cfg.seed,
            fingerprint=manifest["fingerprint"],
            label="brief",
        )
        after = measure(model, policy, tokenizer, template, held_out)
        manifest |= {"after": after}
        save(folder, policy, base.id, template)
    ctx.log(
        f"brief: {after['saved']:.0%} fewer prompt tokens; ndcg3 {after['ndcg3_full']:.3f} -> {after['ndcg3']:.3f}, tau {after['tau']:.3f}"
    )
    return {"brief": after}


def asked(task: Task, template: Template) -> Task:
    """The task as the mode `score` asks it."""
    return replace(task, prompt=direct_form(task.prompt, template) + EMPTY_THOUGHT + ANSWER_OPEN)


def direct_form(prompt: str, template: Template) -> str:
    """A prompt that asks for a thought, as one that does not."""
    head, found, tail = prompt.rpartition(template.closing["think"])
    if not found:
        return prompt
    return head.replace(f" {template.steps}", "", 1) + template.closing["direct"] + tail


@dataclass(frozen=True)
class Drafts:
    """What the policy is paid for. `full`: mean N@3 of the frozen model on whole contexts, so that a draft's share of it is kept N@3."""

    model: Any
    tokenizer: Any
    template: Template
    group: int
    alpha: float
    full: float
    accumulation: int

    def loss(self, policy: Shortener, batch: Sequence[Task]) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        """The negative gradient of the mean reward, one of `accumulation` shares of a step, with the mean reward and its parts."""
        cut = [pieces(task.prompt, self.template) for task in batch]
        whole = [len(ids) for ids in encode_all(self.tokenizer, [task.prompt for task in batch])]
        drawn = [self._drawn(policy, found, long) for found, long in zip(cut, whole, strict=True)]
        texts = [joined(found, row) for found, (kept_GP, _, _) in zip(cut, drawn, strict=True) for row in kept_GP.tolist()]
        repeated = [task for task in batch for _ in range(self.group)]
        self.model.eval()
        ordered = orders(self.model, self.tokenizer, [replace(task, prompt=text) for task, text in zip(repeated, texts, strict=True)])
        judges = ndcg_at([rank_of(task, order) for task, order in zip(repeated, ordered, strict=True)], 3) / self.full
        saved = [1 - len(ids) / long for ids, long in zip(encode_all(self.tokenizer, texts), np.repeat(whole, self.group), strict=True)]
        paid = [compression_reward(text, s, judge, self.alpha) for text, s, judge in zip(texts, saved, judges.tolist(), strict=True)]
        rest_BG = (torch.tensor(paid) - self.alpha * torch.tensor(saved)).reshape(len(batch), self.group)
        advantages_BG = group_advantages(rest_BG, scaled=False)[0].to(policy.device)
        gain = (torch.stack([logp_G for _, logp_G, _ in drawn]) * advantages_BG).mean()
        gain = gain - self.alpha * torch.stack([share for _, _, share in drawn]).mean()
        figures = {"reward": float(np.mean(paid)), "kept_ndcg3": float(judges.mean()), "saved": float(np.mean(saved))}
        return -gain / self.accumulation, {name: value / self.accumulation for name, value in figures.items()}

    def _drawn(self, policy: Shortener, found: Sequence[Piece], long: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(kept_GP, logp_G, share): drafts, the log-probability of each, and the share of `long` tokens that is kept on average."""
        ids = read(self.tokenizer, found)
        logits_P = policy(found, ids)
        free_P = torch.isfinite(logits_P)
        odds_F = logits_P[free_P]
        drawn_GF = torch.bernoulli(torch.sigmoid(odds_F.detach()).expand(self.group, -1))
        kept_GP = torch.ones(self.group, len(found), dtype=torch.bool)
        kept_GP[:, free_P.cpu()] = drawn_GF.bool().cpu()
        logp_GF = -torch.nn.functional.binary_cross_entropy_with_logits(odds_F.expand(self.group, -1), drawn_GF, reduction="none")
        sizes_F = torch.tensor([len(own) for own in ids])
        return kept_GP, logp_GF.sum(1), (torch.sigmoid(odds_F) * sizes_F.to(policy.device)).sum() / long


def orders(model: Any, tokenizer: Any, tasks: Sequence[Task]) -> list[list[str]]:
    """The labels of each prompt, best first by the frozen model."""
    logp_BY = label_logprobs(model, tokenizer, [task.prompt for task in tasks], list(LABELS), bf16=True)
    return [order_of(task, logp_Y) for task, logp_Y in zip(tasks, logp_BY.tolist(), strict=True)]


def order_of(task: Task, logp_Y: Sequence[float]) -> list[str]:
    """The task's labels, best first, by the log-probabilities of all labels."""
    logp = dict(zip(LABELS, logp_Y, strict=True))
    return sorted(task.incoming, key=lambda label: (-logp[label], label))


def rank_of(task: Task, order: Sequence[str]) -> int:
    """The target's place in an order, from 1."""
    return list(order).index(task.incoming[int(np.argmax(task.grades))]) + 1


def measure(model: Any, policy: Shortener, tokenizer: Any, template: Template, held_out: Sequence[Task]) -> dict[str, float]:
    """What shorter prompts are worth on held-out requests."""
    short = shortened(policy, tokenizer, template, [task.prompt for task in held_out])
    sides = [list(held_out), [replace(task, prompt=prompt) for task, prompt in zip(held_out, short, strict=True)]]
    full, less = (orders(model, tokenizer, tasks) for tasks in sides)
    tokens = [sum(len(ids) for ids in encode_all(tokenizer, [task.prompt for task in tasks])) for tasks in sides]
    return compared(held_out, full, less, *tokens)


def compared(tasks: Sequence[Task], full: Orders, less: Orders, tokens_full: int, tokens: int) -> dict[str, float]:
    """Orders by compressed prompts against those by full ones: agreement on the first label and on the order, N@3, tokens saved."""
    ndcg = {
        name: float(ndcg_at([rank_of(t, o) for t, o in zip(tasks, ordered, strict=True)], 3).mean())
        for name, ordered in (("ndcg3_full", full), ("ndcg3", less))
    }
    return {
        "same_first": float(np.mean([a[0] == b[0] for a, b in zip(full, less, strict=True)])),
        "tau": float(np.mean([kendall_tau(a, b) for a, b in zip(full, less, strict=True)])),
        **ndcg,
        "tokens_full": tokens_full / len(tasks),
        "tokens": tokens / len(tasks),
        "saved": 1 - tokens / tokens_full,
    }
