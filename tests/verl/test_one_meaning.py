"""One kl_type, one gradient: verl's side. OpenRLHF's compares itself with the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from klplug_verl.actor import clip_range
from torch import Tensor

from klplug import parse
from tests.one_meaning import (
    BASELINES,
    BETA,
    CLIP_RANGE,
    EXACT,
    IN_REWARD,
    KL_TYPES,
    SUMS,
    TOLERANCE,
    batch,
    exact_step_gradient,
    return_baseline,
    reward_advantages,
    states,
    step_gradient,
)
from tests.verl.tensors import KEYS, LAYOUTS, actor_config, experience, gradient_of_states, loss
from tests.verl.trainer import TRAINERS, joined, quoted, trainer

SCORES = torch.tensor([1.0, 0.0, 0.25, 0.5])


@pytest.mark.parametrize("kl_type", KL_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_the_loss_is_the_shared_one(kl_type: str, layout: str) -> None:
    given, as_loss = batch(), parse(kl_type).placed("as_loss")
    log_probs = given.log_probs.clone().requires_grad_(True)
    low, high = CLIP_RANGE
    value, _ = loss(
        given,
        log_probs,
        str(as_loss) if as_loss.terms else None,
        BETA,
        advantages=given.advantages,
        layout=layout,
        baseline=return_baseline(kl_type),
        clip_ratio_low=low,
        clip_ratio_high=high,
    )
    value.backward()
    torch.testing.assert_close(log_probs.grad, step_gradient(kl_type), rtol=TOLERANCE, atol=1e-7)


@pytest.mark.parametrize("low", [None, 0.1])
@pytest.mark.parametrize("high", [None, 0.4])
def test_the_clip_range_is_where_verls_own_policy_loss_ends(
    low: float | None, high: float | None
) -> None:
    """Where its gradient is not zero: up to the high end for a good answer, down to the low one."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

    config = actor_config(None, 0.0, clip_ratio_low=low, clip_ratio_high=high)
    ratio = torch.linspace(0.5, 1.5, 1001)

    def moves(advantage: float) -> Tensor:
        log_probs = ratio.log().requires_grad_(True)
        old, mask = torch.zeros_like(log_probs), torch.ones_like(log_probs)
        given = (old, log_probs, advantage * mask, mask)
        value, *_ = compute_policy_loss_vanilla(*(part[None] for part in given), config=config)
        value.backward()
        assert log_probs.grad is not None
        return ratio[log_probs.grad != 0]

    found = 1 - clip_range(config)[0], 1 + clip_range(config)[1]
    assert found == pytest.approx((moves(-1.0).min().item(), moves(1.0).max().item()), abs=2e-3)


@pytest.mark.parametrize("kl_type", EXACT)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_over_the_vocabulary_the_gradient_is_the_shared_one(kl_type: str, layout: str) -> None:
    own = states()
    expected = exact_step_gradient(kl_type)
    assert (expected - exact_step_gradient("none")).abs().max() > 1e-3
    found = gradient_of_states(kl_type, own, own.batch(own.hidden), layout)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=TOLERANCE)


def test_the_exact_gradient_is_the_mean_of_the_sampled_ones() -> None:
    """Of every token that could be sampled, in turn and weighed by its probability."""
    own = states()
    given = own.batch(own.hidden)
    exact, without = (gradient_of_states(kl, own, given) for kl in ("exact_as_loss", "none"))
    mean = torch.zeros_like(own.hidden)
    for token in range(len(own.weight)):
        sampled = replace(own, tokens=torch.full_like(own.tokens, token))
        drawn = sampled.batch(own.hidden)
        # k2's gradient is log_probs - ref_log_probs: a reference at which it is the weighed one.
        weighed = drawn.log_probs.exp() * (drawn.log_probs - drawn.ref_log_probs)
        drawn = replace(drawn, ref_log_probs=drawn.log_probs - weighed)
        with_kl = gradient_of_states("k2_as_loss,ratio=none", sampled, drawn)
        mean += with_kl - gradient_of_states("none", sampled, drawn)
    torch.testing.assert_close(exact - without, mean, rtol=1e-4, atol=TOLERANCE)


def advantages(kind: str, *overrides: str) -> Tensor:
    made = trainer(*overrides, kind=kind)
    data, _ = joined(made, experience(batch(), SCORES), KEYS)
    found: Tensor = data.batch["advantages"]
    return found


REWARD_SIDES = (
    *IN_REWARD,
    *SUMS,
    *(kl_type for kl_type in BASELINES if "in_reward" in kl_type),
    "js_in_reward",
    "k2_as_loss,head=combined+k3_in_reward",
    "k1_in_reward,head=combined",
)


@pytest.mark.parametrize("kl_type", REWARD_SIDES)
@pytest.mark.parametrize("kind", TRAINERS)
def test_the_reward_side_is_the_shared_one(
    kl_type: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = advantages(kind)
    own = [f"+klplug.kl_type={quoted(kl_type)}", f"+klplug.kl_coef={BETA}"]
    if "teacher" in kl_type:
        own.append("+klplug.teacher=hub/teacher")
        monkeypatch.setattr("klplug.hosting.references.check", lambda *_, **__: None)
    found = advantages(kind, *own)
    torch.testing.assert_close(found - stock, reward_advantages(kl_type), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kl_type", ["k1_in_reward", "k3_in_reward"])
def test_a_kl_in_the_reward_reaches_the_policys_gradient(kl_type: str) -> None:
    given = batch()
    extra = reward_advantages(kl_type)
    log_probs = given.old_log_probs.clone().requires_grad_(True)
    value, _ = loss(given, log_probs, None, BETA, advantages=extra)
    value.backward()
    assert log_probs.grad is not None
    expected = -extra / given.response_mask.sum()
    torch.testing.assert_close(log_probs.grad, expected, rtol=1e-5, atol=1e-8)
