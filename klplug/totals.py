"""Sums over a (B, T) tensor for metrics: finite, in float64, and without a copy of it."""

from __future__ import annotations

import torch
from torch import Tensor

from klplug.estimators import finite

SQUARABLE = 1e15
"""Where a number is held whose squares are added up: finite in float32, and all there is anyway."""


def total(x: Tensor) -> Tensor:
    """The sum, 0-d, finite where two saturated exponents add up to inf."""
    # Answers in their own dtype: a sum in float64 would first make a copy of that size.
    return finite(x.sum(-1)).sum(dtype=torch.float64)


def count(x: Tensor) -> Tensor:
    """How many entries of a bool tensor are True, 0-d."""
    return x.count_nonzero().double()


def squarable(x: Tensor) -> Tensor:
    return x.clamp(-SQUARABLE, SQUARABLE)
