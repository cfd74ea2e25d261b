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

from klplug.numerics import (
    finite,
    finite_,
    largest_exponent,
    masked_,
    saturating_expm1,
    scaled_expm1,
)

if TYPE_CHECKING:  # the rows are read where there is no torch; a formula is a tensor's methods
    from torch import Tensor

Function: TypeAlias = "Callable[[Tensor], Tensor]"


def k1(log_ratio: Tensor) -> Tensor:
    """``x``: unbiased for KL(pi||ref) under samples from pi, of either sign."""
    return log_ratio


def k1_derivative(log_ratio: Tensor) -> Tensor:
    return log_ratio.new_ones(log_ratio.shape)


def k2(log_ratio: Tensor) -> Tensor:
    """``x^2 / 2``: a biased value, whose derivative ``x`` is the right coefficient."""
    return finite_(log_ratio.square().mul_(0.5))


def k3(log_ratio: Tensor) -> Tensor:
    """``exp(-x) - 1 + x``: unbiased for KL(pi||ref) under samples from pi, never negative."""
    return k3_of_derivative(log_ratio, k3_derivative(log_ratio))


def k3_derivative(log_ratio: Tensor) -> Tensor:
    return saturating_expm1(-log_ratio).neg_()


_BERNOULLI = (
    *(1 / 12, -1 / 720, 1 / 30240),
    *(-1 / 1209600, 1 / 47900160, -691 / 1307674368000, 1 / 74724249600),
)
"""B_2k / (2k)!, of x / (exp(x) - 1) = 1 - x/2 + sum_k B_2k / (2k)! x^2k (Abramowitz 23.1.1)."""


def k3_of_derivative(log_ratio: Tensor, derivative: Tensor) -> Tensor:
    """``k3 = x - k3'``, without a second exponential.

    Near the reference that difference has no digits left, and k3 is
    ``k3' x (1/2 + x sum_k B_2k / (2k)! x^(2k - 2))``.
    """
    square = log_ratio.square()
    first, *others = reversed(_BERNOULLI[: 3 if log_ratio.element_size() == 4 else None])
    series = square.mul(first)
    for i, b in enumerate(others):
        series = series.add_(b) if i == 0 else series.mul_(square).add_(b)
    close = square < 0.25
    del square  # a tensor less at the peak
    near = series.mul_(log_ratio).add_(0.5).mul_(log_ratio).mul_(derivative)
    far = masked_(log_ratio - derivative, ~close)
    return masked_(near, close).add_(far)


def absolute(log_ratio: Tensor) -> Tensor:
    return log_ratio.abs()


def sign(log_ratio: Tensor) -> Tensor:
    return log_ratio.sign()


# f-divergences E_ref f(u), u = exp(x): the value under samples from pi is f(u)/u, the derivative
# of the divergence is f'(u) - f'(1).


def forward(log_ratio: Tensor) -> Tensor:
    root = (-log_ratio / 2).exp()
    return finite(-log_ratio * root * root)


def js(log_ratio: Tensor) -> Tensor:
    # With t = (u - 1) / (u + 1): ((1 + t) log(1 + t) + (1 - t) log(1 - t)) / (1 + t).
    t = (log_ratio / 2).tanh()
    near = (t * log_ratio - (log_ratio / 2).sinh().square().log1p()) / (1 + t)
    half_sum = log_ratio.clamp(min=0) + _log_mean(log_ratio)  # log((u + 1) / 2)
    root = (-log_ratio / 2).exp()  # its square may be beyond the dtype where the value is not
    far = js_derivative(log_ratio) - half_sum * root * root
    return finite(near.where(log_ratio.abs() < 2, far))


def js_derivative(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=0) - _log_mean(log_ratio)


def _log_mean(log_ratio: Tensor) -> Tensor:
    """``log((1 + exp(-|x|)) / 2)``, with all its digits near the reference."""
    return log_ratio.abs().neg().expm1().div(2).log1p()


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
    return finite(scaled_expm1(-log_ratio, 0.5).abs())


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
    that ``later`` tokens have, or ``of_answer``, a coefficient by the log-ratio of the answer so
    far; an estimator with neither has no exact form there. ``answer_target``: of a divergence that
    between whole answers is not the sum along them. ``has_limit``: whether the value is finite
    where the reference rules a token out, x = inf.
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
    answer_target: str = ""
    # The value again, where the derivative has done its work already.
    value_of_derivative: Callable[[Tensor, Tensor], Tensor] | None = None
    has_limit: bool = False

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
    has_limit: bool = True,
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
            target=f"grad of the expected {divergence}, less E[grad value]: of no divergence",
            gradient_bias="wrong: the value in place of the derivative",
            off_policy=_REWARD_OFF_POLICY,
        ),
        source=source,
        later=None if of_answer else value,
        of_answer=of_answer,
        has_limit=has_limit,
        sequence_target=sequence_target
        or f"grad of the expected {divergence} of all tokens, prefixes included",
        answer_target="" if of_answer else f"grad {divergence} between whole answers",
    )


@functools.lru_cache
def alpha_divergence(alpha: float) -> Estimator:
    """The row of ``alpha`` for one alpha, D_a: f = (t^a - a t - (1 - a)) / (a (a - 1)).

    Half of chi2 at 2, twice Hellinger at 1/2; the forward KL towards 0, the reverse towards 1.
    """

    below = alpha - 1
    # Beyond it an exponent may saturate, and there the other form does not cancel.
    close = min(2.0, 40 / max(abs(alpha), abs(below)))

    def value(log_ratio: Tensor) -> Tensor:
        near = log_ratio.abs() < close  # where each form's exponentials cancel to the first order
        if alpha < 0.5:
            # exp(-x) (expm1(a x) / a - expm1(x)) / (a - 1); constant far above the reference.
            lr = log_ratio.clamp(max=largest_exponent(log_ratio) - 1)
            inner = (k3(-alpha * lr) / alpha - k3(-lr)).where(
                near, (alpha * lr).expm1() / alpha - lr.expm1()
            )
            root = (-lr / 2).exp()
            return finite(root * (inner / below) * root)
        # Far below the reference both exponents could be inf, and their difference no number.
        lr = log_ratio.clamp(min=-1.5 * largest_exponent(log_ratio))
        powers = (k3(-below * lr) / below + k3(lr)) / alpha
        far = scaled_expm1(below * lr, 1 / (alpha * below)) + scaled_expm1(-lr, 1 / alpha)
        return finite(powers.where(near, far))

    def derivative(log_ratio: Tensor) -> Tensor:
        return finite(scaled_expm1(below * log_ratio, 1 / below))

    return _divergence(
        "alpha",
        "D_a(pi, ref)",
        "(u^(a-1) - a - (1-a)/u) / (a(a-1))",
        value,
        "(u^(a-1) - 1) / (a-1)",
        derivative,
        source="alpha divergence, Amari 1985",
        has_limit=alpha < 1,
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
                gradient_bias="wrong: almost zero near the reference, of the wrong sign below it",
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
                gradient_bias="biased for KL(pi||ref), by -k3: right to first order near the "
                "reference. Above it c is at most 1, below it c explodes",
                off_policy="the same at the prefixes of old, exact below the cap",
            ),
            in_reward=Role(
                coefficient=k3,
                formula="exp(-x) - 1 + x",
                target="FULL of the reverse minus LOC of the forward KL",
                gradient_bias="wrong: almost zero near the reference, of the wrong sign below it",
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
                gradient_bias="wrong: of the wrong sign below the reference",
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
            of_answer=k3_derivative,  # 1 - prod_{i<=t} exp(-lr_i)
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
            has_limit=False,
        ),
        _divergence(
            "chi2",
            "chi2(pi, ref)",
            "(u-1)^2 / u",
            chi2,
            "2 (u - 1)",
            chi2_derivative,
            source="arXiv 2403.03185",
            has_limit=False,
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
