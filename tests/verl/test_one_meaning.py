"""One kl_type, one gradient: verl's side. OpenRLHF's compares itself with the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from klplug import parse
from tests.one_meaning import (
    AS_LOSS,
    BETA,
    IN_REWARD,
    KL_TYPES,
    SUMS,
    TOLERANCE,
    batch,
    loss_gradient,
    reward_advantages,
)
from tests.verl.tensors import KEYS, LAYOUTS, experience, loss
from tests.verl.trainer import TRAINERS, joined, quoted, trainer

SCORES = torch.tensor([1.0, 0.0, 0.25, 0.5])


def gradient(kl_loss_type: str | None, **keywords: Any) -> Tensor:
    given = batch()
    log_probs = given.log_probs.clone().requires_grad_(True)
    value, _ = loss(given, log_probs, kl_loss_type, BETA, **keywords)
    value.backward()
    assert log_probs.grad is not None
    return log_probs.grad


def advantages(kind: str, *overrides: str) -> Tensor:
    made = trainer(*overrides, kind=kind)
    data, _ = joined(made, experience(batch(), SCORES), KEYS)
    found: Tensor = data.batch["advantages"]
    return found


@pytest.mark.parametrize("kl_type", KL_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_the_loss_is_the_shared_one(kl_type: str, layout: str) -> None:
    as_loss = parse(kl_type).placed("as_loss")
    found = gradient(str(as_loss) if as_loss.estimator != "none" else None, layout=layout)
    torch.testing.assert_close(found, loss_gradient(kl_type), rtol=TOLERANCE, atol=1e-8)


@pytest.mark.parametrize("kl_type", [*AS_LOSS, *SUMS])
def test_it_adds_to_the_policy_losss_gradient(kl_type: str) -> None:
    as_loss = parse(kl_type).placed("as_loss")
    own = batch().advantages
    found = gradient(str(as_loss), advantages=own) - gradient(None, advantages=own)
    torch.testing.assert_close(found, loss_gradient(kl_type), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kl_type", [*IN_REWARD, *SUMS, "k2_as_loss"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_the_reward_side_is_the_shared_one(kl_type: str, kind: str) -> None:
    stock = advantages(kind)
    own = (f"+klplug.kl_type={quoted(kl_type)}", f"+klplug.kl_coef={BETA}")
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
