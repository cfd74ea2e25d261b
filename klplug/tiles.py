"""The elementwise work on a tile of logits: tensors in, tensors out, so that a GPU can fuse it.

A tile is (n, v): n tokens, v of the vocabulary. Normalisers are (n, 1).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from klplug.divergences import Divergence


@dataclass(frozen=True)
class Scaling:
    """What a model does to its logits before the softmax."""

    temperature: float
    softcap: float | None

    def scaled_(self, logits: Tensor) -> Tensor:
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def back_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient towards the logits before scaling, given that towards them after it."""
        if self.softcap is not None:
            gradient -= gradient * (logits * (self.temperature / self.softcap)).square_()
        return gradient if self.temperature == 1 else gradient.div_(self.temperature)


class Normaliser(NamedTuple):
    """``log sum exp`` of each token's logits in two parts: a sum would lose digits."""

    maximum: Tensor
    log_sum: Tensor

    def of(self, rows: slice) -> Normaliser:
        return Normaliser(self.maximum[rows], self.log_sum[rows])

    def log_softmax(self, logits: Tensor) -> Tensor:
        return (logits - self.maximum).sub_(self.log_sum)

    def minus(self, other: Normaliser) -> Tensor:
        return (self.maximum - other.maximum) + (self.log_sum - other.log_sum)


class Kind(NamedTuple):
    """What the work is, beside the tensors.

    ``log_ratio(log_p, z, r, *beyond)`` is ``log pi - log ref``: ``z`` and ``r`` are the logits of
    policy and reference, ``beyond`` what else the reference knows.
    """

    divergence: Divergence
    scaling: Scaling
    log_ratio: Callable[..., Tensor]


def sum_of_exponentials(logits: Tensor, maximum: Tensor) -> Tensor:
    return (logits - maximum).exp_().sum(-1)


def expectations(
    kind: Kind,
    z: Tensor,
    r: Tensor,
    policy: Normaliser,
    beyond: Sequence[Tensor],
    sloped: bool,
) -> tuple[Tensor, ...]:
    """A tile's part of divergence, entropy and, where it is ``sloped``, mean slope; (n,) each."""
    log_p = policy.log_softmax(z)
    log_ratio, p = kind.log_ratio(log_p, z, r, *beyond), log_p.exp()
    value = kind.divergence.value(log_p, log_ratio, p).sum(-1)
    entropy = (p * log_p).sum(-1).neg_()
    if not sloped:
        return value, entropy
    return value, entropy, kind.divergence.slope(log_p, log_ratio, p).sum(-1)


def gradient_of_kl(
    kind: Kind,
    z: Tensor,
    r: Tensor,
    policy: Normaliser,
    beyond: Sequence[Tensor],
    mean_slope: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Towards the logits before scaling: ``slope - p mean_slope``."""
    log_p = policy.log_softmax(z)
    p = log_p.exp()
    slope = kind.divergence.slope(log_p, kind.log_ratio(log_p, z, r, *beyond), p)
    return kind.scaling.back_(slope.addcmul_(p, mean_slope, value=-1), z).to(dtype)


def gradient_of_all(
    kind: Kind,
    z: Tensor,
    r: Tensor | None,
    policy: Normaliser,
    beyond: Sequence[Tensor],
    weights: tuple[Tensor | None, Tensor, Tensor],
    sampled: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The same of all three results under their weights.

    Args:
        weights: (n, 1) each, of slope, of ``-p log p``, and of ``-p``; without the first the
            reference is not asked.
        sampled: the column of each token's target, and what is added there; (n, 1) each.
    """
    of_slope, of_entropy, of_p = weights
    log_p = policy.log_softmax(z)
    p = log_p.exp()
    slope = None
    if of_slope is not None:
        slope = kind.divergence.slope(log_p, kind.log_ratio(log_p, z, r, *beyond), p)
    gradient = p.mul_(log_p.mul_(-of_entropy).sub_(of_p))
    if slope is not None and of_slope is not None:
        gradient.addcmul_(slope, of_slope)
    gradient = _added(gradient, *sampled)
    return kind.scaling.back_(gradient, z).to(dtype)


def _added(tile: Tensor, column: Tensor, number: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a scatter would be a pass of its own
        columns = torch.arange(tile.shape[-1], dtype=torch.int32, device=tile.device)
        return torch.where(columns == column, tile + number, tile)
    return tile.scatter_add_(-1, column, number)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel of it, which reads the logits once: on a GPU memory is the limit.

    Where torch can't make it, for want of a C compiler say, the function itself is run.
    """
    from torch._dynamo.exc import TorchDynamoException

    kernel = torch.compile(function, dynamic=True)

    def run(*given: Any) -> Any:
        nonlocal kernel
        try:
            return kernel(*given)
        except TorchDynamoException as error:
            kernel = function
            warnings.warn(
                "the exact KL runs without compiled kernels, some four times slower: "
                + " ".join(str(error).split())[:300],
                stacklevel=2,
            )
            return function(*given)

    return run
