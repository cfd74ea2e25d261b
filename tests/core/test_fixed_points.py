"""Where training goes: exact gradient ascent on E[r] - beta * term, to the documented end."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from klplug import kl_term

REWARD = torch.tensor([1.0, 0.6, 0.1, 0.0, 0.3], dtype=torch.float64)
REF = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15], dtype=torch.float64)
BETA = 0.5


def ascend(kl_type: str, steps: int, rate: float = 0.5) -> Tensor:
    """Logits of one token's policy after exact ascent, every outcome weighted by its probability.

    One token: a coefficient in the reward and as a loss enter alike, by ``loss``.
    """
    logits = REF.log().clone().requires_grad_()
    mask = torch.ones(5, 1)
    for _ in range(steps):
        log_probs = logits.log_softmax(-1)
        policy = log_probs.exp()
        term = kl_term(
            kl_type,
            log_probs[:, None],
            REF.log()[:, None],
            mask,
            old_log_probs=log_probs.detach()[:, None],
        )
        penalty = (policy.detach()[:, None] * term.loss).sum()
        objective = (policy * REWARD).sum() - BETA * penalty
        (gradient,) = torch.autograd.grad(objective, logits)
        with torch.no_grad():
            logits += rate * gradient
    return logits.detach().log_softmax(-1)


def optimum() -> Tensor:
    return (REF.log() + REWARD / BETA).log_softmax(-1).exp()


def normalised(policy: Callable[[float], Tensor], low: float, high: float) -> Tensor:
    """``policy(lambda)``, which falls with lambda, where it sums to 1: by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if policy(middle).sum() > 1 else (low, middle)
    return policy(high)


def forward_optimum() -> Tensor:
    top = REWARD.max().item()
    return normalised(lambda x: BETA * REF / (x - REWARD), top, top + 10 * BETA)


def hellinger_optimum() -> Tensor:
    top = REWARD.max().item()
    return normalised(lambda x: REF * (BETA / (x - REWARD)) ** 2, top, top + 10 * BETA)


def chi2_optimum() -> Tensor:
    return normalised(lambda x: REF * (1 + (REWARD - x) / (2 * BETA)).clamp(min=0), -9.0, 9.0)


def js_optimum() -> Tensor:
    def policy(x: float) -> Tensor:
        e = ((REWARD - x) / BETA).exp()
        return REF * e / (2 - e)

    top = REWARD.max().item() - BETA * math.log(2)
    return normalised(policy, top + 1e-12, top + 10)


@pytest.mark.parametrize("kl_type", ["k2_as_loss", "k1_in_reward", "k3_in_reward+k3_as_loss"])
def test_the_right_ones_reach_the_optimum(kl_type: str) -> None:
    policy = ascend(kl_type, steps=4000).exp()
    torch.testing.assert_close(policy, optimum(), rtol=1e-7, atol=0)
    assert (policy - forward_optimum()).abs().max() > 0.01


def test_k3_as_loss_reaches_the_forward_optimum() -> None:
    policy = ascend("k3_as_loss", steps=4000).exp()
    torch.testing.assert_close(policy, forward_optimum(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("kl_type", "expected"),
    [
        ("forward_as_loss", forward_optimum),
        ("hellinger_as_loss", hellinger_optimum),
        ("chi2_as_loss", chi2_optimum),
        ("js_as_loss", js_optimum),
        ("alpha_as_loss,alpha=0.001", forward_optimum),
        ("alpha_as_loss,alpha=0.999", optimum),
    ],
)
def test_every_divergence_has_its_own_optimum(kl_type: str, expected: Callable[[], Tensor]) -> None:
    limit = "alpha=0" in kl_type
    policy = ascend(kl_type, steps=4000).exp()
    torch.testing.assert_close(policy, expected(), rtol=5e-3 if limit else 1e-7, atol=0)
    others = {forward_optimum, hellinger_optimum, chi2_optimum, js_optimum, optimum} - {expected}
    assert all((policy - other()).abs().max() > 0.005 for other in others)


def test_k1_as_loss_goes_where_no_kl_goes() -> None:
    policy, free = ascend("k1_as_loss", steps=1500), ascend("none", steps=1500)
    torch.testing.assert_close(policy, free, rtol=1e-9, atol=1e-12)
    assert policy.exp()[REWARD.argmax()] > 0.99


def test_under_k3_in_reward_a_log_probability_falls_without_bound() -> None:
    lowest = [ascend("k3_in_reward", steps=n, rate=0.2).min().item() for n in (400, 800, 1200)]
    first, second = lowest[0] - lowest[1], lowest[1] - lowest[2]
    assert first > 10 and second > 10  # and as fast in the end as before: linearly in steps


def bounded_optimum(bound: float) -> Tensor:
    """Actions below the bound are ref exp((r - x)/beta), the top one takes the mass that is left,
    and those that would have to be further down than the bound have none."""

    def policy(x: float) -> Tensor:
        wanted = (REWARD - x) / BETA
        return torch.where(wanted < -bound, 0.0, REF * wanted.clamp(max=bound).exp())

    top = int(REWARD.argmax())
    lowest = REWARD[top].item() - BETA * bound  # where the top action is at the bound
    if policy(lowest).sum() <= 1:
        taken = policy(lowest)
        taken[top] += 1 - taken.sum()
        return taken
    return normalised(policy, lowest, lowest + 10)


def test_bound_keeps_the_optimum_that_lies_inside_it() -> None:
    needed = (optimum().log() - REF.log()).abs().max().item()
    bound = needed + 0.05
    torch.testing.assert_close(bounded_optimum(bound), optimum(), rtol=1e-12, atol=0)
    inside = ascend(f"k2_as_loss,bound={bound}", steps=4000).exp()
    torch.testing.assert_close(inside, optimum(), rtol=1e-7, atol=0)


def test_under_a_tighter_bound_the_top_action_takes_what_is_left() -> None:
    expected = bounded_optimum(1.1)
    top = int(REWARD.argmax())
    assert expected[top] > REF[top] * math.exp(1.1)  # beyond the bound
    policy = ascend("k2_as_loss,bound=1.1", steps=4000).exp()
    torch.testing.assert_close(policy, expected, rtol=1e-7, atol=0)
    assert (policy - optimum()).abs().max() > 0.01


def test_under_a_tight_bound_actions_die_that_would_lie_below_it() -> None:
    expected = bounded_optimum(0.5)
    assert (expected == 0).sum() == 3
    distance = [
        (ascend("k2_as_loss,bound=0.5", steps=n).exp() - expected).abs().max().item()
        for n in (1000, 4000)
    ]
    assert distance[1] < 2e-3 and distance[1] < distance[0] / 3  # as one over the steps


def test_two_tokens_sequence_reaches_the_optimum_and_own_token_the_myopic_policy() -> None:
    generator = torch.Generator().manual_seed(3)
    reward = torch.rand(2, 2, generator=generator, dtype=torch.float64)
    ref_first = torch.tensor([0.4, 0.6], dtype=torch.float64).log()
    ref_second = torch.tensor([[0.2, 0.8], [0.7, 0.3]], dtype=torch.float64).log()
    answers = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    i, j = answers.T

    def log_probs(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first[i], second[i, j]], -1)

    def ascended(kl_type: str) -> Tensor:
        parameters = [ref_first.clone().requires_grad_(), ref_second.clone().requires_grad_()]
        for _ in range(6000):
            current = log_probs(*(p.log_softmax(-1) for p in parameters))
            probability = current.sum(-1).exp()
            term = kl_term(
                kl_type,
                current,
                log_probs(ref_first, ref_second),
                torch.ones(4, 2),
                old_log_probs=current.detach(),
            )
            penalty = (probability.detach()[:, None] * term.loss).sum()
            objective = (probability * reward[i, j]).sum() - BETA * penalty
            gradients = torch.autograd.grad(objective, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter += 0.5 * gradient
        return log_probs(*(p.detach().log_softmax(-1) for p in parameters)).sum(-1).exp()

    ref = log_probs(ref_first, ref_second).sum(-1)
    best = (ref + reward[i, j] / BETA).softmax(0)
    # Backward recursion: the last token sees its reward, the first the reward that then follows.
    second = (ref_second + reward / BETA).log_softmax(-1)
    expected = (second.exp() * reward).sum(-1)
    first = (ref_first + expected / BETA).log_softmax(-1)
    myopic = log_probs(first, second).sum(-1).exp()

    assert (best - myopic).abs().max() > 1e-3
    torch.testing.assert_close(ascended("k2_as_loss,horizon=sequence"), best, rtol=1e-6, atol=0)
    torch.testing.assert_close(ascended("k2_as_loss"), myopic, rtol=1e-6, atol=0)
