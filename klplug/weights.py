"""The off-policy weight w: how much each sampled token counts for the current policy.

Always detached: a weight corrects whose expectation is taken, it is not part of what is
differentiated (a differentiable ratio times k2 is another, wrong gradient).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from klplug.answers import Answers
from klplug.numerics import masked, masked_, saturating_exp


@dataclass(frozen=True)
class ImportanceWeight:
    """Weights of shape (B, T), zero where masked.

    Attributes:
        log_weight: their logarithms before any bound, 0 where masked.
        mask: (B, T) bool.
        cap: the bound.
        dropped: (B, T) bool, where a clip made the weight 0.
    """

    weight: Tensor
    log_weight: Tensor
    mask: Tensor
    cap: float = math.inf
    dropped: Tensor | None = None

    def times_exp(self, exponent: Tensor) -> Tensor:
        """``w exp(exponent)``, where w alone may underflow and the exponential overflow."""
        # No weight that is above 1 underflows, and no cap that drops is below 1.
        kept = self.mask & ((self.weight > 0) | (self.log_weight < 0))
        log_weight = self.log_weight.clamp(max=math.log(self.cap))
        return masked_(saturating_exp(log_weight + exponent), kept)

    def capped(self) -> Tensor | None:
        """(B, T) bool, where the bound or the clip acted; ``None`` where there is neither."""
        if self.dropped is not None:
            return self.dropped
        if math.isinf(self.cap):
            return None
        met = self.log_weight > math.log(self.cap)
        return met if self.cap >= 1 else met & self.mask


def importance_weight(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    level: str,
    cap: float,
    mode: str,
    answers: Answers | None = None,
    own: bool = True,
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
        answers: of packed rows, whose products end where an answer does.
        own: whether the product of a prefix goes up to the token itself, or to the one before it.
    """
    answers = Answers() if answers is None else answers
    log_weight = masked(log_ratio, mask)
    if level == "prefix":
        so_far = answers.so_far(log_weight)
        log_weight = masked_(so_far if own else answers.before(so_far), mask)
    elif level == "sequence":
        log_weight = masked(answers.whole(log_weight), mask)
    weight = saturating_exp(log_weight, at_most=cap if mode == "truncate" else math.inf)
    kept = mask if mode == "truncate" else mask & ~(weight > cap)
    return ImportanceWeight(masked_(weight, kept), log_weight, mask, cap)


def clipped_weight(
    ratio: ImportanceWeight, slope: Tensor, clip_range: tuple[float, float]
) -> ImportanceWeight:
    """PPO's: the token ratio, and 0 where its clip drops the gradient.

    ``max(rho * slope, clip(rho) * slope)`` has no gradient where the ratio is out of its range on
    the side that descending ``slope`` moves it to.

    Args:
        ratio: token-level, uncapped.
        slope: (B, T), what multiplies the ratio in the loss; zero where masked.
        clip_range: (low, high): the ratio is held in [1 - low, 1 + high].
    """
    low, high = clip_range
    rho = ratio.weight
    dropped = ((slope > 0) & (rho < 1 - low)) | ((slope < 0) & (rho > 1 + high))
    dropped = dropped & ratio.mask
    return ImportanceWeight(
        rho.masked_fill(dropped, 0.0), ratio.log_weight, ratio.mask, dropped=dropped
    )
