"""Numbers held within their dtype, masks, and sums of (B, T) tensors.

All work is in float32 or float64. torch is not imported before there is a tensor: the registry of
estimators is read where there is no torch.
"""

from __future__ import annotations

import math
import sys
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = {4: (2 - 2**-23) * 2.0**127, 8: sys.float_info.max}
"""The largest finite number of float32 and of float64, by their size in bytes."""

LEAST, MOST = 2.0**-126, _LARGEST[4]
"""Between which float32 has a positive number with all its digits: an option of less would be 0."""

HUGE = 1e15
"""What no log-ratio reaches, and whose square is finite in float32."""


def number_of(value: Any) -> float | None:
    """``value`` as a float, of any library's scalars too; ``None`` where it is no number: True is
    none. An integer that no float reaches is inf."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value == abs(value) else -math.inf


def has_a_size(alpha: float) -> bool:
    """Whether an alpha divergence of it has a value: float32 has its products with log-ratios."""
    return 1 / HUGE <= abs(alpha) <= HUGE


def largest(x: Tensor) -> float:
    """The largest finite number of ``x``'s dtype."""
    return _LARGEST[x.element_size()]


def largest_exponent(x: Tensor) -> float:
    """Where ``exp`` reaches the largest finite number of ``x``'s dtype."""
    return math.log(largest(x))


def saturating_exp(x: Tensor, at_most: float = math.inf) -> Tensor:
    """``exp(x)``, held at the dtype's largest finite number where it would overflow.

    The only bound without a name in a kl_type; ``klplug/overflow_share`` counts where it acted.
    """
    return x.exp().clamp_(max=min(at_most, largest(x)))


def saturating_expm1(x: Tensor) -> Tensor:
    """``exp(x) - 1`` with all its digits near 0, held as ``saturating_exp`` is."""
    return x.expm1().clamp_(max=largest(x))


def scaled_expm1(x: Tensor, scale: float) -> Tensor:
    """``scale * (exp(x) - 1)``, inf only where that itself is beyond the dtype."""
    half = (x / 2).expm1()  # exp(x) - 1 = half (half + 2)
    return half * (half * scale + 2 * scale)


def finite(x: Tensor) -> Tensor:
    """``x`` held within its dtype: a product or sum in which an exponent saturated."""
    return x.clamp(-largest(x), largest(x))


def finite_(x: Tensor) -> Tensor:
    """``finite``, in place."""
    return x.clamp_(-largest(x), largest(x))


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where the bool ``mask`` is True, else 0, whatever ``x`` is there: nan and inf too."""
    # The bits times 0 or 1: torch.where takes three times as long on a CPU.
    return _bits(x).mul(mask).view(x.dtype)


def masked_(x: Tensor, mask: Tensor) -> Tensor:
    """``masked``, in place."""
    _bits(x).mul_(mask)
    return x


def _bits(x: Tensor) -> Tensor:
    import torch

    return x.view(torch.int32 if x.element_size() == 4 else torch.int64)
