"""Baselines on the KL return: what an answer's KL is compared with."""

from __future__ import annotations

from torch import Tensor


def leave_one_out_mean(x: Tensor) -> Tensor:
    """For each entry of a group, the mean of the others: an unbiased baseline.

    (The mean that includes the entry itself shrinks the gradient by ``1 - 1/N``.)

    Args:
        x: (groups, N), one number per answer, N > 1.

    Raises:
        ValueError: groups of one have no others.
    """
    size = x.shape[-1]
    if size < 2:
        raise ValueError(f"a group baseline needs groups of at least 2 answers, got {size}")
    return (x.sum(-1, keepdim=True) - x) / (size - 1)
