"""The losses of SFT, RL, on-policy distillation and reasoning distillation, as pure functions of log-probabilities.

Shapes: B rows, T tokens of a row, P prompts, G samples of a prompt, N labels. All log-probabilities are natural and float32.
"""

import torch

EPSILON = 1e-4  # added to a group's standard deviation, as in TRL's GRPO


def sft_loss(logp_BT: torch.Tensor, weights_BT: torch.Tensor, norm: float | None = None) -> torch.Tensor:
    """`-w_r * sum log p(reasoning) - w_o * sum log p(answer)` (GR2, arXiv 2602.07774), over the sum of the weights.

    `weights_BT` holds w_r on tokens of the thought, w_o on tokens of the answer and 0 elsewhere. Dividing keeps the learning rate's
    meaning when a batch holds more or fewer answers; `norm` is the sum of the whole step, where this is one micro-batch of several.
    """
    return -(weights_BT * logp_BT).sum() / (norm if norm is not None else weights_BT.sum().clamp_min(1e-8))


def group_advantages(rewards_PG: torch.Tensor, scaled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`r - mean` within each group, over `std + eps` where `scaled` (DAPO, arXiv 2503.14476, eq. 9 and 11), and which groups have variance.

    Groups of equal rewards teach nothing: their advantages are 0 and `kept_P` is False, so that the caller can draw others. Dividing lets
    a group in which little is at stake weigh as much as one in which much is (Dr. GRPO, arXiv 2503.20783).
    """
    spread_P = rewards_PG.std(dim=1, correction=1) if rewards_PG.shape[1] > 1 else torch.zeros(len(rewards_PG))
    kept_P = spread_P > 1e-6
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    advantages_PG = centred_PG / (spread_P[:, None] + EPSILON) if scaled else centred_PG
    return torch.where(kept_P[:, None], advantages_PG, 0.0), kept_P


def truncated_ratio(trainer_logp_BT: torch.Tensor, sampler_logp_BT: torch.Tensor, cap: float) -> torch.Tensor:
    """min(p_trainer / p_sampler, cap): corrects for the engine that sampled being numerically not the model that trains. No gradient."""
    return torch.exp(trainer_logp_BT.detach() - sampler_logp_BT).clamp_max(cap)


def dapo_loss(
    logp_BT: torch.Tensor,
    old_logp_BT: torch.Tensor,
    advantages_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    correction_BT: torch.Tensor | None = None,
    tokens: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """The clipped surrogate of DAPO (arXiv 2503.14476, eq. 8): token-level normalisation, asymmetric clip, no KL term.

    `loss = -1/M * sum_t c_t * min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)` with r_t = exp(logp - old_logp), c_t the truncated
    trainer-to-sampler ratio (1 without `correction_BT`) and M the tokens of the whole batch: pass `tokens` where the batch is cut into
    micro-batches, so that the parts add up to the whole.
    """
    ratio_BT = torch.exp(logp_BT - old_logp_BT)
    clipped_BT = ratio_BT.clamp(1.0 - clip_low, 1.0 + clip_high)
    gain_BT = torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    if correction_BT is not None:
        gain_BT = gain_BT * correction_BT
    total = mask_BT.sum().clamp_min(1) if tokens is None else tokens
    return -(gain_BT * mask_BT).sum() / total


def opd_advantages(student_logp_BT: torch.Tensor, teacher_logp_BT: torch.Tensor, beta: float, clip: tuple[float, float]) -> torch.Tensor:
    """`A_t = -beta * (log p_student - log p_teacher)`, clipped (METHOD of GR2's technical report, arXiv 2606.31984): the reverse KL's own
    policy gradient, one token at a time. High where the teacher likes the token better than the student does. No gradient."""
    return (-beta * (student_logp_BT - teacher_logp_BT)).detach().clamp(*clip)


def soft_label_loss(student_logp_BN: torch.Tensor, teacher_logp_BN: torch.Tensor) -> torch.Tensor:
    """(B,) KL(teacher || student) over the labels at one answer position.

    The teacher is renormalised over the labels, the student is not: mass that it puts on anything but a label is paid for. Both are finite;
    a label of no probability has a very low log-probability.
    """
    teacher_BN = torch.log_softmax(teacher_logp_BN.float(), dim=-1)
    return (teacher_BN.exp() * (teacher_BN - student_logp_BN)).sum(-1)
