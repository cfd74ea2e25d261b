"""The score coefficient c: one row per estimator of the KL, and nothing else.

Every estimator is a function of ``log_ratio = log pi_theta(y_t) - log pi_ref(y_t)``, in nats.
Placed in the reward it acts through its value, placed as a loss through its derivative with
respect to ``log pi_theta``; that number, times ``grad log pi_theta(y_t)``, is the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from klplug.numerics import finite, largest_exponent, saturating_exp, saturating_expm1

if TYPE_CHECKING:  # the rows are read where there is no torch; a formula is a tensor's methods
    from torch import Tensor

Function: TypeAlias = "Callable[[Tensor], Tensor]"


def k1(log_ratio: Tensor) -> Tensor:
    """``lr``: unbiased for KL(pi||ref) under samples from pi, of either sign."""
    return log_ratio


def k1_derivative(log_ratio: Tensor) -> Tensor:
    return log_ratio.new_ones(log_ratio.shape)


def k2(log_ratio: Tensor) -> Tensor:
    """``lr^2 / 2``: a biased value, whose derivative ``lr`` is the right coefficient."""
    return log_ratio.square().mul_(0.5)


def k3(log_ratio: Tensor) -> Tensor:
    """``exp(-lr) - 1 + lr``: unbiased for KL(pi||ref) under samples from pi, never negative."""
    return saturating_expm1(-log_ratio).add_(log_ratio)


def k3_derivative(log_ratio: Tensor) -> Tensor:
    return saturating_expm1(-log_ratio).neg_()


def k3_of_derivative(log_ratio: Tensor, derivative: Tensor) -> Tensor:
    """``k3 = lr - k3'``, to the bit and without a second exponential."""
    return log_ratio - derivative


def absolute(log_ratio: Tensor) -> Tensor:
    return log_ratio.abs()


def sign(log_ratio: Tensor) -> Tensor:
    return log_ratio.sign()


# f-divergences E_ref f(u), u = exp(lr): the value under samples from pi is f(u)/u, the derivative
# of the divergence is f'(u) - f'(1).


def forward(log_ratio: Tensor) -> Tensor:
    return finite(-log_ratio * saturating_exp(-log_ratio))


def forward_of_answer(log_ratio: Tensor) -> Tensor:
    """``1 - prod_{i<=t} exp(-lr_i)``: the coefficient of KL(ref||pi) over whole answers."""
    return k3_derivative(log_ratio.cumsum(-1))


def js(log_ratio: Tensor) -> Tensor:
    half_sum = log_ratio - js_derivative(log_ratio)  # log((u + 1) / 2)
    return finite(log_ratio - half_sum - half_sum * saturating_exp(-log_ratio))


def js_derivative(log_ratio: Tensor) -> Tensor:
    # log(2u / (u + 1)), with the digits that log(2) - log(1 + 1/u) loses near the reference.
    return log_ratio.clamp(max=0) - log_ratio.abs().neg().expm1().div(2).log1p()


def jeffreys(log_ratio: Tensor) -> Tensor:
    return finite(log_ratio * k3_derivative(log_ratio))


def jeffreys_derivative(log_ratio: Tensor) -> Tensor:
    return finite(log_ratio + k3_derivative(log_ratio))


def chi2(log_ratio: Tensor) -> Tensor:
    # (u - 1)^2 / u, with the digits that u - 2 + 1/u loses near the reference.
    return finite(4 * (log_ratio / 2).sinh().square())


def chi2_derivative(log_ratio: Tensor) -> Tensor:
    return finite(2 * saturating_expm1(log_ratio))


def hellinger(log_ratio: Tensor) -> Tensor:
    return finite((-log_ratio / 2).expm1().square())


def hellinger_derivative(log_ratio: Tensor) -> Tensor:
    return -saturating_expm1(-log_ratio / 2)


def tv(log_ratio: Tensor) -> Tensor:
    return saturating_expm1(-log_ratio).abs() / 2


def tv_derivative(log_ratio: Tensor) -> Tensor:
    return log_ratio.sign() / 2


@dataclass(frozen=True)
class Role:
    """What one estimator does in one placement: its coefficient and whose gradient that is."""

    coefficient: Function
    formula: str
    target: str
    gradient_bias: str
    off_policy: str


@dataclass(frozen=True)
class Estimator:
    """One row of the registry: a value, what it does as a loss, and what it does in the reward.

    Over whole answers the gradient of a divergence is each token's own derivative plus the values
    that ``later`` tokens have, or ``of_answer``, a coefficient of the answer so far; an estimator
    with neither has no exact form there.
    """

    name: str
    value: Function
    formula: str
    value_bias: str
    as_loss: Role
    in_reward: Role
    source: str
    later: Function | None = None
    of_answer: Function | None = None
    sequence_target: str = ""
    # The value again, where the derivative has done its work already.
    value_of_derivative: Callable[[Tensor, Tensor], Tensor] | None = None

    def role(self, placement: str) -> Role:
        return self.as_loss if placement == "as_loss" else self.in_reward


_LIU = "Liu et al. 2025, arXiv 2510.01555"
_SCHULMAN = "Schulman 2020, joschu.net/blog/kl-approx.html"
_CSISZAR = "f-divergence, Csiszar 1967"
_REWARD_OFF_POLICY = "frozen at theta_old: exact on the first update after a rollout, biased later"


def _divergence(
    name: str,
    divergence: str,
    formula: str,
    value: Function,
    derivative_formula: str,
    derivative: Function,
    source: str = _CSISZAR,
    of_answer: Function | None = None,
    sequence_target: str = "",
) -> Estimator:
    return Estimator(
        name=name,
        value=value,
        formula=formula,
        value_bias=f"unbiased for {divergence}",
        as_loss=Role(
            coefficient=derivative,
            formula=derivative_formula,
            target=f"LOC: grad {divergence} of each token, prefixes held fixed",
            gradient_bias=f"another divergence: unbiased for LOC of {divergence}",
            off_policy="the same at the prefixes of old, exact below the cap",
        ),
        in_reward=Role(
            coefficient=value,
            formula=formula,
            target=f"grad of the expected {divergence}, less E[grad value]: no divergence's",
            gradient_bias="wrong: the value in place of the derivative",
            off_policy=_REWARD_OFF_POLICY,
        ),
        source=source,
        later=None if of_answer else value,
        of_answer=of_answer,
        sequence_target=sequence_target
        or f"grad of the expected {divergence} of all tokens, prefixes included",
    )


@functools.lru_cache
def alpha_divergence(alpha: float) -> Estimator:
    """The row of ``alpha`` for one alpha, D_a: f = (t^a - a t - (1 - a)) / (a (a - 1)).

    Half of chi2 at 2, twice Hellinger at 1/2; the forward KL towards 0, the reverse towards 1.
    """

    def held(log_ratio: Tensor) -> Tensor:
        # The largest of the exponents below stays within the dtype, and keeps its sign.
        limit = largest_exponent(log_ratio) / max(1.0, abs(alpha - 1)) - 2
        return log_ratio.clamp(-limit, limit)

    def value(log_ratio: Tensor) -> Tensor:
        lr = held(log_ratio)
        powers = ((alpha - 1) * lr).expm1() + (alpha - 1) * (-lr).expm1()
        return finite(powers / (alpha * (alpha - 1)))

    def derivative(log_ratio: Tensor) -> Tensor:
        return finite(((alpha - 1) * held(log_ratio)).expm1() / (alpha - 1))

    return _divergence(
        "alpha",
        "D_a(pi, ref)",
        "(u^(a-1) - a - (1-a)/u) / (a(a-1))",
        value,
        "(u^(a-1) - 1) / (a-1)",
        derivative,
        source="alpha divergence, Amari 1985",
    )


ESTIMATORS: dict[str, Estimator] = {
    row.name: row
    for row in (
        Estimator(
            name="k1",
            value=k1,
            formula="x",
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
                formula="x",
                target="FULL: grad KL(pi||ref) over whole answers",
                gradient_bias="unbiased",
                off_policy=_REWARD_OFF_POLICY,
            ),
            source=f"{_LIU}, Theorem 5.1; {_SCHULMAN}",
        ),
        Estimator(
            name="k2",
            value=k2,
            formula="x^2 / 2",
            value_bias="biased for KL(pi||ref), second order near the reference",
            as_loss=Role(
                coefficient=k1,
                formula="x",
                target="LOC: grad KL(pi||ref) of each token, prefixes held fixed",
                gradient_bias="unbiased for LOC; myopic on answers of more than one token",
                off_policy="OLDPREF: the same at the prefixes of old, exact below the cap",
            ),
            in_reward=Role(
                coefficient=k2,
                formula="x^2 / 2",
                target="grad E[k2] - LOC of KL(pi||ref)",
                gradient_bias="wrong: second order near the reference, below it the wrong way",
                off_policy=_REWARD_OFF_POLICY,
            ),
            source=f"{_LIU}, Theorem 5.1; {_SCHULMAN}",
            later=k1,
            sequence_target="FULL: grad KL(pi||ref) over whole answers",
        ),
        Estimator(
            name="k3",
            value=k3,
            formula="exp(-x) - 1 + x",
            value_bias="unbiased for KL(pi||ref)",
            as_loss=Role(
                coefficient=k3_derivative,
                formula="1 - exp(-x)",
                target="LOC of the forward KL: grad KL(ref||pi) of each token",
                gradient_bias="biased for KL(pi||ref), by -k3: first-order right near the "
                "reference, saturates at 1 above it, explodes below it",
                off_policy="the same at the prefixes of old, exact below the cap",
            ),
            in_reward=Role(
                coefficient=k3,
                formula="exp(-x) - 1 + x",
                target="FULL of the reverse minus LOC of the forward KL",
                gradient_bias="wrong: next to nothing near the reference, below it the wrong way",
                off_policy=_REWARD_OFF_POLICY,
            ),
            source=f"{_LIU}; {_SCHULMAN}; GRPO, arXiv 2402.03300, equation 4",
            value_of_derivative=k3_of_derivative,
        ),
        Estimator(
            name="abs",
            value=absolute,
            formula="|x|",
            value_bias="biased: an upper bound of KL(pi||ref) in expectation",
            as_loss=Role(
                coefficient=sign,
                formula="sign(x)",
                target="LOC of twice the total variation",
                gradient_bias="unbiased for 2 grad TV; does not fade near the reference",
                off_policy="the same at the prefixes of old, exact below the cap",
            ),
            in_reward=Role(
                coefficient=absolute,
                formula="|x|",
                target="grad E[|x|] - LOC of twice the total variation",
                gradient_bias="wrong: below the reference the wrong way",
                off_policy=_REWARD_OFF_POLICY,
            ),
            source="`abs` of trainers' KL penalties; f-divergence with f = |t - 1| / 2",
        ),
        _divergence(
            "forward",
            "KL(ref||pi)",
            "-x exp(-x)",
            forward,
            "1 - exp(-x)",
            k3_derivative,
            of_answer=forward_of_answer,
            sequence_target="grad KL(ref||pi) over whole answers",
        ),
        _divergence(
            "js",
            "2 JS(pi, ref)",
            "x - (1 + 1/u) log((u+1)/2)",
            js,
            "log(2u / (u+1))",
            js_derivative,
        ),
        _divergence(
            "jeffreys",
            "KL(pi||ref) + KL(ref||pi)",
            "x (1 - exp(-x))",
            jeffreys,
            "x + 1 - exp(-x)",
            jeffreys_derivative,
        ),
        _divergence(
            "chi2",
            "chi2(pi, ref)",
            "(u-1)^2 / u",
            chi2,
            "2 (u - 1)",
            chi2_derivative,
            source="arXiv 2403.03185",
        ),
        _divergence(
            "hellinger",
            "H2(pi, ref)",
            "(1 - exp(-x/2))^2",
            hellinger,
            "1 - exp(-x/2)",
            hellinger_derivative,
        ),
        _divergence("tv", "TV(pi, ref)", "|1 - exp(-x)| / 2", tv, "sign(x) / 2", tv_derivative),
        alpha_divergence(0.5),
    )
}

# Names that users of the hosts know, reported under the one true name.
ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
