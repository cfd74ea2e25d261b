"""The exact oracle: every kl_type's expected gradient against autograd of its documented target.

All answers enumerated, float64, no sampling noise. Equal means 1e-9; different, by more than 1 %.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from klplug import (
    Samples,
    exact_kl,
    kl_return_baseline,
    kl_term,
    kl_types,
    parse,
    policy_loss,
    posterior_log_probs,
    reward_to_go,
    sample_weights,
    topk_kl,
)
from klplug.papers import PAPERS
from klplug.weights import importance_weight
from tests.core.enumeration import PROBLEMS, Problem

REWARDS = ("k1_in_reward", "k2_in_reward", "k3_in_reward", "abs_in_reward")
DIVERGENCES = ("forward", "js", "jeffreys", "chi2", "hellinger", "tv", "alpha")
PARAMETERS = {"alpha,alpha=2": "alpha_as_loss,alpha=2", "alpha,alpha=-1": "alpha_as_loss,alpha=-1"}
LOSS_OF = {name: f"{name}_as_loss" for name in DIVERGENCES} | PARAMETERS


@pytest.fixture(params=PROBLEMS, scope="module")
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]()


def many_tokens(problem: Problem) -> bool:
    return problem.length > 1


def loss_gradient(
    problem: Problem, kl_type: str, behaviour: Tensor, **given: Tensor | dict[str, Tensor] | None
) -> Tensor:
    """Expected gradient of the term's loss, token sums per answer, under ``behaviour``."""
    term = kl_term(
        kl_type,
        problem.log_probs(problem.policy()),
        problem.log_probs(problem.ref()),
        problem.mask,
        old_log_probs=problem.log_probs(behaviour),
        rollout_log_probs=problem.log_probs(behaviour),
        # No clip, and an advantage of none: what the KL alone does.
        advantages=torch.zeros_like(problem.mask, dtype=torch.float64),
        kl_coef=1.0,
        clip_range=(1.0, 1e9),
        **given,
    )
    probability = problem.answer_probability(behaviour).detach()
    return problem.gradient((probability[:, None] * term.loss).sum())


def reward_gradient(problem: Problem, kl_type: str, behaviour: Tensor, **given: Tensor) -> Tensor:
    """Expected gradient through a host: the coefficient at theta_old joins the reward, and its
    reward-to-go multiplies the host's token ratio."""
    old, ref = problem.log_probs(behaviour).detach(), problem.log_probs(problem.ref())
    coefficient = kl_term(kl_type, old, ref, problem.mask, **given).coefficient
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
    "forward_as_loss,horizon=sequence": lambda p: p.full_forward(),
    **{kl_type: lambda p, f=f: p.loc(f) for f, kl_type in LOSS_OF.items()},
    **{
        f"{kl_type},horizon=sequence": lambda p, f=f: p.expected(f)
        for f, kl_type in LOSS_OF.items()
        if f != "forward"
    },
    **{
        f"{kl_type},horizon=answer": lambda p, f=f: p.between_answers(f)
        for f, kl_type in LOSS_OF.items()
        if f != "forward"
    },
}
HEADS = {
    f"k2_as_loss,head={head}{horizon}": lambda p, full=full: p.full() if full else p.loc()
    for head in ("combined", "clipped")
    for horizon, full in (("", False), (",horizon=sequence", True))
}
ON_POLICY_REWARD = {
    "k1_in_reward": lambda p: p.full(),
    "k2_in_reward": lambda p: p.expected_values("k2") - p.loc(),
    "k3_in_reward": lambda p: p.full() - p.loc("forward"),
    "abs_in_reward": lambda p: p.expected_values("abs") - p.loc("twice_tv"),
    **{
        f"{name}_in_reward": lambda p, name=name: (
            p.expected_values(name) - p.expected_values(name, p.policy().detach())
        )
        for name in DIVERGENCES
    },
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


@pytest.mark.parametrize("kl_type", HEADS)
def test_on_policy_the_heads_agree(problem: Problem, kl_type: str) -> None:
    on_policy = problem.policy().detach()
    assert_equal(loss_gradient(problem, kl_type, on_policy), HEADS[kl_type](problem))


@pytest.mark.parametrize("kl_type", ON_POLICY_REWARD)
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
        **{f"{f} local": problem.loc(f) for f in LOSS_OF if f not in ("forward", "tv", "alpha")},
    }
    # Half of what they are called after, by their definitions.
    assert_equal(2 * problem.loc("tv"), problem.loc("twice_tv"))
    assert_equal(2 * problem.loc("alpha,alpha=2"), problem.loc("chi2"))
    assert_equal(problem.loc("alpha"), 2 * problem.loc("hellinger"))
    del targets["abs local"], targets["chi2 local"]
    if many_tokens(problem):
        targets["full"] = problem.full()
        targets["forward full"] = problem.full_forward()
        of_answers = ("js", "jeffreys", "hellinger")
        targets |= {f"{f} expected": problem.expected(f) for f in of_answers}
        targets |= {f"{f} of answers": problem.between_answers(f) for f in (*of_answers, "tv")}
        targets["chi2 of answers"] = problem.between_answers("chi2")
        targets["chi2 expected"] = problem.expected("chi2")
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


def test_the_square_root_of_chi2_between_answers() -> None:
    """At a policy that is uniform the mean over all answers is the expectation."""
    problem = PROBLEMS["three tokens"]()
    problem.theta.data.zero_()
    kl_type = "chi2_as_loss,horizon=answer,weight=root"
    log_probs, ref = problem.log_probs(problem.policy()), problem.log_probs(problem.ref())
    samples = Samples(problem.mask, log_probs=log_probs.detach(), ref_log_probs=ref)
    weights = sample_weights(kl_type, samples)
    given = {"old_log_probs": log_probs.detach(), "sample_weights": weights}
    term = kl_term(kl_type, log_probs, ref, problem.mask, **given)
    found = problem.gradient(term.loss.sum() / len(problem.answers))
    probability = problem.answer_probability(problem.ref())
    ratio = problem.answer_probability(problem.policy()) / probability
    root = (probability * (ratio - 1) ** 2).sum().sqrt()
    assert_equal(found, problem.gradient(root))
    assert_different(found, problem.between_answers("chi2"))
    assert_equal(term.value.sum() / len(problem.answers), root.detach() ** 2)


def test_at_the_reference_the_root_has_no_gradient() -> None:
    """0/0, taken as 0."""
    problem = PROBLEMS["three tokens"]()
    log_probs = problem.log_probs(problem.ref())
    samples = Samples(problem.mask, log_probs=log_probs, ref_log_probs=log_probs)
    weights = sample_weights("chi2_as_loss,horizon=answer,weight=root", samples)
    assert not weights["root"].any()


def test_the_public_code_of_correlated_proxies_has_another_gradient() -> None:
    """Autograd of the mean of u + 1/u - 2 over answers of pi, as papers.py says of it."""
    problem = PROBLEMS["three tokens"]()
    log_probs, ref = problem.log_probs(problem.policy()), problem.log_probs(problem.ref())
    u = (log_probs - ref).sum(-1).exp()
    probability = problem.answer_probability(problem.policy()).detach()
    theirs = problem.gradient((probability * (u + 1 / u - 2)).sum())
    assert_equal(theirs, problem.between_answers("chi2") / 2 + problem.full_forward())
    on_policy = problem.policy().detach()
    ours = "0.5*chi2_as_loss,horizon=answer+forward_as_loss,horizon=sequence"
    assert_equal(loss_gradient(problem, ours, on_policy), theirs)


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
    "forward_as_loss,horizon=sequence": lambda p: p.full_forward(),
    "forward_as_loss,horizon=sequence,level=sequence": lambda p: p.full_forward(),
    **{kl_type: lambda p, f=f: p.oldpref(f) for f, kl_type in LOSS_OF.items()},
    **{
        f"{kl_type},horizon=sequence{level}": lambda p, f=f: p.expected(f)
        for f, kl_type in LOSS_OF.items()
        if f != "forward"
        for level in ("", ",level=sequence")
    },
    **{
        f"{kl_type},horizon=answer": lambda p, f=f: p.between_answers(f)
        for f, kl_type in LOSS_OF.items()
        if f != "forward"
    },
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


# The frozen table: what a host's ratio makes of a coefficient as it was at the start of the step.
# Hosts have the token ratio and the reward-to-go; the other cells say what that costs.
FROZEN = {
    ("token", "own"): lambda p, old: p.oldpref() - old.oldpref(),
    ("token", "to go"): lambda p, old: p.surr(),
    ("prefix", "own"): lambda p, old: p.loc() - old.loc(),
    ("prefix", "per decision"): lambda p, old: p.full() - old.full(),
    ("sequence", "own"): lambda p, old: p.loc() - old.loc(),
    ("sequence", "to go"): lambda p, old: p.full() - old.full(),
    ("sequence", "whole answer"): lambda p, old: p.full() - old.full(),
}


@pytest.mark.parametrize(("level", "credit"), FROZEN)
def test_a_frozen_coefficient_has_its_documented_gradient(level: str, credit: str) -> None:
    problem = PROBLEMS["varying length"]()
    against_old = copy.copy(problem)
    against_old.ref_logits = problem.old()
    policy, old = problem.log_probs(problem.policy()), problem.log_probs(problem.old())
    term = kl_term("k1_in_reward", old, problem.log_probs(problem.ref()), problem.mask)
    c = term.coefficient
    log_ratio = (policy - old).detach()
    weight = importance_weight(
        log_ratio, problem.mask, level=level, cap=torch.inf, mode="mask"
    ).weight
    force = {
        "own": weight * c,
        "to go": weight * reward_to_go(c),
        "whole answer": weight * c.sum(-1, keepdim=True),
        "per decision": reward_to_go(weight * c),
    }[credit]
    probability = problem.answer_probability(problem.old())[:, None]
    gradient = problem.gradient((probability * force * policy).sum())
    assert_equal(gradient, FROZEN[level, credit](problem, against_old))
    targets = [target(problem, against_old) for target in FROZEN.values()]
    others = [t for t in targets if not torch.allclose(t, gradient, rtol=1e-9, atol=1e-12)]
    assert len(others) >= 4
    for other in (*others, problem.full(), problem.loc(), problem.oldpref()):
        assert_different(gradient, other)


@pytest.mark.parametrize("level", ["token", "prefix"])
def test_a_weight_outside_the_reward_to_go_is_biased(level: str) -> None:
    """Which is why level=token is refused there, and prefix weights stand inside the sum."""
    problem = PROBLEMS["varying length"]()
    policy, old, ref = (
        problem.log_probs(x) for x in (problem.policy(), problem.old(), problem.ref())
    )
    log_ratio = (policy - old).detach()
    weight = importance_weight(
        log_ratio, problem.mask, level=level, cap=torch.inf, mode="mask"
    ).weight
    force = weight * reward_to_go((policy - ref).detach())
    gradient = problem.gradient(
        (problem.answer_probability(problem.old())[:, None] * force * policy).sum()
    )
    for target in (problem.full(), problem.loc(), problem.oldpref(), problem.surr()):
        assert_different(gradient, target)
    if level == "token":  # the heads' own ratio: PPO's
        kl_type = "k2_as_loss,head=clipped,horizon=sequence"
        assert_equal(loss_gradient(problem, kl_type, problem.old()), gradient)


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


@pytest.mark.parametrize("head", ["combined", "clipped"])
def test_unclipped_heads_have_the_token_ratio(problem: Problem, head: str) -> None:
    gradient = loss_gradient(problem, f"k2_as_loss,head={head}", problem.old())
    assert_equal(gradient, problem.oldpref())


def assert_kl_to(reference: str, problem: Problem) -> None:
    """The KL to what made the answers, in the place of the reference model."""
    policy, old = problem.log_probs(problem.policy()), problem.log_probs(problem.old())
    probability = problem.answer_probability(problem.old())[:, None]
    targets = {
        "": lambda p: p.oldpref(),
        ",level=prefix": lambda p: p.loc(),
        ",horizon=sequence": lambda p: p.full(),
    }
    other = copy.copy(problem)
    other.ref_logits = problem.old()
    for options, target in targets.items():
        kl_type = f"k2_as_loss{options},reference={reference},cap=none"
        given = {f"{reference}_log_probs": old}
        term = kl_term(kl_type, policy, None, problem.mask, **given)
        gradient = problem.gradient((probability * term.loss).sum())
        assert_equal(gradient, target(other))
        assert_different(gradient, target(problem))


def test_the_sampler_as_reference(problem: Problem) -> None:
    """KL(pi||rollout), the answers from rollout, and no reference anywhere."""
    assert_kl_to("rollout", problem)


def test_the_sampler_as_reference_without_a_ratio(problem: Problem) -> None:
    """Kimi K2.5's and prime-rl's form: the gradient of E_rollout[log^2(pi/rollout) / 2]."""
    kl_type, mask = "k2_as_loss,ratio=none,reference=rollout", problem.mask

    def gradient_at(old: Tensor, kl_type: str) -> Tensor:
        policy, rollout = problem.log_probs(problem.policy()), problem.log_probs(old)
        term = kl_term(kl_type, policy, None, mask, rollout_log_probs=rollout)
        return problem.gradient((problem.answer_probability(old)[:, None] * term.loss).sum())

    old = problem.old()
    square = (problem.log_probs(problem.policy()) - problem.log_probs(old)).square() / 2
    expected = problem.answer_probability(old) * (square * mask).sum(-1)
    gradient = gradient_at(old, kl_type)
    assert_equal(gradient, problem.gradient(expected.sum()))
    assert_different(gradient, gradient_at(old, "k2_as_loss,reference=rollout,cap=none"))
    assert gradient_at(problem.policy().detach(), kl_type).abs().max() < 1e-12


def test_the_policy_at_the_start_of_the_step_as_reference(problem: Problem) -> None:
    """KL(pi||old), the answers from old, and no reference model; the sampler may be another."""
    assert_kl_to("old", problem)
    policy = problem.log_probs(problem.policy())
    on_policy = policy.detach()
    term = kl_term("k2_as_loss,reference=old", policy, None, problem.mask, old_log_probs=on_policy)
    assert (term.gradient == 0).all()


def test_a_teacher_as_reference(problem: Problem) -> None:
    """KL(pi||teacher), the answers from old: no other policy is in the target."""
    teacher = problem.log_probs(problem.teacher())
    targets = {
        "k2_as_loss": lambda p: p.oldpref(),
        "k2_as_loss,level=prefix": lambda p: p.loc(),
        "k2_as_loss,horizon=sequence": lambda p: p.full(),
        "k3_as_loss": lambda p: p.oldpref("forward"),
        "js_as_loss,horizon=answer": lambda p: p.between_answers("js"),
    }
    other = copy.copy(problem)
    other.ref_logits = problem.teacher_logits
    for kl_type, target in targets.items():
        named = f"{kl_type},reference=teacher,cap=none"
        gradient = loss_gradient(problem, named, problem.old(), teacher_log_probs=teacher)
        assert_equal(gradient, target(other))
        assert_different(gradient, target(problem))
    on_policy = problem.policy().detach()
    for kl_type in ("k1_in_reward", "k3_in_reward"):
        named = f"{kl_type},reference=teacher"
        gradient = reward_gradient(problem, named, on_policy, teacher_log_probs=teacher)
        assert_equal(gradient, ON_POLICY_REWARD[kl_type](other))
        assert_different(gradient, ON_POLICY_REWARD[kl_type](problem))


def test_beside_a_teacher_the_metrics_of_the_kl_are_to_the_reference() -> None:
    problem = PROBLEMS["varying length"]()
    log_probs, ref = problem.log_probs(problem.policy()), problem.log_probs(problem.ref())
    teacher, mask = problem.log_probs(problem.teacher()), problem.mask
    term = kl_term(
        "1.25*k2_as_loss,ratio=none,reference=teacher+-0.25*k2_as_loss,ratio=none",
        log_probs,
        ref,
        mask,
        teacher_log_probs=teacher,
    )
    own = "klplug/1.25xk2_as_loss.ratio-none.reference-teacher/"
    other = "klplug/-0.25xk2_as_loss.ratio-none/"
    to_ref, to_teacher = ((log_probs.detach() - x)[mask].mean() for x in (ref, teacher))
    for name in ("klplug/", other):
        assert_equal(term.metrics[f"{name}k1"], to_ref)
    assert_equal(term.metrics[f"{own}k1"], to_teacher)
    assert_different(to_ref, to_teacher)


def of_a_mixture(problem: Problem, a: float, b: float, horizon: str, second: str) -> Tensor:
    """grad of a KL(pi||ref) + b KL(pi||q), as one KL to the unnormalised ref^a q^b."""
    policy = problem.policy()
    mixture = a * problem.ref() + b * getattr(problem, second)()
    per_prefix = (policy.exp() * ((a + b) * policy - mixture)).sum(-1)
    reach = problem.reach(policy if horizon == "sequence" else problem.old().detach())
    return problem.gradient((reach * per_prefix).sum())


@pytest.mark.parametrize(("a", "b"), [(0.7, 0.3), (1.5, -0.5), (-0.2, 2.0)])
@pytest.mark.parametrize("horizon", ["token", "sequence"])
@pytest.mark.parametrize("second", ["old", "teacher"])
def test_a_sum_of_two_references_is_a_kl_to_their_geometric_mixture(
    problem: Problem, second: str, horizon: str, a: float, b: float
) -> None:
    options = f"horizon={horizon},cap=none"
    kl_type = f"{a}*k2_as_loss,{options}+{b}*k2_as_loss,{options},reference={second}"
    term = kl_term(
        kl_type,
        problem.log_probs(problem.policy()),
        problem.log_probs(problem.ref()),
        problem.mask,
        old_log_probs=problem.log_probs(problem.old()),
        teacher_log_probs=problem.log_probs(problem.teacher()),
    )
    probability = problem.answer_probability(problem.old())[:, None]
    gradient = problem.gradient((probability * term.loss).sum())
    assert_equal(gradient, of_a_mixture(problem, a, b, horizon, second))
    for other in ((a, 0.0), (a + b, 0.0), (1.0, 1.0)):
        assert_different(gradient, of_a_mixture(problem, *other, horizon, second))
    another = {"old": "teacher", "teacher": "old"}[second]
    assert_different(gradient, of_a_mixture(problem, a, b, horizon, another))
    assert_equal(term.gradient, sum(part.gradient for part in term.parts))
    assert_equal(term.value, sum(part.value for part in term.parts))


FACTORED = (
    "k2_as_loss,bound=0.3",
    "k1_as_loss",
    "k3_as_loss,ratio=rollout",
    "tv_as_loss,cap=1.1",
    "js_as_loss,horizon=sequence",
    "forward_as_loss,horizon=sequence",
    "k2_as_loss,horizon=sequence,baseline=batch",
    "k3_in_reward",
    "k1_in_reward,baseline=batch",
    "k2_as_loss,head=clipped",
    "exact_as_loss",
    "exact_as_loss,horizon=sequence,ratio=old",
)


@pytest.mark.parametrize("kl_type", FACTORED)
def test_a_coefficient_multiplies_what_a_term_does_and_no_metric_of_the_kl(kl_type: str) -> None:
    problem = PROBLEMS["varying length"]()
    log_probs, old = problem.log_probs(problem.policy()), problem.log_probs(problem.old())

    def term(text: str):
        return kl_term(
            text,
            log_probs,
            problem.log_probs(problem.ref()),
            problem.mask,
            old_log_probs=old,
            rollout_log_probs=old,
            clip_range=(10.0, 10.0),
            exact_kl=over_the_vocabulary(problem, kl_type) if "exact" in kl_type else None,
        )

    alone, half = term(kl_type), term(f"0.5*{kl_type}")
    for name in ("value", "coefficient", "gradient"):
        assert_equal(getattr(half, name), 0.5 * getattr(alone, name))
    assert_equal(half.weight, alone.weight)
    assert_equal(problem.gradient(half.loss.sum()), 0.5 * problem.gradient(alone.loss.sum()))
    for name, metric in alone.metrics.items():
        scaled = name in ("klplug/coef_mean", "klplug/coef_max")
        assert_equal(half.metrics[name], (0.5 if scaled else 1.0) * metric)


def test_under_the_policy_losss_clip_a_coefficient_is_as_much_kl_coef() -> None:
    problem = PROBLEMS["varying length"]()
    given = surrogate_inputs(problem)
    half = policy_loss("0.5*k2_as_loss,head=combined", **given, kl_coef=0.8, clip_range=CLIP)
    whole = policy_loss("k2_as_loss,head=combined", **given, kl_coef=0.4, clip_range=CLIP)
    assert_equal(problem.gradient(half.sum()), problem.gradient(whole.sum()))


# An advantage of either sign for each answer, and a clip that acts on some tokens.
CLIP = (0.2, 0.3)


def surrogate_inputs(problem: Problem) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    advantages = torch.randn(problem.mask.shape[0], 1, generator=generator, dtype=torch.float64)
    return {
        "log_probs": problem.log_probs(problem.policy()),
        "ref_log_probs": problem.log_probs(problem.ref()),
        "response_mask": problem.mask,
        "old_log_probs": problem.log_probs(problem.old()),
        "advantages": advantages.expand_as(problem.mask),
    }


def expected_surrogate(problem: Problem, head: str, beta: float, whole_answers: bool) -> Tensor:
    """The heads as they are written down, differentiated by autograd."""
    given = surrogate_inputs(problem)
    rho = (given["log_probs"] - given["old_log_probs"]).exp()
    clipped = rho.clamp(1 - CLIP[0], 1 + CLIP[1])
    c = (given["log_probs"] - given["ref_log_probs"]).detach()
    c = reward_to_go(c) if whole_answers else c
    advantages = given["advantages"]
    if head == "combined":
        force = advantages - beta * c
        loss = -torch.minimum(rho * force, clipped * force)
    else:
        loss = -torch.minimum(rho * advantages, clipped * advantages)
        kl = {"separate": rho.detach() * c * given["log_probs"]}
        kl["clipped"] = torch.maximum(rho * c, clipped * c)
        loss = loss + beta * kl[head]
    weight = problem.answer_probability(problem.old())[:, None] * problem.mask
    return problem.gradient((weight * loss).sum())


@pytest.mark.parametrize("horizon", ["token", "sequence"])
@pytest.mark.parametrize("head", ["separate", "combined", "clipped"])
def test_policy_loss_is_the_papers_head(problem: Problem, head: str, horizon: str) -> None:
    if head == "separate" and horizon == "sequence":
        pytest.skip("its weight is inside the sum: in the tests above")
    whole = horizon == "sequence"
    options = ",cap=none" if head == "separate" else ""
    kl_type = f"k2_as_loss,head={head},horizon={horizon}{options}"
    given = surrogate_inputs(problem)
    weight = problem.answer_probability(problem.old())[:, None]

    def gradient(beta: float, **inputs: Tensor) -> Tensor:
        loss = policy_loss(kl_type, **given | inputs, kl_coef=beta, clip_range=CLIP)
        return problem.gradient((weight * loss).sum())

    assert_equal(gradient(0.7), expected_surrogate(problem, head, 0.7, whole))
    without = problem.gradient(
        (weight * policy_loss("none", **given, kl_coef=0.0, clip_range=CLIP)).sum()
    )
    assert_equal(gradient(0.0), without)
    others = {"separate", "combined", "clipped"} - {head}
    for other in others if many_tokens(problem) else ():
        assert_different(gradient(0.7), expected_surrogate(problem, other, 0.7, whole))


@pytest.mark.parametrize("horizon", ["token", "sequence"])
def test_on_policy_the_three_heads_are_one(horizon: str) -> None:
    problem = PROBLEMS["three tokens"]()
    given = surrogate_inputs(problem)
    given["old_log_probs"] = given["log_probs"].detach()
    weight = problem.answer_probability(problem.policy()).detach()[:, None]
    one, *others = (
        problem.gradient(
            (
                weight
                * policy_loss(f"k2_as_loss,head={head},horizon={horizon}", **given, kl_coef=0.7)
            ).sum()
        )
        for head in ("separate", "combined", "clipped")
    )
    for other in others:
        assert_equal(other, one)


def test_two_names_one_program() -> None:
    assert parse("k1_in_reward,head=combined") == parse("k2_as_loss,head=combined,horizon=sequence")
    problem = PROBLEMS["one token"]()
    given = surrogate_inputs(problem)
    losses = [
        policy_loss(kl_type, **given, kl_coef=0.7, clip_range=CLIP)
        for kl_type in ("k1_in_reward,head=combined", "k2_as_loss,head=combined")
    ]
    assert torch.equal(losses[0], losses[1])


def pairs(problem: Problem, behaviour: Tensor) -> tuple[Tensor, Tensor]:
    """Every ordered pair of answers to one prompt, and its probability."""
    count = len(problem.answers)
    rows = torch.cartesian_prod(torch.arange(count), torch.arange(count))
    probability = problem.answer_probability(behaviour).detach()
    return rows, probability[rows].prod(-1)


@pytest.mark.parametrize("name", ["batch", "group"])
@pytest.mark.parametrize(
    "kl_type",
    [
        "k2_as_loss,horizon=sequence",
        "k2_as_loss,horizon=sequence,level=sequence",
        "js_as_loss,horizon=sequence",
        "js_as_loss,horizon=answer",
        "k2_as_loss,horizon=sequence,ratio=none",
        "k1_in_reward",
    ],
)
def test_a_baseline_leaves_the_expected_gradient(kl_type: str, name: str) -> None:
    problem = PROBLEMS["varying length"]()
    placement, ratio = parse(kl_type).placement, parse(kl_type).ratio
    behaviour = problem.policy().detach() if ratio == "none" else problem.old()
    rows, probability = pairs(problem, behaviour)

    def of_pairs(x: Tensor) -> Tensor:
        return x[rows].flatten(0, 1)

    log_probs = of_pairs(problem.log_probs(problem.policy()))
    given = {
        "log_probs": log_probs,
        "ref_log_probs": of_pairs(problem.log_probs(problem.ref())),
        "response_mask": of_pairs(problem.mask),
        "old_log_probs": of_pairs(problem.log_probs(behaviour)),
        "group_ids": torch.arange(len(rows)).repeat_interleave(2),
    }

    def loss(term_of: dict[str, Tensor], options: str) -> Tensor:
        term = kl_term(f"{kl_type}{options}", **term_of)
        if placement == "as_loss":
            return term.loss
        return reward_to_go(term.coefficient) * term_of["response_mask"] * term_of["log_probs"]

    if name == "group":
        lost = loss(given, ",baseline=group")
    else:  # each pair a batch of its own
        parts = [
            loss({k: v[2 * i : 2 * i + 2] for k, v in given.items()}, ",baseline=batch")
            for i in range(len(rows))
        ]
        lost = torch.cat(parts)
    weight = probability.repeat_interleave(2)[:, None] / 2
    targets = OFF_POLICY if ratio == "old" else {**ON_POLICY_LOSS, **ON_POLICY_REWARD}
    expected = targets[kl_type.removesuffix(",ratio=none")](problem)
    assert_equal(problem.gradient((weight * lost).sum()), expected)
    uncapped = "" if ratio == "none" else ",cap=none"
    per_token = [
        torch.autograd.grad(x.sum(), log_probs, retain_graph=True)[0]
        for x in (lost, loss(given, uncapped))
    ]
    assert_different(*per_token)


@pytest.mark.parametrize("kl_type", ["k2_as_loss", "forward_as_loss", "js_as_loss"])
def test_groups_may_differ_in_size(kl_type: str) -> None:
    """Two answers to one prompt and three to another, in one batch, of one token or two."""
    problem, sizes = Problem(vocabulary=2, length=2, stops=True, seed=4), (2, 3)
    count = sum(sizes)
    drawn = torch.cartesian_prod(*[torch.arange(len(problem.answers))] * count)
    rows = drawn.flatten()
    probability = problem.answer_probability(problem.old())[drawn].prod(-1)
    prompts = [prompt for prompt, size in enumerate(sizes) for _ in range(size)]
    policy, ref, old = (
        problem.log_probs(x)[rows] for x in (problem.policy(), problem.ref(), problem.old())
    )
    kl_type = f"{kl_type},horizon=sequence,baseline=group"
    term = kl_term(
        kl_type,
        policy,
        ref,
        problem.mask[rows],
        old_log_probs=old,
        group_ids=[(batch, prompt) for batch in range(len(drawn)) for prompt in prompts],
    )
    weight = probability.repeat_interleave(count)[:, None] / count
    target = OFF_POLICY[kl_type.removesuffix(",baseline=group")](problem)
    assert_equal(problem.gradient((weight * term.loss).sum()), target)


def test_a_baseline_from_the_start_of_the_step_is_unbiased_too() -> None:
    problem = PROBLEMS["varying length"]()
    rows, probability = pairs(problem, problem.old())
    log_probs, ref, old, mask = (
        x[rows].flatten(0, 1)
        for x in (
            problem.log_probs(problem.policy()),
            problem.log_probs(problem.ref()),
            problem.log_probs(problem.old()),
            problem.mask,
        )
    )
    kl_type, ids = "k2_as_loss,horizon=sequence,baseline=group", [i // 2 for i in range(len(mask))]
    baseline = kl_return_baseline(kl_type, old, ref, mask, ids)
    term = kl_term(kl_type, log_probs, ref, mask, old_log_probs=old, return_baseline=baseline)
    weight = probability.repeat_interleave(2)[:, None] / 2
    assert_equal(problem.gradient((weight * term.loss).sum()), problem.full())


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n != "forward"])
def test_on_the_references_own_answers(problem: Problem, name: str) -> None:
    """The reference as the sampler: its answers, its log-probs in both places, no other policy."""
    ref = problem.log_probs(problem.ref())
    probability = problem.answer_probability(problem.ref())[:, None]

    def gradient(kl_type: str) -> Tensor:
        policy = problem.log_probs(problem.policy())
        term = kl_term(
            f"{kl_type},ratio=rollout,cap=none", policy, ref, problem.mask, rollout_log_probs=ref
        )
        return problem.gradient((probability * term.loss).sum())

    found = gradient(f"{name}_as_loss,horizon=answer")
    assert_equal(found, problem.between_answers(name))
    likelihood = (probability[:, 0] * problem.log_probs(problem.policy()).sum(-1)).sum()
    forward = gradient("forward_as_loss,horizon=sequence")
    assert_equal(forward, -problem.gradient(likelihood))
    assert_equal(forward, problem.full_forward())


# ── The posterior as the reference ──────────────────────────────────────────────────────────────

TEMPERATURE = 0.7  # beta
TO_POSTERIOR = {
    f"{kl_type},reference=posterior": f
    for f, kl_type in {"reverse": "k2_as_loss", **LOSS_OF}.items()
}


@pytest.mark.parametrize("kl_type", TO_POSTERIOR)
def test_the_posterior_as_reference(problem: Problem, kl_type: str) -> None:
    """With its own Z, wherever along an answer what is not ref's lies."""
    f, posterior = TO_POSTERIOR[kl_type], problem.posterior(TEMPERATURE)
    ref = problem.log_probs(problem.ref())
    first = torch.zeros_like(ref)
    first[:, 0] = posterior.log() - ref.sum(-1)
    expected = problem.between_answers(f, posterior)
    on_policy = problem.policy().detach()
    for behaviour, ratio in (
        (on_policy, "ratio=none"),
        (on_policy, "ratio=old,cap=none"),
        (problem.old(), "ratio=old,cap=none"),
        (problem.old(), "ratio=rollout,cap=none"),
    ):
        given = {"posterior_log_probs": ref + first}
        assert_equal(loss_gradient(problem, f"{kl_type},{ratio}", behaviour, **given), expected)
    if f != "tv" or many_tokens(problem):  # of one token no sign is another here
        assert_different(expected, problem.between_answers(f))


def test_to_the_posterior_the_targets_differ(problem: Problem) -> None:
    posterior = problem.posterior(TEMPERATURE)
    targets = {f: problem.between_answers(f, posterior) for f in TO_POSTERIOR.values()}
    assert_equal(2 * targets.pop("alpha,alpha=2"), targets["chi2"])
    assert_equal(targets.pop("alpha"), 2 * targets["hellinger"])
    names = list(targets)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert_different(targets[one], targets[other])


def of_groups(problem: Problem, kl_type: str, behaviour: Tensor, size: int) -> Tensor:
    """The expected gradient of groups of ``size`` answers from ``behaviour``, Z from the group."""
    drawn = torch.cartesian_prod(*[torch.arange(len(problem.answers))] * size)
    rows = drawn.flatten()
    old, ref, mask = problem.log_probs(behaviour), problem.log_probs(problem.ref()), problem.mask
    samples = Samples(
        mask[rows],
        log_probs=old[rows],
        ref_log_probs=ref[rows],
        rewards=problem.rewards[rows],
        group_ids=torch.arange(len(drawn)).repeat_interleave(size),
    )
    term = kl_term(
        f"{kl_type},cap=none",
        problem.log_probs(problem.policy())[rows],
        ref[rows],
        mask[rows],
        old_log_probs=old[rows],
        posterior_log_probs=posterior_log_probs(samples, TEMPERATURE),
    )
    probability = problem.answer_probability(behaviour).detach()[drawn].prod(-1)
    weight = probability.repeat_interleave(size)[:, None] / size
    return problem.gradient((weight * term.loss).sum())


@pytest.mark.parametrize("policy", ["pi", "old"])
def test_z_from_the_other_answers_leaves_the_reverse_kl_exact(
    problem: Problem, policy: str
) -> None:
    """And times beta that is minus the gradient of E[r] - beta KL(pi||ref)."""
    behaviour = problem.policy().detach() if policy == "pi" else problem.old()
    found = of_groups(problem, "k2_as_loss,reference=posterior", behaviour, 2)
    rewards = problem.gradient(problem.answer_probability(problem.policy()) @ problem.rewards)
    assert_equal(TEMPERATURE * found, TEMPERATURE * problem.full() - rewards)
    assert_equal(found, problem.between_answers("reverse", problem.posterior(TEMPERATURE)))


# Of what c has a power of u, and which.
POWERS = {
    "forward_as_loss": -1,
    "hellinger_as_loss": -0.5,
    "chi2_as_loss": 1,
    "alpha_as_loss,alpha=2": 1,
    "alpha_as_loss,alpha=-1": -2,
}


@pytest.mark.parametrize("kl_type", POWERS)
def test_z_from_the_other_answers_leaves_a_power_its_direction(
    problem: Problem, kl_type: str
) -> None:
    """The factor is the mean of that power of the estimate over Z: of chi2 it is 1."""
    behaviour, reference = problem.old(), "reference=posterior"
    found = of_groups(problem, f"{kl_type},{reference}", behaviour, 2)
    old = problem.answer_probability(behaviour)
    weights = problem.answer_probability(problem.ref()) * (problem.rewards / TEMPERATURE).exp()
    factor = (old * (weights / old / weights.sum()) ** POWERS[kl_type]).sum()
    f = TO_POSTERIOR[f"{kl_type},{reference}"]
    exact = problem.between_answers(f, problem.posterior(TEMPERATURE))
    assert_equal(found, factor * exact)
    assert_equal(factor, factor * 0 + 1) if POWERS[kl_type] == 1 else assert_different(found, exact)


@pytest.mark.parametrize("f", ["js", "jeffreys"])
def test_with_more_answers_z_biases_another_divergence_less(f: str) -> None:
    problem = PROBLEMS["one token"]()
    exact = problem.between_answers(f, problem.posterior(TEMPERATURE))
    kl_type = f"{f}_as_loss,reference=posterior"
    found = [of_groups(problem, kl_type, problem.old(), n) for n in (2, 3, 4)]
    off = [(one - exact).norm() for one in found]
    assert off[0] > off[1] > off[2] > 1e-3 * exact.norm()
    assert all(torch.cosine_similarity(one, exact, dim=0) > 0.98 for one in found)


def test_beside_the_posterior_there_is_no_policy_loss(problem: Problem) -> None:
    given = surrogate_inputs(problem)
    given["posterior_log_probs"] = given["ref_log_probs"] - 0.1
    kl_type = "js_as_loss,reference=posterior"
    found = problem.gradient(
        policy_loss(kl_type, **given, kl_coef=TEMPERATURE, clip_range=CLIP).sum()
    )
    del given["advantages"]
    assert_equal(found, problem.gradient(TEMPERATURE * kl_term(kl_type, **given).loss.sum()))
    assert found.norm() > 0


# ── Exact over the vocabulary ───────────────────────────────────────────────────────────────────


def over_the_vocabulary(problem: Problem, kl_type: str) -> Tensor:
    """``exact_kl`` at each prefix, from logits as hidden states; no number where masked."""
    spec = parse(kl_type)
    identity = torch.eye(problem.vocabulary, dtype=torch.float64)
    logits = problem.features @ problem.theta
    targets = torch.zeros(len(logits), dtype=torch.long)
    named = {"divergence": spec.estimator, "alpha": spec.alpha}
    if spec.top is None:
        kl = exact_kl(logits, identity, problem.ref_logits, identity, targets, **named).kl
    else:
        top = problem.ref().topk(spec.top)
        kl = topk_kl(logits, identity, targets, top.indices, top.values, **named).kl
    return torch.where(problem.mask, kl[problem.prefix_of], torch.nan)


def exact_gradients(problem: Problem, kl_type: str, behaviour: Tensor) -> list[Tensor]:
    """The gradient of each answer's loss, and their expectation last."""
    term = kl_term(
        kl_type,
        problem.log_probs(problem.policy()),
        problem.log_probs(problem.ref()),
        problem.mask,
        old_log_probs=problem.log_probs(behaviour),
        rollout_log_probs=problem.log_probs(behaviour),
        exact_kl=over_the_vocabulary(problem, kl_type),
    )
    each = [problem.gradient(loss) for loss in term.loss.sum(-1)]
    probability = problem.answer_probability(behaviour).detach()
    return [*each, (probability[:, None] * torch.stack(each)).sum(0)]


EXACT = {"exact": "reverse"} | {f"{name}": name for name in DIVERGENCES}
EXACT_NAMES = {
    name: "exact_as_loss" if name == "exact" else f"{name}_as_loss,vocab=exact" for name in EXACT
}
ON_ANSWERS = [name for name in EXACT if name != "forward"]


@pytest.mark.parametrize("ratio", ["none", "old", "rollout"])
@pytest.mark.parametrize("name", EXACT)
def test_on_policy_the_exact_kl_has_the_gradient_of_the_sampled_one(
    problem: Problem, name: str, ratio: str
) -> None:
    on_policy, kl_type = problem.policy().detach(), f"{EXACT_NAMES[name]},ratio={ratio}"
    assert_equal(exact_gradients(problem, kl_type, on_policy)[-1], problem.loc(EXACT[name]))
    if name in ON_ANSWERS:
        found = exact_gradients(problem, f"{kl_type},horizon=sequence", on_policy)[-1]
        expected = problem.full() if name == "exact" else problem.expected(EXACT[name])
        assert_equal(found, expected)


def test_the_public_code_of_the_rao_blackwell_paper_follows_whole_answers() -> None:
    """rycolab/kl-rb, rloo_trainer.py: the answer's sum of exact KLs, differentiated, in its reward.

    The reward stands before the answer's ratio, as it does in RLOO's surrogate.
    """
    problem = PROBLEMS["three tokens"]()
    kl = torch.where(problem.mask, problem.per_prefix("reverse")[problem.prefix_of], 0.0).sum(-1)
    ratio = problem.log_probs(problem.policy()).sum(-1)
    ratio = (ratio - ratio.detach()).exp()
    probability = problem.answer_probability(problem.policy()).detach()
    theirs = problem.gradient((probability * kl * ratio).sum())
    on_policy, kl_type = problem.policy().detach(), PAPERS["rao-blackwell"].kl_type
    assert_equal(exact_gradients(problem, kl_type, on_policy)[-1], theirs)
    assert_different(exact_gradients(problem, "exact_as_loss", on_policy)[-1], theirs)


@pytest.mark.parametrize("name", EXACT)
def test_off_policy_the_exact_kl_needs_a_ratio_of_the_tokens_before_alone(
    problem: Problem, name: str
) -> None:
    old, kl_type, divergence = problem.old(), EXACT_NAMES[name], EXACT[name]
    oldpref, loc = problem.oldpref(divergence), problem.loc(divergence)
    assert_equal(exact_gradients(problem, kl_type, old)[-1], oldpref)
    for ratio in ("old", "rollout"):
        weighted = f"{kl_type},ratio={ratio},cap=none"
        assert_equal(exact_gradients(problem, weighted, old)[-1], loc)
    if many_tokens(problem):
        assert_different(oldpref, loc)
    if name not in ON_ANSWERS:
        return
    full = problem.full() if name == "exact" else problem.expected(divergence)
    found = exact_gradients(problem, f"{kl_type},horizon=sequence,cap=none", old)[-1]
    assert_equal(found, full)
    if many_tokens(problem):
        assert_different(full, loc)
        unweighted = exact_gradients(problem, f"{kl_type},horizon=sequence,ratio=none", old)[-1]
        assert_different(unweighted, full)


@pytest.mark.parametrize("name", EXACT)
def test_the_top_tokens_have_the_gradient_of_their_categories(problem: Problem, name: str) -> None:
    categories = dataclasses.replace(problem, top=1)
    old, divergence = problem.old(), EXACT[name]
    kl_type = f"{'k2' if name == 'exact' else name}_as_loss,vocab=topk:1"
    oldpref, loc = categories.oldpref(divergence), categories.loc(divergence)
    assert_equal(exact_gradients(problem, kl_type, old)[-1], oldpref)
    assert_equal(exact_gradients(problem, f"{kl_type},ratio=old,cap=none", old)[-1], loc)
    if problem.vocabulary > 2:
        assert_different(oldpref, problem.oldpref(divergence))
    if name in ON_ANSWERS:
        found = exact_gradients(problem, f"{kl_type},horizon=sequence,cap=none", old)[-1]
        assert_equal(found, categories.expected(divergence))


def test_the_exact_kl_has_no_noise_of_its_own_token() -> None:
    one_token = PROBLEMS["one token"]()
    *each, mean = exact_gradients(one_token, "exact_as_loss", one_token.old())
    for gradient in each:
        assert_equal(gradient, mean)
    sampled = kl_term(
        "k2_as_loss,cap=none",
        one_token.log_probs(one_token.policy()),
        one_token.log_probs(one_token.ref()),
        one_token.mask,
        old_log_probs=one_token.log_probs(one_token.old()),
    )
    assert_different(one_token.gradient(sampled.loss[0].sum()), mean)


@pytest.mark.parametrize("kl_type", ["exact_as_loss,horizon=sequence", "exact_as_loss"])
def test_under_a_policy_loss_the_exact_kl_is_what_it_is_beside_it(kl_type: str) -> None:
    problem = PROBLEMS["varying length"]()
    old, log_probs = problem.log_probs(problem.old()), problem.log_probs(problem.policy())
    ref, kl = problem.log_probs(problem.ref()), over_the_vocabulary(problem, kl_type)
    advantages = torch.randn(log_probs.shape, dtype=torch.float64)
    given = {"old_log_probs": old, "advantages": advantages, "kl_coef": 0.3}
    both = policy_loss(kl_type, log_probs, ref, problem.mask, **given, exact_kl=kl)
    alone = policy_loss("none", log_probs, None, problem.mask, **given)
    term = kl_term(kl_type, log_probs, ref, problem.mask, old_log_probs=old, exact_kl=kl)
    assert_equal(both, alone + 0.3 * term.loss)
    found, expected = (problem.gradient(x.sum()) for x in (both, alone + 0.3 * term.loss))
    assert_equal(found, expected)


def test_a_sum_of_an_exact_kl_and_a_sampled_one() -> None:
    problem = PROBLEMS["three tokens"]()
    old, kl = problem.old(), over_the_vocabulary(problem, "exact_as_loss")
    log_probs, ref = problem.log_probs(problem.policy()), problem.log_probs(problem.ref())
    probability = problem.answer_probability(old).detach()[:, None]

    def gradient(kl_type: str) -> Tensor:
        term = kl_term(
            kl_type, log_probs, ref, problem.mask, old_log_probs=problem.log_probs(old), exact_kl=kl
        )
        assert_equal(term.loss.detach(), term.value)
        return problem.gradient((probability * term.loss).sum())

    sampled = "k3_as_loss,cap=none"
    expected = problem.oldpref() + problem.oldpref("forward")
    assert_equal(gradient(f"exact_as_loss+{sampled}"), expected)
    assert_equal(gradient(f"{sampled}+exact_as_loss"), expected)


def test_monitor_measures_the_kl_and_moves_nothing(problem: Problem) -> None:
    policy, kl = problem.policy(), 0.0
    for i, probability in enumerate(problem.answer_probability(policy).tolist()):
        row = slice(i, i + 1)
        log_probs = problem.log_probs(policy)[row]
        mask = problem.mask[row]
        term = kl_term("monitor", log_probs, problem.log_probs(problem.ref())[row], mask)
        assert (problem.gradient(term.loss.sum()) == 0).all()
        kl += probability * float(term.metrics["klplug/k1"] * mask.sum())
    expected = (problem.reach(policy) * problem.per_prefix("reverse")).sum()
    assert_equal(torch.tensor(kl, dtype=torch.float64), expected.detach())


def test_every_catalogued_kl_type_is_in_an_oracle() -> None:
    tested = {
        "k2_as_loss,vocab=exact",
        "k2_as_loss,vocab=exact,horizon=sequence",
        "k2_as_loss,vocab=topk:64",
        *ON_POLICY_LOSS,
        *ON_POLICY_REWARD,
        *HEADS,
        "k2_as_loss,reference=rollout",
        "k2_as_loss,ratio=none,reference=rollout",
        "k2_as_loss,reference=old",
        "0.7*k2_as_loss+0.3*k2_as_loss,reference=old",
        "k2_as_loss,reference=teacher",
        "1.25*k2_as_loss,reference=teacher+-0.25*k2_as_loss",
        "k3_in_reward+k3_as_loss",
        *TO_POSTERIOR,
        "monitor",
        "none",
    }
    assert set(kl_types()) <= tested
    assert all(row.test in globals() for row in kl_types().values() if row.name != "none")
