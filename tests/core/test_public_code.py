"""Formulas of public code beside the kl_type that the documentation names for them.

Each is written down as the formula that the code has, in float64, and differentiated as it stands.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from klplug import kl_term
from klplug.papers import PAPERS

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).double()


def four_policies() -> tuple[Tensor, ...]:
    """Log-probs of the same tokens: policy, teacher, base, and the policy that sampled them."""
    draw = torch.Generator().manual_seed(5)
    policy, teacher, base, noise = -2 * torch.rand(4, *MASK.shape, generator=draw).double()
    return policy.requires_grad_(), teacher, base, policy.detach() + 0.4 * (noise + 1)


def gradient(loss: Tensor, policy: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, policy)
    return found


def ours(kl_type: str, policy: Tensor, **given: Tensor | None) -> Tensor:
    ref = given.pop("ref", None)
    return gradient(kl_term(kl_type, policy, ref, MASK, **given).loss.sum(), policy)


def surrogate(ratio: Tensor, advantage: Tensor) -> Tensor:
    """PPO's, with a clip of 0.2."""
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


@pytest.mark.parametrize("factor", [1.0, 1.25, 0.5])
def test_g_opd_at_the_first_update_of_a_step(factor: float) -> None:
    """RUCBM/G-OPD, dp_actor.py: A = -(old - base - lambda (teacher - base)), in PPO's loss."""
    policy, teacher, base, _ = four_policies()
    old = policy.detach()
    advantage = -((old - base) - factor * (teacher - base))
    theirs = gradient((surrogate((policy - old).exp(), advantage) * MASK).sum(), policy)
    kl_type = f"{factor}*k2_as_loss,reference=teacher"
    if factor != 1:
        kl_type += f"+{1 - factor}*k2_as_loss"
    found = ours(kl_type, policy, ref=base, old_log_probs=old, teacher_log_probs=teacher)
    torch.testing.assert_close(found, theirs)
    assert found.abs().max() > 0.1


def test_g_opd_later_in_a_step_keeps_the_log_ratios_of_its_start() -> None:
    """The named difference: the ratio stands before log-ratios of old, and there is a clip."""
    policy, teacher, base, old = four_policies()
    frozen = (old - base) - 1.25 * (teacher - base)
    ratio = (policy - old).exp()
    theirs = gradient((surrogate(ratio, -frozen) * MASK).sum(), policy)
    of_now = frozen + policy.detach() - old  # 1.25 - 0.25 times what the policy has moved
    kl_type = PAPERS["g-opd"].kl_type
    found = ours(kl_type, policy, ref=base, old_log_probs=old, teacher_log_probs=teacher)
    torch.testing.assert_close(found, (ratio * of_now * MASK).detach())
    kept = ((ratio.detach() - 1) * -frozen < 0) | ((ratio.detach() - 1).abs() < 0.2)
    torch.testing.assert_close(theirs, (ratio * frozen * MASK * kept).detach())
    assert not torch.allclose(found, theirs, rtol=0.05)


def test_prime_rls_kl_to_the_sampler() -> None:
    """loss.py, default_loss_fn: kl_tau log^2(pi/rollout), kl_tau 0.001; so a kl_coef of 0.002."""
    policy, _, _, rollout = four_policies()
    theirs = gradient(0.001 * ((policy - rollout).square() * MASK).sum(), policy)
    kl_type = PAPERS["kimi-k2.5"].kl_type
    found = 0.002 * ours(kl_type, policy, rollout_log_probs=rollout)
    torch.testing.assert_close(found, theirs)


def test_prime_rls_distillation() -> None:
    """loss.py, ref_kl_loss_fn: -sg(log teacher - log pi) pi/rollout, and the same KL beside it."""
    policy, teacher, _, rollout = four_policies()
    push = -(teacher - policy).detach() * (policy - rollout).exp()
    theirs = gradient(((push + 0.001 * (policy - rollout).square()) * MASK).sum(), policy)
    kl_type = "k2_as_loss,ratio=rollout,cap=none+0.002*k2_as_loss,ratio=none,reference=rollout"
    old = torch.zeros_like(rollout)
    found = ours(kl_type, policy, ref=teacher, rollout_log_probs=rollout, old_log_probs=old)
    torch.testing.assert_close(found, theirs)
