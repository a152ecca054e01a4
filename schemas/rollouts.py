"""Every rollout of every RL and OPD run, with the reward it earned."""

from schemas.base import BOOL, DOUBLE, INT, STRING, Column, Table

TABLE = Table(
    name="rollouts",
    version="1.0",
    grain="one sample of one training step",
    key=("rollout_id",),
    mode="insert",
    partition_by=("run",),
    layout="one training is read at a time",
    columns=(
        Column("rollout_id", STRING, "run, step, prompt and place in the group"),
        Column("run", STRING, "model in training, with the hash of its configuration and inputs"),
        Column("step", INT, "training step, from 1"),
        Column("prompt_id", STRING, "prompt"),
        Column("sample", INT, "place among the answers to its prompt in this step, from 0"),
        Column("text", STRING, "what the policy wrote", long=True),
        Column("status", STRING, "ok, or the parse failure"),
        Column("reward", DOUBLE, "total"),
        Column("rank_reward", DOUBLE, "ranking part"),
        Column("format_reward", DOUBLE, "format part"),
        Column("advantage", DOUBLE, "group advantage"),
        Column("used", BOOL, "false where the group had no variance and was dropped"),
        Column("tau_incoming", DOUBLE, "Kendall's tau with the incoming order", nullable=True),
        Column("tau_shown", DOUBLE, "Kendall's tau with the order shown", nullable=True),
        Column("ratio", DOUBLE, "mean probability ratio of trainer to sampler", nullable=True),
        Column("completion_tokens", INT, "tokens written"),
    ),
)
