"""Losses against plain loops over the published formulas (TRL's `loss_type="dapo"` written out), and their properties."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import losses

pytestmark = pytest.mark.unit
FLOATS = st.floats(-4, 4, width=32)


def test_sft_loss_is_the_weighted_sum_of_two_parts():
    logp = torch.tensor([[-1.0, -2.0, -3.0, -4.0]])
    weights = torch.tensor([[0.0, 0.3, 0.3, 1.0]])  # prompt, reasoning, reasoning, answer
    assert losses.sft_loss(logp, weights).item() == pytest.approx((0.3 * 5 + 1.0 * 4) / 1.6)
    assert losses.sft_loss(logp, weights, norm=3.2).item() == pytest.approx((0.3 * 5 + 1.0 * 4) / 3.2)
    assert losses.sft_loss(logp, torch.zeros(1, 4)).item() == 0.0


def test_group_advantages_standardise_and_drop_equal_groups():
    rewards = torch.tensor([[1.0, 0.0, 0.0, -1.0], [0.5, 0.5, 0.5, 0.5]])
    advantages, kept = losses.group_advantages(rewards, scaled=True)
    assert kept.tolist() == [True, False]
    assert advantages[1].tolist() == [0.0] * 4
    sample_std = math.sqrt((1 + 1) / 3)
    np.testing.assert_allclose(advantages[0].numpy(), np.array([1, 0, 0, -1]) / (sample_std + 1e-4), rtol=1e-6)


def test_unscaled_advantages_keep_what_is_at_stake():
    rewards = torch.tensor([[1.0, 0.0], [0.0, -0.02], [0.3, 0.3]])
    advantages, kept = losses.group_advantages(rewards, scaled=False)
    torch.testing.assert_close(advantages, torch.tensor([[0.5, -0.5], [0.01, -0.01], [0.0, 0.0]]))
    assert kept.tolist() == [True, True, False]


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-2, 2, width=32)), st.floats(-5, 5), st.floats(0.5, 3))
@settings(max_examples=50, deadline=None)
def test_group_advantages_ignore_shift_and_nearly_scale(rewards, shift, scale):
    rewards = torch.tensor(rewards).double().round(decimals=2)
    first, kept = losses.group_advantages(rewards, scaled=True)
    second, kept_too = losses.group_advantages(rewards * scale + shift, scaled=True)
    assert kept.tolist() == kept_too.tolist()
    torch.testing.assert_close(first, second, atol=0.05, rtol=0.05)  # EPSILON is not scaled
    assert torch.all(first.sum(1).abs() < 1e-5)


def trl_dapo(logp, old, sampler, advantages, mask, low, high, cap, items):
    """TRL 1.16 `GRPOTrainer._compute_loss` for loss_type "dapo" with truncated importance sampling, one token at a time."""
    total = 0.0
    for i, j in zip(*np.nonzero(mask), strict=True):
        ratio = math.exp(logp[i, j] - old[i, j])
        clipped = min(max(ratio, 1 - low), 1 + high)
        loss = -min(ratio * advantages[i, j], clipped * advantages[i, j])
        total += loss * min(math.exp(old[i, j] - sampler[i, j]), cap)
    return total / items


@given(hnp.arrays(np.float64, (4, 2, 6), elements=st.floats(-4, 0)), hnp.arrays(np.bool_, (2, 6)), st.floats(1.0, 4.0))
@settings(max_examples=80, deadline=None)
def test_dapo_equals_the_written_out_loop(values, mask, cap):
    logp, old, sampler, advantages = values
    advantages = advantages + 2.0
    correction = losses.truncated_ratio(torch.tensor(old), torch.tensor(sampler), cap)
    items = max(mask.sum(), 1)
    ours = losses.dapo_loss(
        *map(torch.tensor, (logp, old, advantages, mask)), clip_low=0.2, clip_high=0.28, correction_BT=correction, tokens=float(items)
    )
    assert ours.item() == pytest.approx(trl_dapo(logp, old, sampler, advantages, mask, 0.2, 0.28, cap, items), rel=1e-9, abs=1e-9)


def test_dapo_micro_batches_add_up_and_long_answers_weigh_by_token():
    logp, old, advantages = torch.randn(3, 4, 5).unbind(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    settings_ = {"clip_low": 0.2, "clip_high": 0.28}
    whole = losses.dapo_loss(logp, old, advantages, mask, **settings_)
    halves = (slice(0, 2), slice(2, 4))
    parts = [losses.dapo_loss(logp[h], old[h], advantages[h], mask[h], tokens=8, **settings_) for h in halves]
    torch.testing.assert_close(whole, sum(parts))


@pytest.mark.parametrize(("change", "advantage", "moves"), [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, -1.0, False), (-0.5, 1.0, True)])
def test_dapo_clips_only_what_already_moved_enough(change, advantage, moves):
    logp = torch.tensor([[change]], requires_grad=True)
    losses.dapo_loss(logp, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), clip_low=0.2, clip_high=0.28).backward()
    assert (logp.grad.abs().item() > 0) == moves


def test_on_policy_gradient_is_the_policy_gradient():
    """At ratio 1 the surrogate's gradient is -A/M for each token: REINFORCE, token by token."""
    logp = torch.randn(2, 3, requires_grad=True)
    advantages = torch.randn(2, 3)
    losses.dapo_loss(logp, logp.detach(), advantages, torch.ones(2, 3), clip_low=0.2, clip_high=0.28).backward()
    torch.testing.assert_close(logp.grad, -advantages / 6)


def test_truncated_ratio_is_one_on_policy_and_capped():
    logp = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    ratio = losses.truncated_ratio(logp, torch.tensor([[-1.0, -9.0]]), 2.0)
    assert ratio.tolist() == [[1.0, 2.0]]
    assert not ratio.requires_grad


def test_opd_advantages_follow_the_formula_and_the_clip():
    student, teacher = torch.tensor([-1.0, -0.1, -40.0]), torch.tensor([-2.0, -60.0, -0.1])
    assert losses.opd_advantages(student, teacher, 0.5, (-30.0, 5.0)).tolist() == pytest.approx([-0.5, -29.95, 5.0])
    assert losses.opd_advantages(student, teacher, 1.0, (-30.0, 5.0))[1].item() == -30.0


def test_opd_gradient_is_the_reverse_kl_gradient():
    """Summed over all tokens weighted by p_student, the surrogate's gradient is that of KL(student || teacher)."""
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    teacher = torch.log_softmax(torch.randn(7, dtype=torch.float64), 0)
    student = torch.log_softmax(logits, 0)
    advantages = losses.opd_advantages(student, teacher, 1.0, (-100.0, 100.0))
    (exact,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits, retain_graph=True)
    (ours,) = torch.autograd.grad(-(student.exp().detach() * advantages * student).sum(), logits)
    torch.testing.assert_close(exact, ours)


def test_soft_label_loss_is_kl_and_charges_lost_mass():
    teacher = torch.log_softmax(torch.randn(3, 4), -1)
    torch.testing.assert_close(losses.soft_label_loss(teacher, teacher), torch.zeros(3), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(losses.soft_label_loss(teacher - math.log(2), teacher - 7.0), torch.full((3,), math.log(2)))
    other = torch.log_softmax(torch.randn(3, 4), -1)
    theirs, ours = (torch.distributions.Categorical(logits=logits) for logits in (teacher, other))
    torch.testing.assert_close(losses.soft_label_loss(other, teacher), torch.distributions.kl_divergence(theirs, ours))


def test_a_label_without_probability_costs_nothing():
    student, teacher = torch.log_softmax(torch.randn(2, 4), -1), torch.randn(2, 4)
    teacher[:, 3] = -1e4
    torch.testing.assert_close(losses.soft_label_loss(student, teacher), losses.soft_label_loss(student[:, :3], teacher[:, :3]))
