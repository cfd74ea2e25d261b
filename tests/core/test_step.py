"""Where each part of a KL acts beside a policy loss: one place for hosts and ``policy_loss``."""

from __future__ import annotations

import pytest
import torch

import klplug
from tests.core.test_term import BETA, batch, kl_term

INSIDE = "k2_as_loss,head=combined"
BESIDE = "k3_as_loss,ratio=none"
IN_REWARD = "k3_in_reward"


@pytest.mark.parametrize("kl_type", [INSIDE, BESIDE, f"{INSIDE}+{BESIDE}", f"{IN_REWARD}+{BESIDE}"])
def test_each_part_acts_once_and_all_are_reported(kl_type: str) -> None:
    tensors = batch()
    log_probs, advantages = tensors["log_probs"], tensors["advantages"]
    step = klplug.KLStep(kl_term(kl_type, **tensors))
    parts = {name: kl_term(name, **tensors) for name in kl_type.split("+")}
    values = {name: part.value for name, part in parts.items()}
    nothing = torch.zeros_like(log_probs)
    torch.testing.assert_close(step.reported, sum(values.values()), rtol=1e-12, atol=0)
    torch.testing.assert_close(step.loss, values.get(BESIDE, nothing), rtol=1e-12, atol=0)
    for added in (step.loss, step.reported):
        (gradient,) = torch.autograd.grad(added.sum(), log_probs, retain_graph=True)
        expected = parts[BESIDE].gradient if BESIDE in parts else nothing
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    # c of k2 at the current policy is the log-ratio.
    lr = (log_probs - tensors["ref_log_probs"]).detach() * tensors["response_mask"]
    taken = BETA * lr if INSIDE in parts else torch.zeros_like(lr)
    torch.testing.assert_close(step.advantages(advantages, BETA), advantages - taken)


def test_no_kl_is_no_part() -> None:
    tensors = batch()
    step = klplug.KLStep(kl_term("none", **tensors))
    assert step.advantages(tensors["advantages"], BETA) is tensors["advantages"]
    (added,) = torch.autograd.grad(step.loss.sum(), tensors["log_probs"])
    assert (added == 0).all() and (step.loss == 0).all()


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.6), (0.6, 0.1)])
def test_the_value_of_a_policy_loss_is_ppo_s_surrogate(low: float, high: float) -> None:
    """By hand: -min(rho A, clip(rho) A) at a ratio below, in and above the range."""
    log_probs = torch.tensor([[0.5, 1.0, 1.5]] * 2, dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[2.0] * 3, [-2.0] * 3], dtype=torch.float64)
    zero, ones = torch.zeros_like(advantages), torch.ones(2, 3)
    given = {"old_log_probs": zero, "advantages": advantages, "kl_coef": 0.0}
    loss = klplug.policy_loss("none", log_probs, zero, ones, **given, clip_range=(low, high))
    expected = [
        [-min(rho * a, min(max(rho, 1 - low), 1 + high) * a) for rho in (0.5, 1.0, 1.5)]
        for a in (2.0, -2.0)
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
