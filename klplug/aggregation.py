"""From per-token terms to one number, for training loops that have no host to do it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from klplug.numerics import number_of

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum")


def aggregate(
    x: Tensor,
    response_mask: Tensor,
    mode: str = "token-mean",
    *,
    count: float | Tensor | None = None,
    divisor: float | None = None,
) -> Tensor:
    """A 0-d mean of ``x`` over its counted tokens or answers, in float32 at least; 0 where none is
    counted.

    Only token sums over a number that does not depend on the sampled lengths
    (``seq-mean-token-sum``, and ``token-sum`` with its constant divisor) keep the gradients that
    ``kl_types()`` names exactly: ``token-mean`` divides by a random length (a bias of order
    1/batch), ``seq-mean-token-mean`` weighs every token by the inverse of its answer's length. A
    host knows its global batch and aggregates itself: never aggregate twice.

    Args:
        x: (B, T), nats per token; may hold anything where masked.
        response_mask: (B, T), nonzero where a token counts.
        mode: ``token-mean``; ``seq-mean-token-sum`` or ``seq-mean-token-mean``, a mean over the
            answers with at least one counted token; or ``token-sum``.
        count: of the whole batch that this is a micro-batch of, its counted tokens
            (``token-mean``) or its answers (``seq-...``): the results then *add up* to the whole
            batch's. ``None`` where this is the whole batch.
        divisor: of ``token-sum``, a constant such as the number of answers times the longest
            length; the results of micro-batches add up.

    Raises:
        ValueError: an unknown mode, shapes that differ, or a count or divisor that is not positive,
            missing or not of that mode.
        TypeError: ``x`` or the mask is no tensor, or a count or divisor no number.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(
            f"aggregation mode {mode!r} is unknown; allowed: {', '.join(AGGREGATIONS)}"
        )
    if (divisor is None) == (mode == "token-sum"):
        raise ValueError(
            f"aggregation mode {mode!r} with divisor={divisor!r}: 'token-sum' needs one, a "
            "constant, and no other mode takes one"
        )
    if count is not None and mode == "token-sum":
        raise ValueError("aggregation mode 'token-sum' takes no count: its divisor is all")
    for name, given in (("count", count), ("divisor", divisor)):
        # A tensor, which may be on a device, is not looked at.
        if given is None or isinstance(given, Tensor):
            continue
        number = number_of(given)
        if number is None:
            raise TypeError(f"{name} must be a positive number, got {given!r}")
        if not 0 < number < math.inf:
            raise ValueError(f"{name}={given!r} must be a positive number")
    for name, tensor in (("x", x), ("response_mask", response_mask)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if x.shape != response_mask.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, response_mask has {tuple(response_mask.shape)}"
        )
    mask = response_mask != 0
    # A sum of many would lose digits in bfloat16, and the range of float16.
    x = torch.where(mask, x.to(torch.promote_types(x.dtype, torch.float32)), 0.0)
    if isinstance(count, Tensor):
        count = count + (count == 0)  # a whole batch without tokens: 0, as without a count
    if divisor is not None:
        return x.sum() / divisor
    lengths = mask.sum(-1)
    if mode == "token-mean":
        return x.sum() / (lengths.sum().clamp(min=1) if count is None else count)
    per_answer = x.sum(-1)
    if mode == "seq-mean-token-mean":
        per_answer = per_answer / lengths.clamp(min=1)
    return per_answer.sum() / ((lengths > 0).sum().clamp(min=1) if count is None else count)
