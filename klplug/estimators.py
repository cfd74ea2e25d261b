"""The score coefficient c: one row per estimator of the KL, and nothing else.

Every estimator is a function of ``log_ratio = log pi_theta(y_t) - log pi_ref(y_t)``, in nats.
Placed in the reward it acts through its value, placed as a loss through its derivative with
respect to ``log pi_theta``; that number, times ``grad log pi_theta(y_t)``, is the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def saturating_exp(x: Tensor) -> Tensor:
    """``exp(x)``, held at the dtype's largest finite number where it would overflow.

    The only bound in klplug that nobody asked for; ``klplug/overflow_share`` counts where it acted.
    """
    return x.exp().clamp(max=torch.finfo(x.dtype).max)


def overflows(x: Tensor) -> Tensor:
    """True where ``exp(x)`` would exceed the largest finite number of ``x``'s dtype."""
    return x.exp().isinf()


def k1(log_ratio: Tensor) -> Tensor:
    """``lr``: unbiased for KL(pi||ref) under samples from pi, of either sign."""
    return log_ratio


def k1_derivative(log_ratio: Tensor) -> Tensor:
    return torch.ones_like(log_ratio)


def k2(log_ratio: Tensor) -> Tensor:
    """``lr^2 / 2``: a biased value, whose derivative ``lr`` is the right coefficient."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """``exp(-lr) - 1 + lr``: unbiased for KL(pi||ref) under samples from pi, never negative."""
    # expm1 keeps the digits that exp(-lr) - 1 loses near the reference.
    return torch.expm1(-log_ratio).clamp(max=torch.finfo(log_ratio.dtype).max) + log_ratio


def k3_derivative(log_ratio: Tensor) -> Tensor:
    return -torch.expm1(-log_ratio).clamp(max=torch.finfo(log_ratio.dtype).max)


@dataclass(frozen=True)
class Role:
    """What one estimator does in one placement: its coefficient and whose gradient that is."""

    coefficient: Callable[[Tensor], Tensor]
    formula: str
    target: str
    gradient_bias: str
    off_policy: str


@dataclass(frozen=True)
class Estimator:
    """One row of the registry: a value, what it does as a loss, and what it does in the reward."""

    name: str
    value: Callable[[Tensor], Tensor]
    formula: str
    value_bias: str
    as_loss: Role
    in_reward: Role
    source: str

    def role(self, placement: str) -> Role:
        return self.as_loss if placement == "as_loss" else self.in_reward


_LIU = "Liu et al. 2025, arXiv 2510.01555"
_SCHULMAN = "Schulman 2020, joschu.net/blog/kl-approx.html"
_REWARD_OFF_POLICY = "frozen at theta_old: exact on the first update after a rollout, biased later"

ESTIMATORS: dict[str, Estimator] = {
    row.name: row
    for row in (
        Estimator(
            name="k1",
            value=k1,
            formula="lr",
            value_bias="unbiased for KL(pi||ref)",
            as_loss=Role(
                coefficient=k1_derivative,
                formula="1",
                target="zero",
                gradient_bias="not a regulariser: noise of mean zero",
                off_policy="still zero with the ratio; without it -grad KL(old||pi): away from old",
            ),
            in_reward=Role(
                coefficient=k1,
                formula="lr",
                target="FULL: grad KL(pi||ref) over whole answers",
                gradient_bias="unbiased",
                off_policy=_REWARD_OFF_POLICY,
            ),
            source=f"{_LIU}, Theorem 5.1; {_SCHULMAN}",
        ),
        Estimator(
            name="k2",
            value=k2,
            formula="lr^2 / 2",
            value_bias="biased for KL(pi||ref), second order near the reference",
            as_loss=Role(
                coefficient=k1,
                formula="lr",
                target="LOC: grad KL(pi||ref) of each token, prefixes held fixed",
                gradient_bias="unbiased for LOC; myopic on answers of more than one token",
                off_policy="OLDPREF: the same at the prefixes of old, exact below the cap",
            ),
            in_reward=Role(
                coefficient=k2,
                formula="lr^2 / 2",
                target="grad E[k2] - grad KL(pi||ref)",
                gradient_bias="wrong: second order near the reference, below it the wrong way",
                off_policy=_REWARD_OFF_POLICY,
            ),
            source=f"{_LIU}, Theorem 5.1; {_SCHULMAN}",
        ),
        Estimator(
            name="k3",
            value=k3,
            formula="exp(-lr) - 1 + lr",
            value_bias="unbiased for KL(pi||ref)",
            as_loss=Role(
                coefficient=k3_derivative,
                formula="1 - exp(-lr)",
                target="LOC of the forward KL: grad KL(ref||pi) of each token",
                gradient_bias="biased for KL(pi||ref), by -k3: first-order right near the "
                "reference, saturates at 1 above it, explodes below it",
                off_policy="the same at the prefixes of old, exact below the cap",
            ),
            in_reward=Role(
                coefficient=k3,
                formula="exp(-lr) - 1 + lr",
                target="FULL of the reverse minus LOC of the forward KL",
                gradient_bias="wrong: next to nothing near the reference, below it the wrong way",
                off_policy=_REWARD_OFF_POLICY,
            ),
            source=f"{_LIU}; {_SCHULMAN}; GRPO, arXiv 2402.03300, equation 4",
        ),
        Estimator(
            name="abs",
            value=torch.abs,
            formula="|lr|",
            value_bias="biased: an upper bound of KL(pi||ref) in expectation",
            as_loss=Role(
                coefficient=torch.sign,
                formula="sign(lr)",
                target="LOC of twice the total variation",
                gradient_bias="unbiased for 2 grad TV; does not fade near the reference",
                off_policy="the same at the prefixes of old, exact below the cap",
            ),
            in_reward=Role(
                coefficient=torch.abs,
                formula="|lr|",
                target="grad E[|lr|] - 2 grad TV",
                gradient_bias="wrong: below the reference the wrong way",
                off_policy=_REWARD_OFF_POLICY,
            ),
            source="verl's `abs`; f-divergence with f = |t - 1| / 2",
        ),
    )
}

# Names that users of the hosts know, reported under the one true name.
ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
