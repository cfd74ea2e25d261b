"""From per-token terms to one number, for training loops that have no host to do it."""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def aggregate(x: Tensor, response_mask: Tensor, mode: str = "token-mean") -> Tensor:
    """A 0-d mean of ``x`` over its counted tokens or answers; 0 where none is counted.

    Only token sums (``seq-mean-token-sum``) keep the gradients that ``kl_types()`` names exactly:
    ``token-mean`` divides by a random length (a bias of order 1/batch), ``seq-mean-token-mean``
    weighs every token by the inverse of its answer's length. A host knows its global batch and
    aggregates itself: never aggregate twice.

    Args:
        x: (B, T), nats per token; may hold anything where masked.
        response_mask: (B, T), nonzero where a token counts.
        mode: ``token-mean``, ``seq-mean-token-sum`` or ``seq-mean-token-mean``, the last two a
            mean over the answers with at least one counted token.

    Raises:
        ValueError: an unknown mode, or shapes that differ.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(
            f"aggregation mode {mode!r} is unknown; allowed: {', '.join(AGGREGATIONS)}"
        )
    if x.shape != response_mask.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, response_mask has {tuple(response_mask.shape)}"
        )
    mask = response_mask != 0
    x = torch.where(mask, x, 0.0)
    lengths = mask.sum(-1)
    if mode == "token-mean":
        return x.sum() / lengths.sum().clamp(min=1)
    per_answer = x.sum(-1)
    if mode == "seq-mean-token-mean":
        per_answer = per_answer / lengths.clamp(min=1)
    return per_answer.sum() / (lengths > 0).sum().clamp(min=1)
