"""The exact oracle: every kl_type's expected gradient against autograd of its documented target.

All answers enumerated, float64, no sampling noise. Equal means 1e-9; different, by more than 1 %.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from klplug import kl_term, kl_types, parse, reward_to_go
from tests.core.enumeration import PROBLEMS, Problem

LOSSES = ("k1_as_loss", "k2_as_loss", "k3_as_loss", "abs_as_loss")
REWARDS = ("k1_in_reward", "k2_in_reward", "k3_in_reward", "abs_in_reward")


@pytest.fixture(params=PROBLEMS, scope="module")
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]()


def many_tokens(problem: Problem) -> bool:
    return problem.length > 1


def loss_gradient(problem: Problem, kl_type: str, behaviour: Tensor) -> Tensor:
    """Expected gradient of the term's loss, token sums per answer, under ``behaviour``."""
    term = kl_term(
        kl_type,
        problem.log_probs(problem.policy()),
        problem.log_probs(problem.ref()),
        problem.mask,
        old_log_probs=problem.log_probs(behaviour),
        rollout_log_probs=problem.log_probs(behaviour),
    )
    probability = problem.answer_probability(behaviour).detach()
    return problem.gradient((probability[:, None] * term.loss).sum())


def reward_gradient(problem: Problem, kl_type: str, behaviour: Tensor) -> Tensor:
    """Expected gradient through a host: the coefficient at theta_old joins the reward, and its
    reward-to-go multiplies the host's token ratio."""
    old = problem.log_probs(behaviour).detach()
    coefficient = kl_term(kl_type, old, problem.log_probs(problem.ref()), problem.mask).coefficient
    ratio = (problem.log_probs(problem.policy()) - old).exp()
    weight = problem.answer_probability(behaviour).detach()[:, None] * problem.mask
    return problem.gradient((weight * ratio * reward_to_go(coefficient)).sum())


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def assert_different(actual: Tensor, other: Tensor) -> None:
    assert (actual - other).norm() > 0.01 * max(actual.norm(), other.norm())


# Each documented target, by kl_type.
ON_POLICY_LOSS = {
    "k1_as_loss": lambda p: torch.zeros_like(p.theta),
    "k2_as_loss": lambda p: p.loc(),
    "k3_as_loss": lambda p: p.loc("forward"),
    "abs_as_loss": lambda p: p.loc("twice_tv"),
    "k2_as_loss,horizon=sequence": lambda p: p.full(),
    "k2_as_loss,horizon=sequence,level=sequence": lambda p: p.full(),
}
ON_POLICY_REWARD = {
    "k1_in_reward": lambda p: p.full(),
    "k2_in_reward": lambda p: p.expected_values("k2") - p.loc(),
    "k3_in_reward": lambda p: p.full() - p.loc("forward"),
    "abs_in_reward": lambda p: p.expected_values("abs") - p.loc("twice_tv"),
}


@pytest.mark.parametrize("ratio", ["old", "none", "rollout"])
@pytest.mark.parametrize("kl_type", ON_POLICY_LOSS)
def test_on_policy_loss_has_its_documented_gradient(
    problem: Problem, kl_type: str, ratio: str
) -> None:
    if ratio == "none" and "level=" in kl_type:
        kl_type = kl_type.partition(",level")[0]
    spec = parse(f"{kl_type},ratio={ratio}")
    on_policy = problem.policy().detach()
    assert_equal(loss_gradient(problem, str(spec), on_policy), ON_POLICY_LOSS[kl_type](problem))


@pytest.mark.parametrize("kl_type", REWARDS)
def test_on_policy_reward_has_its_documented_gradient(problem: Problem, kl_type: str) -> None:
    on_policy = problem.policy().detach()
    assert_equal(reward_gradient(problem, kl_type, on_policy), ON_POLICY_REWARD[kl_type](problem))


def test_on_policy_targets_differ(problem: Problem) -> None:
    """No two formulations that claim different gradients share one by accident."""
    targets = {
        "zero": torch.zeros_like(problem.theta),
        "k2 local": problem.loc(),
        "k3 local": problem.loc("forward"),
        "abs local": problem.loc("twice_tv"),
        **{name: ON_POLICY_REWARD[name](problem) for name in REWARDS[1:]},
    }
    if many_tokens(problem):
        targets["full"] = problem.full()
    names = list(targets)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert_different(targets[one], targets[other])


def test_one_token_makes_the_scopes_one(problem: Problem) -> None:
    targets = (problem.full(), problem.loc(), problem.oldpref())
    if many_tokens(problem):
        assert_different(targets[0], targets[1])
        assert_different(targets[1], targets[2])
        assert_different(targets[0], targets[2])
    else:
        assert_equal(targets[0], targets[1])
        assert_equal(targets[0], targets[2])


def test_the_sum_of_two_wrongs_is_right(problem: Problem) -> None:
    on_policy = problem.policy().detach()
    both = reward_gradient(problem, "k3_in_reward", on_policy) + loss_gradient(
        problem, "k3_as_loss", on_policy
    )
    assert_equal(both, problem.full())
    if not many_tokens(problem):
        assert_equal(loss_gradient(problem, "k3_in_reward+k3_as_loss", on_policy), both)


# Off-policy, uncapped: the weight decides whose samples are corrected for, and for which target.
OFF_POLICY = {
    "k2_as_loss": lambda p: p.oldpref(),
    "k3_as_loss": lambda p: p.oldpref("forward"),
    "abs_as_loss": lambda p: p.oldpref("twice_tv"),
    "k1_as_loss": lambda p: torch.zeros_like(p.theta),
    "k2_as_loss,level=prefix": lambda p: p.loc(),
    "k2_as_loss,level=sequence": lambda p: p.loc(),
    "k3_as_loss,level=prefix": lambda p: p.loc("forward"),
    "k3_as_loss,level=sequence": lambda p: p.loc("forward"),
    "k2_as_loss,horizon=sequence": lambda p: p.full(),
    "k2_as_loss,horizon=sequence,level=sequence": lambda p: p.full(),
}
UNCORRECTED = {
    "k1_as_loss": lambda p: p.away_from_old(),
    "k2_as_loss": lambda p: p.expected_values("k2", p.old()),
    "k3_as_loss": lambda p: p.expected_values("k3", p.old()),
    "abs_as_loss": lambda p: p.expected_values("abs", p.old()),
}


@pytest.mark.parametrize("ratio", ["old", "rollout"])
@pytest.mark.parametrize("kl_type", OFF_POLICY)
def test_off_policy_ratio_restores_the_target(problem: Problem, kl_type: str, ratio: str) -> None:
    gradient = loss_gradient(problem, f"{kl_type},ratio={ratio},cap=none", problem.old())
    assert_equal(gradient, OFF_POLICY[kl_type](problem))


@pytest.mark.parametrize("kl_type", UNCORRECTED)
def test_off_policy_without_ratio_is_the_documented_wrong_one(
    problem: Problem, kl_type: str
) -> None:
    gradient = loss_gradient(problem, f"{kl_type},ratio=none", problem.old())
    assert_equal(gradient, UNCORRECTED[kl_type](problem))
    corrected = loss_gradient(problem, f"{kl_type},cap=none", problem.old())
    assert_different(gradient, corrected)


def test_reward_to_go_without_ratio_is_no_named_target(problem: Problem) -> None:
    gradient = loss_gradient(problem, "k2_as_loss,ratio=none,horizon=sequence", problem.old())
    for target in (problem.full(), problem.loc(), problem.oldpref(), problem.surr()):
        assert_different(gradient, target)


def test_k1_in_reward_off_policy_is_the_surrogate(problem: Problem) -> None:
    gradient = reward_gradient(problem, "k1_in_reward", problem.old())
    assert_equal(gradient, problem.surr())
    assert_different(gradient, problem.full())
    on_policy = problem.policy().detach()
    assert_equal(reward_gradient(problem, "k1_in_reward", on_policy), problem.full())


def test_levels_separate_off_policy() -> None:
    problem = PROBLEMS["three tokens"]()
    token, prefix, full = (
        loss_gradient(problem, f"k2_as_loss,cap=none,{options}", problem.old())
        for options in ("level=token", "level=prefix", "horizon=sequence")
    )
    assert_different(token, prefix)
    assert_different(prefix, full)
    assert_different(token, full)


# A cap puts another measure in the policy's place, exactly: one token.
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_capped_weights_are_a_known_measure(mode: str) -> None:
    problem, cap = PROBLEMS["one token"](), 1.2
    policy, old = problem.policy().exp().detach(), problem.old().exp()
    within = policy <= cap * old
    assert within.any() and not within.all()
    measure = torch.minimum(policy, cap * old) if mode == "truncate" else policy * within
    lr = (problem.policy() - problem.ref()).detach()
    expected = problem.gradient((measure * lr * problem.policy()).sum())
    gradient = loss_gradient(problem, f"k2_as_loss,cap={cap},mode={mode}", problem.old())
    assert_equal(gradient, expected)
    assert_different(gradient, problem.full())


def test_bounded_coefficient_is_the_gradient_of_a_huber_divergence() -> None:
    problem, bound = PROBLEMS["one token"](), 0.4
    lr = (problem.policy() - problem.ref()).detach()
    assert (lr.abs() > bound).any() and (lr.abs() < bound).any()
    # D_f(pi, ref) = E_ref f(u) with f' = clip(log u, -b, b).
    u = (problem.policy() - problem.ref()).exp()
    low, high = torch.exp(torch.tensor([-bound, bound], dtype=torch.float64))

    def antiderivative(x: Tensor) -> Tensor:
        inner = x.clamp(low, high)
        return (
            inner * inner.log()
            - inner
            + bound * (x - x.clamp(max=high))
            - bound * (x - x.clamp(min=low))
        )

    expected = problem.gradient((problem.ref().exp() * antiderivative(u)).sum())
    for behaviour in (problem.policy().detach(), problem.old()):
        gradient = loss_gradient(problem, f"k2_as_loss,cap=none,bound={bound}", behaviour)
        assert_equal(gradient, expected)
    assert_different(expected, problem.full())


def test_masked_tokens_inside_an_answer_enter_no_product_and_no_sum() -> None:
    """A tool's output in the middle of an answer: as if it were not there."""
    problem = PROBLEMS["three tokens"]()
    arguments = [problem.log_probs(x) for x in (problem.policy(), problem.ref(), problem.old())]
    mask = problem.mask.clone()
    mask[:, 1] = False
    holed = [x.clone() for x in arguments]
    for tensor in holed[1:]:
        tensor[:, 1] = torch.nan
    for kl_type in ("k2_as_loss,level=prefix", "k2_as_loss,horizon=sequence"):
        inside = kl_term(kl_type, holed[0], holed[1], mask, old_log_probs=holed[2])
        dropped = [x[:, [0, 2]] for x in arguments]
        without = kl_term(
            kl_type, dropped[0], dropped[1], mask[:, [0, 2]], old_log_probs=dropped[2]
        )
        for name in ("loss", "value", "coefficient", "weight"):
            torch.testing.assert_close(
                getattr(inside, name)[:, [0, 2]], getattr(without, name), rtol=1e-12, atol=0
            )
            assert (getattr(inside, name)[:, 1] == 0).all()


def test_every_catalogued_kl_type_is_in_an_oracle() -> None:
    tested = {*ON_POLICY_LOSS, *ON_POLICY_REWARD, "k3_in_reward+k3_as_loss", "none"}
    assert set(kl_types()) <= tested
