"""Rollouts of a policy: draw prompts, sample groups, judge them, keep them on disk. Shared by RL and on-policy distillation.

    deck = Deck(prompts, seed=13)
    rollouts = collect(engine, deck, cfg, step=1, run="rl-0123456789ab")       # drops groups without variance, refills
    store(rollouts, ctx.work("rollouts", run) / "step-00001.arrow")            # before the update: a killed step takes them up again

Token in, token out: what is trained on are the token ids that the sampler produced, never a second encoding of the text.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch

import schemas
from gr2.answers import parse
from gr2.clicks import weighted_grade
from gr2.config import Config, Prompt
from gr2.context import Context
from gr2.draws import seed_of
from gr2.errors import EngineError, InputError
from gr2.metrics import kendall_tau, values
from gr2.rewards import overlong, reward
from schemas.base import FLOAT, INT, list_of
from scoring.engine import Answer, Ask
from training.losses import group_advantages

# Beside the columns of the table `rollouts`: what a resumed step needs to train on the very same tokens, and to log the same.
TOKENS = (pa.field("token_ids", list_of(INT)), pa.field("logprobs", list_of(FLOAT)), pa.field("prompt_token_ids", list_of(INT)))
LOGGED = (pa.field("first_slot", INT),)
MOST = 100_000  # prompts in memory, where a training does not say how many it draws
COLUMNS = ("prompt_id", "prompt", "mode", "incoming", "shown", "grades", "weights", "evidence")
T = TypeVar("T")


class Sampling(Protocol):
    """What rollouts are drawn from: an engine, or a policy in training."""

    def generate(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer an ask, in the same order."""
        ...


@dataclass(frozen=True)
class Task:
    """A prompt with what its verifier needs: a row of `rl_prompts`.

    Where clicks were debiased, `paid` are the grades whose gains are weighed: what a click counts against others of its list. Rewards are
    shares of a list's best, so they cannot say what it counts against other lists: that is `weight` (of all that are read 1 on
    average), which scales its advantages.
    """

    prompt_id: str
    prompt: str
    mode: Any
    incoming: tuple[str, ...]
    shown: tuple[str, ...]
    grades: tuple[float, ...]
    evidence: tuple[str, ...]
    paid: tuple[float, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """One sample: the columns of the table `rollouts`, its tokens with the sampler's log-probabilities, and what is only logged."""

    rollout_id: str
    run: str
    step: int
    prompt_id: str
    sample: int
    text: str
    status: str
    reward: float
    rank_reward: float
    format_reward: float
    advantage: float
    used: bool
    tau_incoming: float | None
    tau_shown: float | None
    ratio: float | None
    completion_tokens: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    prompt_token_ids: tuple[int, ...]
    first_slot: int | None = None  # where the first label was shown, from 0


def read_tasks(ctx: Context, split: str, most: int = MOST) -> list[Task]:
    """The prompts of a split in order of reading, which is that of a hash: the first `most` are a sample, and only they are held in memory.

    Raises InputError where there are none.
    """
    table = ctx.lake.read("rl_prompts", list(COLUMNS), order_by=["ordinal", "prompt_id"], most=most, split=split)
    if not table.num_rows:
        raise InputError(
            f"rl_prompts holds no prompt of split {split!r}: no list of that split has its target; raise candidates.n or the data"
        )
    tasks = [Task(**_tuples(_weighted(row))) for row in table.to_pylist()]
    usual = float(np.mean([task.weight for task in tasks]))
    return [replace(task, weight=task.weight / usual) for task in tasks]


def _weighted(row: dict[str, Any]) -> dict[str, Any]:
    """A prompt with the weights that a debiased log gave its candidates: of each grade, and the mean over what was clicked."""
    weights, grades = row.pop("weights"), row["grades"]
    if not weights or not any(grades):
        return row
    gains = [2.0**grade - 1.0 for grade in grades]
    return row | {"paid": list(map(weighted_grade, grades, weights)), "weight": float(np.average(weights, weights=gains))}


class Deck(Generic[T]):
    """Prompts drawn without replacement, reshuffled with a seed when all were drawn. Where it stands is one number."""

    def __init__(self, tasks: Sequence[T], seed: int) -> None:
        self.tasks, self.seed, self.taken = tasks, seed, 0

    def take(self, count: int) -> list[T]:
        """The next prompts."""
        places = range(self.taken, self.taken + count)
        self.taken += count
        return [self.tasks[self._order(place // len(self.tasks))[place % len(self.tasks)]] for place in places]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.tasks))


def limit_of(settings: Prompt, mode: str) -> int:
    """Tokens that a completion may have: thought with its two tags, answer, end token."""
    return settings.max_answer_tokens + (settings.max_thought_tokens + 3 if mode == "think" else 1)


def collect(engine: Sampling, deck: Deck[Task], cfg: Config, step: int, run: str, *, need_variance: bool = True) -> list[Rollout]:
    """The rollouts of a step: groups until `rl.prompts_per_step` have any variance of reward, or the refills are used up (DAPO).

    Groups without variance stay in the list with `used` False. Without `need_variance` (on-policy distillation) every group is used.
    """
    found: list[Rollout] = []
    kept, seen = 0, Counter[str]()
    for _ in range(1 + (cfg.rl.max_refills if need_variance else 0)):
        if kept >= cfg.rl.prompts_per_step:
            break
        tasks = deck.take(cfg.rl.prompts_per_step - kept)
        drawn = sample(engine, tasks, cfg, step, run, seen)
        drawn = with_advantages(drawn, cfg.rl.group, cfg.rl.scaled, need_variance, [task.weight for task in tasks])
        kept += sum(r.used for r in drawn) // cfg.rl.group
        found += drawn
    return found


def sample(engine: Sampling, tasks: Sequence[Task], cfg: Config, step: int, run: str, seen: Counter[str]) -> list[Rollout]:
    """A group of answers to each prompt, judged. Raises EngineError where the engine could not answer.

    `seen`: answers of this step by prompt. A deck that is reshuffled within a step may hold a prompt twice: its answers are counted on.
    """
    drawn: list[tuple[Task, int]] = []
    for task in tasks:
        first = seen[task.prompt_id]
        drawn += [(task, place) for place in range(first, first + cfg.rl.group)]
        seen[task.prompt_id] += cfg.rl.group
    asks = [
        Ask(
            f"{run}/{step}/{task.prompt_id}/{place}",
            task.prompt,
            limit_of(cfg.prompt, task.mode),
            cfg.rl.temperature,
            seed_of("rollout", cfg.seed, step, task.prompt_id, place),  # not of the run: its hash changes with every line of code
            logprobs=True,
        )
        for task, place in drawn
    ]
    return [judge(task, answer, cfg, step, run, place) for (task, place), answer in zip(drawn, _answers(engine, asks), strict=True)]


def _answers(engine: Sampling, asks: Sequence[Ask]) -> list[Answer]:
    """The engine's answers. Raises EngineError where it could not answer: that is no failure of the policy."""
    answers = engine.generate(asks)
    if broken := [a.error for a in answers if a.error]:
        raise EngineError(f"{len(broken)} of {len(asks)} answers failed in the engine, such as: {broken[0]}")
    return answers


def judge(task: Task, answer: Answer, cfg: Config, step: int, run: str, place: int) -> Rollout:
    """Parses an answer strictly and pays it: the reward of METHOD 8 and, for valid answers, DAPO's soft punishment of length."""
    parsed = parse(answer.text, task.incoming, task.mode)
    grades = task.grades if cfg.rl.reward == "gr2" else task.paid or task.grades  # `gr2` knows one target: the best grade as it came
    paid = reward(cfg.rl.reward, task.incoming, task.shown, grades, parsed, task.evidence, cfg.rl, cfg.prompt.max_thought_tokens)
    long = 0.0
    if parsed.order is not None and cfg.rl.overlong_tokens:
        long = cfg.rl.overlong_weight * overlong(len(answer.token_ids), limit_of(cfg.prompt, task.mode), cfg.rl.overlong_tokens)
    return Rollout(
        rollout_id=answer.key,
        run=run,
        step=step,
        prompt_id=task.prompt_id,
        sample=place,
        text=answer.text,
        status=parsed.status,
        reward=paid.total + long,
        rank_reward=paid.rank,
        format_reward=paid.format,
        advantage=0.0,
        used=True,
        tau_incoming=kendall_tau(parsed.order, task.incoming) if parsed.order else None,
        tau_shown=kendall_tau(parsed.order, task.shown) if parsed.order else None,
        ratio=None,
        completion_tokens=len(answer.token_ids),
        token_ids=answer.token_ids,
        logprobs=answer.logprobs,
        prompt_token_ids=answer.prompt_token_ids,
        first_slot=task.shown.index(parsed.order[0]) if parsed.order else None,
    )


def with_advantages(
    rollouts: Sequence[Rollout], group: int, scaled: bool, need_variance: bool = True, weights_P: Sequence[float] | None = None
) -> list[Rollout]:
    """Advantages within each group (consecutive rollouts), times its weight; groups without variance are marked unused."""
    rewards_PG = torch.tensor([r.reward for r in rollouts]).reshape(-1, group)
    advantages_PG, kept_P = group_advantages(rewards_PG, scaled)
    if weights_P is not None:
        advantages_PG = advantages_PG * torch.tensor(weights_P)[:, None]
    flat, kept = advantages_PG.flatten().tolist(), kept_P.repeat_interleave(group).tolist()
    return [replace(r, advantage=a, used=k or not need_variance) for r, a, k in zip(rollouts, flat, kept, strict=True)]


# -- files ------------------------------------------------------------------------------------------------------------


def store(rollouts: Sequence[Rollout], path: Path) -> None:
    """Writes an Arrow file, whole or not at all."""
    schema = pa.schema([*schemas.get("rollouts").arrow(), *TOKENS, *LOGGED])
    table = pa.Table.from_pylist([asdict(r) for r in rollouts], schema=schema)
    temporary = path.with_suffix(".part")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    os.replace(temporary, path)


def load(path: Path) -> list[Rollout]:
    """What `store` wrote."""
    with pa.memory_map(str(path)) as source:
        rows = pa.ipc.open_file(source).read_all().to_pylist()
    return [Rollout(**_tuples(row)) for row in rows]


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}


# -- figures ----------------------------------------------------------------------------------------------------------


def figures(rollouts: Sequence[Rollout], limit: int) -> dict[str, float]:
    """What a step's log line tells of its rollouts: rewards, failures, copies (`first_shown`: of the first slot alone), likeness to both
    orders, length."""
    taus = {name: [getattr(r, name) for r in rollouts if getattr(r, name) is not None] for name in ("tau_incoming", "tau_shown")}
    count = max(1, len(rollouts))
    return {
        "reward": _mean([r.reward for r in rollouts]),
        "rank_reward": _mean([r.rank_reward for r in rollouts]),
        "format_reward": _mean([r.format_reward for r in rollouts]),
        "invalid": sum(r.status != "ok" for r in rollouts) / count,
        "identity": sum(t == 1.0 for t in taus["tau_incoming"]) / count,
        "copy_shown": sum(t == 1.0 for t in taus["tau_shown"]) / count,
        "first_shown": sum(r.first_slot == 0 for r in rollouts) / count,
        "tau_incoming": _mean(taus["tau_incoming"]),
        "tau_shown": _mean(taus["tau_shown"]),
        "length": _mean([r.completion_tokens for r in rollouts]),
        "at_limit": sum(r.completion_tokens >= limit for r in rollouts) / count,
        "dropped": sum(not r.used for r in rollouts) / count,
        "rollouts": len(rollouts),
    }


def alarms(line: dict[str, float]) -> list[str]:
    """What a person should look at: the signs of a policy that collapses or hacks its reward."""
    signs = {
        "invalid answers": line["invalid"] > 0.3,
        "copies the incoming order": line["identity"] > 0.5,
        "copies the order shown": line["copy_shown"] > 0.2,
        "answers run into the limit": line["at_limit"] > 0.1,
        "no group had variance": line["dropped"] >= 1.0,
        "trainer and sampler disagree": abs(line.get("ratio", 1.0) - 1.0) > 0.05,
    }
    return [name for name, seen in signs.items() if seen]


def validate(engine: Sampling, tasks: Sequence[Task], cfg: Config) -> dict[str, float]:
    """Greedy answers to held-out prompts: mean R@1 and N@3 (an invalid answer counts 0), invalid and copy rates.

    Raises EngineError where the engine could not answer.
    """
    asks = [Ask(t.prompt_id, t.prompt, limit_of(cfg.prompt, t.mode), 0.0, 0) for t in tasks]
    ranks, invalid, copies = [], 0, 0
    for task, answer in zip(tasks, _answers(engine, asks), strict=True):
        order = parse(answer.text, task.incoming, task.mode).order
        grade_of = dict(zip(task.incoming, task.grades, strict=True))
        ranks.append(next((p for p, label in enumerate(order, 1) if grade_of[label] == max(task.grades)), math.nan) if order else math.nan)
        invalid += order is None
        copies += order == task.incoming
    figures_ = {
        name: float(values(metric, ranks).mean()) for name, metric in (("recall1", "recall@1"), ("ndcg3", "ndcg@3"), ("mrr", "mrr"))
    }
    return {**figures_, "invalid": invalid / len(tasks), "identity": copies / len(tasks)}


def _mean(numbers: Sequence[float]) -> float:
    return float(np.mean(numbers)) if len(numbers) else 0.0
