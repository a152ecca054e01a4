"""Stage `opd`: on-policy distillation from the RL-trained teacher, alone and with the ranking reward in one loss (METHOD 7; GKD, arXiv
2306.13649; GR2's technical report, arXiv 2606.31984).

Reads `rl_prompts`, the student `sft` and the teacher `rl-teacher` (larger, same vocabulary: checked at the start). The student samples, the
teacher scores each token of it in one forward pass; `A_t = -beta (log p_student - log p_teacher)`, clipped to `opd.clip`.
Writes the models `opd` (that advantage alone) and `opd+rl` (plus `opd.rl_weight` times the ranking advantage of the group), and the
rollouts of both, as the stage `rl` does, with the same guarantees for reruns and kills.

    gr2 stage opd --profile demo
"""

from gr2.config import Config
from gr2.context import Context, Result
from training.rl import Plan, optimise


def run(cfg: Config, ctx: Context) -> Result:
    """Trains both; without a teacher none. Raises MissingInputError, ModelError (different vocabularies), InputError (no prompts),
    EngineError."""
    if cfg.models.teacher is None:
        ctx.log("opd: models.teacher is null, so nobody teaches")
        return Result()
    student, teacher = ctx.model("sft"), ctx.model("rl-teacher")
    result = Result(rows_in=ctx.lake.read("rl_prompts", ["prompt_id"]).num_rows)
    for name, weight in (("opd", 0.0), ("opd+rl", cfg.opd.rl_weight)):
        optimise(cfg, ctx, Plan(name, student, cfg.opd.train, rank_weight=weight, teacher=teacher), result)
    return result
