"""What docs/paper.md says of arXiv 2510.01555, held by enumeration.

The paper has one action; a language model's action is the whole answer. So ``answer_as_loss``
differentiates an estimator of the *answer's* log-ratio, samples held fixed, as the paper writes it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.core.enumeration import PROBLEMS, Problem
from tests.core.test_oracle import (
    assert_different,
    assert_equal,
    loss_gradient,
    many_tokens,
    reward_gradient,
)

ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: x,
    "k2": lambda x: x**2 / 2,
    "k3": lambda x: torch.exp(-x) - 1 + x,
    "abs": lambda x: x.abs(),
}


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]()


def log_ratios(problem: Problem) -> Tensor:
    return problem.log_probs(problem.policy()) - problem.log_probs(problem.ref())


def answer_as_loss(problem: Problem, estimator: str, ratio: bool = False) -> Tensor:
    """``E[grad k_n(answer)]``: under pi, or under old with the answer's detached ratio."""
    policy = problem.policy()
    behaviour = problem.answer_probability(problem.old() if ratio else policy).detach()
    weight = (problem.answer_probability(policy).detach() / behaviour) if ratio else 1.0
    value = ESTIMATORS[estimator](log_ratios(problem).sum(-1))
    return problem.gradient((behaviour * weight * value).sum())


def coefficient_in_reward(problem: Problem, coefficient: Tensor) -> Tensor:
    """``E_pi[sum_t s_t sum_{s>=t} c_s]``, c detached: what a reward per token gives."""
    policy = problem.policy()
    to_go = torch.where(problem.mask, coefficient.detach(), 0.0).flip(-1).cumsum(-1).flip(-1)
    weight = problem.answer_probability(policy).detach()[:, None] * problem.mask
    return problem.gradient((weight * to_go * problem.log_probs(policy)).sum())


def test_theorem_5_1_pairs_whole_answers(problem: Problem) -> None:
    on_policy = problem.policy().detach()
    as_loss = answer_as_loss(problem, "k2")
    assert_equal(as_loss, problem.full())
    assert_equal(reward_gradient(problem, "k1_in_reward", on_policy), as_loss)
    assert_equal(loss_gradient(problem, "k2_as_loss,horizon=sequence", on_policy), as_loss)
    own_token = loss_gradient(problem, "k2_as_loss", on_policy)
    (assert_different if many_tokens(problem) else assert_equal)(own_token, as_loss)


def test_k1_of_an_answer_as_a_loss_is_nothing(problem: Problem) -> None:
    assert_equal(answer_as_loss(problem, "k1"), torch.zeros_like(problem.theta))


def test_k3_of_an_answer_as_a_loss_is_the_forward_kl_of_answers(problem: Problem) -> None:
    on_policy = problem.policy().detach()
    as_loss = answer_as_loss(problem, "k3")
    assert_equal(as_loss, problem.full_forward())
    assert_equal(loss_gradient(problem, "forward_as_loss,horizon=sequence", on_policy), as_loss)
    own_token = loss_gradient(problem, "k3_as_loss", on_policy)
    (assert_different if many_tokens(problem) else assert_equal)(own_token, as_loss)


def test_abs_of_an_answer_as_a_loss_is_twice_the_total_variation_of_answers(
    problem: Problem,
) -> None:
    pi, ref = (problem.answer_probability(p) for p in (problem.policy(), problem.ref()))
    total_variation = problem.gradient((pi - ref).abs().sum() / 2)
    assert_equal(answer_as_loss(problem, "abs"), 2 * total_variation)


def test_off_policy_the_answer_s_ratio_restores_both(problem: Problem) -> None:
    """The paper's correction, with the product over the answer as its ratio."""
    for estimator, kl_type, target in (
        ("k2", "k2_as_loss,horizon=sequence,level=sequence", problem.full()),
        ("k3", "forward_as_loss,horizon=sequence,level=sequence", problem.full_forward()),
    ):
        assert_equal(answer_as_loss(problem, estimator, ratio=True), target)
        assert_equal(loss_gradient(problem, f"{kl_type},cap=none", problem.old()), target)


def test_the_derivative_of_k3_in_the_reward_is_k3_as_loss_with_noise(problem: Problem) -> None:
    x = log_ratios(problem)
    assert_equal(coefficient_in_reward(problem, 1 - torch.exp(-x)), problem.loc("forward"))


def test_the_derivative_of_k2_in_the_reward_is_k1_in_reward(problem: Problem) -> None:
    assert_equal(coefficient_in_reward(problem, log_ratios(problem)), problem.full())


def test_the_derivative_of_k1_in_the_reward_is_the_length(problem: Problem) -> None:
    probability = problem.answer_probability(problem.policy())
    length = problem.gradient((probability * problem.mask.sum(-1)).sum())
    assert_equal(coefficient_in_reward(problem, torch.ones_like(problem.mask) * 1.0), length)
    if problem.stops:
        assert length.norm() > 0.01


@pytest.mark.parametrize("x", [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 8.0])
def test_a_differentiated_ratio_scales_k2_by_one_plus_half_x(x: float) -> None:
    """At -2 nothing is left of it, below it points away, above it has no bound."""
    log_prob = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    rho = torch.exp(log_prob - x)  # on-policy, so that the ratio itself is 1
    (gradient,) = torch.autograd.grad(rho * log_prob**2 / 2, log_prob)  # the reference is at 0
    assert gradient.item() == pytest.approx(x * (1 + x / 2), abs=1e-12)


def test_a_divergence_over_answers_sums_its_tokens_and_is_not_that_of_answers() -> None:
    """``js_as_loss,horizon=sequence`` is no JS of answers; the reverse KL alone is both."""
    problem = PROBLEMS["three tokens"]()
    pi, ref = (problem.answer_probability(p) for p in (problem.policy(), problem.ref()))
    u = pi / ref
    of_answers = problem.gradient((ref * (u * u.log() - (u + 1) * ((u + 1) / 2).log())).sum())
    on_policy = problem.policy().detach()
    assert_different(loss_gradient(problem, "js_as_loss,horizon=sequence", on_policy), of_answers)
