"""The divergences over a vocabulary, as products of tensors that neither overflow nor cancel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from klplug.numerics import has_a_size, number_of

Density = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """``E_ref f(u)``, ``u = p/q``, as a sum over the vocabulary of products that can't overflow.

    Both are functions of ``log p``, ``log u`` and ``p``. With f normalised to f(1) = f'(1) = 0,
    ``value`` is ``q f(u)``: no term is negative, and a normaliser that is off by one ulp enters
    in second order only. ``slope`` is ``p (f'(u) - f'(1))``: the registry's coefficient, times p.
    """

    value: Density
    slope: Density


def difference(x: Tensor, y: Tensor, log_ratio: Tensor) -> Tensor:
    """``x - y`` with all its digits where they are close; ``log_ratio`` is ``log(x/y)``."""
    return torch.tanh(log_ratio / 2).mul_(x + y)


def _less_reference(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    """``p - q``."""
    return difference(p, (log_p - log_ratio).exp_(), log_ratio)


def _reverse_slope(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return p * log_ratio


def _reverse(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return _less_reference(log_p, log_ratio, p).neg_().addcmul_(p, log_ratio)


def _forward(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    q = (log_p - log_ratio).exp_()
    largest = torch.finfo(log_ratio.dtype).max  # where q is 0, so is q times it
    return difference(p, q, log_ratio).addcmul_(q, log_ratio.clamp(max=largest), value=-1)


def _jeffreys(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return _less_reference(log_p, log_ratio, p).mul_(log_ratio)


def _jeffreys_slope(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return _less_reference(log_p, log_ratio, p).addcmul_(p, log_ratio)


def _tilt(log_ratio: Tensor) -> Tensor:
    """``(p - q)/(p + q)``, short of -1 and 1, whose logarithms would meet a factor 0."""
    largest = 1 - torch.finfo(log_ratio.dtype).eps
    return torch.tanh(log_ratio / 2).clamp_(-largest, largest)


def _js(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    tilt = _tilt(log_ratio)
    of_reference = torch.log1p(-tilt).mul_((log_p - log_ratio).exp_())
    return of_reference.addcmul_(p, torch.log1p(tilt))


def _js_slope(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return torch.log1p(_tilt(log_ratio)).mul_(p)


def _tv(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return _less_reference(log_p, log_ratio, p).abs_().div_(2)


def _tv_slope(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
    return torch.sign(log_ratio).mul_(p).div_(2)


@cache  # the same functions each time: a compiled kernel is of one
def alpha_divergence(alpha: float, factor: float = 1.0) -> Divergence:
    """``factor`` times D_a: f = (t^a - a t - (1 - a)) / (a (a - 1)); see the estimator ``alpha``.

    ``p^a q^(1-a)`` is held where a sum over any vocabulary is still finite; it is infinite where
    a > 1 and q is 0.
    """

    def between(log_p: Tensor, log_ratio: Tensor) -> Tensor:
        exponent = log_p + (alpha - 1) * log_ratio
        powers = exponent.clamp_(max=math.log(torch.finfo(log_p.dtype).max) - 40).exp_()
        return powers if alpha < 1 else powers.masked_fill_(log_ratio == math.inf, math.inf)

    def value(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
        # Less the one of p and q that it is near: their difference has the digits.
        q = (log_p - log_ratio).exp_()
        nearest, power = (q, alpha) if alpha <= 0.5 else (p, alpha - 1)
        powers = difference(between(log_p, log_ratio), nearest, power * log_ratio)
        powers -= power * difference(p, q, log_ratio)
        return powers.mul_(factor / (alpha * (alpha - 1)))

    def slope(log_p: Tensor, log_ratio: Tensor, p: Tensor) -> Tensor:
        powers = difference(between(log_p, log_ratio), p, (alpha - 1) * log_ratio)
        return powers.mul_(factor / (alpha - 1))

    return Divergence(value, slope)


# By the name of the estimator whose expectation over the vocabulary it is.
DIVERGENCES: dict[str, Divergence] = {
    "k2": Divergence(_reverse, _reverse_slope),
    "forward": Divergence(_forward, _less_reference),
    "js": Divergence(_js, _js_slope),
    "jeffreys": Divergence(_jeffreys, _jeffreys_slope),
    "chi2": alpha_divergence(2.0, factor=2.0),
    "hellinger": alpha_divergence(0.5, factor=0.5),
    "tv": Divergence(_tv, _tv_slope),
}

_INSTEAD = {
    "k1": "'k2' is its exact form: KL(pi||ref)",
    "k3": "'k2' is what its value estimates, 'forward' what its derivative does",
    "abs": "'tv' is half of it",
}


def named_divergence(name: str, alpha: float | None) -> Divergence:
    if name == "alpha":
        alpha = 0.5 if alpha is None else alpha
        number = number_of(alpha)
        if number is None or number == 1 or not has_a_size(number):
            raise ValueError(
                f"alpha={alpha!r} must be a finite number, of a size between 1e-15 and 1e15, and "
                "neither 0 nor 1"
            )
        return alpha_divergence(number)
    if alpha is not None:
        raise ValueError(f"alpha={alpha!r} is for divergence='alpha', not for {name!r}")
    if name not in list(DIVERGENCES):  # a list has names that can't be hashed, too
        known = ", ".join([*DIVERGENCES, "alpha"])
        instead = f". {_INSTEAD[name]}" if name in list(_INSTEAD) else ""
        raise ValueError(
            f"divergence {name!r} has no form over the vocabulary; known: {known}{instead}"
        )
    return DIVERGENCES[name]
