"""The off-policy weight w: how much each sampled token counts for the current policy.

Always detached: a weight corrects whose expectation is taken, it is not part of what is
differentiated (a differentiable ratio times k2 is another, wrong gradient).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from klplug.estimators import overflows, saturating_exp


@dataclass(frozen=True)
class ImportanceWeight:
    """Weights of shape (B, T), zero where masked, and where their bound or the dtype's acted."""

    weight: Tensor
    capped: Tensor
    overflowed: Tensor


def importance_weight(
    log_probs: Tensor,
    behaviour_log_probs: Tensor,
    mask: Tensor,
    *,
    level: str,
    cap: float,
    mode: str,
) -> ImportanceWeight:
    """``pi_theta / pi_behaviour`` of each token, prefix or whole answer, bounded above by ``cap``.

    Args:
        log_probs: (B, T), current policy, nats, zero where masked; gradients are not followed.
        behaviour_log_probs: (B, T), the policy that is taken to have sampled, zero where masked.
        mask: (B, T) bool. Masked tokens enter no product.
        level: ``token`` (this token), ``prefix`` (product up to and including it) or ``sequence``
            (product over the answer; never the geometric mean, which weighs nothing).
        cap: ``truncate`` holds weights at it, ``mask`` drops those above; ``inf`` for no bound.
        mode: ``truncate`` or ``mask``.
    """
    log_weight = (log_probs - behaviour_log_probs).detach()
    if level == "prefix":
        log_weight = log_weight.cumsum(-1)
    elif level == "sequence":
        log_weight = log_weight.sum(-1, keepdim=True).expand_as(mask)
    weight = saturating_exp(log_weight)
    capped = (weight > cap) & mask
    weight = weight.clamp(max=cap) if mode == "truncate" else weight.masked_fill(capped, 0.0)
    return ImportanceWeight(
        weight=torch.where(mask, weight, 0.0),
        capped=capped,
        overflowed=overflows(log_weight) & mask,
    )
