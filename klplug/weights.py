"""The off-policy weight w: how much each sampled token counts for the current policy.

Always detached: a weight corrects whose expectation is taken, it is not part of what is
differentiated (a differentiable ratio times k2 is another, wrong gradient).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from klplug.numerics import flags, largest_exponent, masked, masked_, saturating_exp


@dataclass(frozen=True)
class ImportanceWeight:
    """Weights of shape (B, T), zero where masked, and where their bound or the dtype's acted.

    ``capped`` and ``overflowed`` are for metrics, and computed when called: 1 where it did, and
    anything where masked.
    """

    weight: Tensor
    capped: Callable[[], Tensor]
    log_weight: Tensor

    def overflowed(self) -> Tensor:
        return flags(torch.gt, self.log_weight, largest_exponent(self.log_weight))


def importance_weight(
    log_ratio: Tensor, mask: Tensor, *, level: str, cap: float, mode: str, own: bool = True
) -> ImportanceWeight:
    """``pi_theta / pi_behaviour`` of each token, prefix or whole answer, bounded above by ``cap``.

    Args:
        log_ratio: (B, T), log pi_theta less that of the policy that is taken to have sampled,
            detached, nats; anything where masked: masked tokens enter no product.
        mask: (B, T) bool.
        level: ``token`` (this token), ``prefix`` (product up to and including it) or ``sequence``
            (product over the answer; never the geometric mean, which weighs nothing).
        cap: ``truncate`` holds weights at it, ``mask`` drops those above; ``inf`` for no bound.
        mode: ``truncate`` or ``mask``.
        own: whether the product of a prefix goes up to the token itself, or to the one before it.
    """
    log_weight = log_ratio
    if level == "prefix":
        log_weight = masked(log_ratio, mask).cumsum(-1)
        log_weight = log_weight if own else torch.nn.functional.pad(log_weight[:, :-1], (1, 0))
    elif level == "sequence":
        log_weight = masked(log_ratio, mask).sum(-1, keepdim=True).expand_as(mask)
    weight = saturating_exp(log_weight, at_most=cap if mode == "truncate" else math.inf)
    kept = mask if mode == "truncate" else mask & ~(weight > cap)
    return ImportanceWeight(
        weight=masked_(weight, kept),
        capped=lambda: flags(torch.gt, log_weight, math.log(cap)),
        log_weight=log_weight,
    )


def clipped_weight(
    ratio: ImportanceWeight, slope: Tensor, clip_range: tuple[float, float]
) -> ImportanceWeight:
    """PPO's: the token ratio, and 0 where its clip drops the gradient.

    ``max(rho * slope, clip(rho) * slope)`` has no gradient where the ratio is out of its range on
    the side that descending ``slope`` moves it to.

    Args:
        ratio: token-level, uncapped.
        slope: (B, T), what multiplies the ratio in the loss.
        clip_range: (low, high): the ratio is held in [1 - low, 1 + high].
    """
    low, high = clip_range
    rho = ratio.weight
    dropped = ((slope > 0) & (rho < 1 - low)) | ((slope < 0) & (rho > 1 + high))
    return ImportanceWeight(
        rho.masked_fill(dropped, 0.0), lambda: dropped.to(rho.dtype), ratio.log_weight
    )
