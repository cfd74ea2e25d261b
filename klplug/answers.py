"""Sums along the answers of a batch: a row is one answer, or several that are packed into it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from klplug.numerics import masked


@dataclass(frozen=True)
class Answers:
    """Which answer of its row each token belongs to.

    Attributes:
        number: (B, T), from 0 in each row and one more at each next answer; ``None`` where a row
            is one answer.
    """

    number: Tensor | None = None

    @staticmethod
    def of(segment_ids: Tensor | None, mask: Tensor) -> Answers:
        """The answers of rows in which tokens of one answer have one id, side by side.

        Args:
            segment_ids: (B, T), anything where masked; ``None`` for one answer a row.
            mask: (B, T) bool.
        """
        if segment_ids is None:
            return Answers()
        # What is masked inside an answer, a tool's output, belongs to the answer before it.
        position = torch.arange(mask.shape[-1], device=mask.device).expand_as(mask)
        last = position.where(mask, 0).cummax(-1).values
        ids = segment_ids.gather(-1, last)
        begins = pad(ids[:, 1:] != ids[:, :-1], (1, 0))
        return Answers(begins.cumsum(-1))

    def to_go(self, x: Tensor) -> Tensor:
        """``sum_{s>=t} x_s`` over the rest of the answer, (B, T)."""
        number = self._number_for_sums(x)
        if number is None:
            return x.flip(-1).cumsum(-1).flip(-1)
        return _sums_to_go(x, number)

    def so_far(self, x: Tensor) -> Tensor:
        """``sum_{s<=t} x_s`` over the answer so far, (B, T)."""
        number = self._number_for_sums(x)
        if number is None:
            return x.cumsum(-1)
        return _sums_to_go(x.flip(-1), number.flip(-1)).flip(-1)

    def _number_for_sums(self, x: Tensor) -> Tensor | None:
        # A cumsum on a GPU depends on the order of its threads, and torch then refuses it.
        if self.number is None and torch.are_deterministic_algorithms_enabled():
            return torch.zeros_like(x, dtype=torch.long)
        return self.number

    def before(self, x: Tensor) -> Tensor:
        """``x`` at the token before, 0 at the first of an answer, (B, T)."""
        shifted = pad(x, (1, 0))[:, :-1]
        if self.number is None:
            return shifted
        return masked(shifted, pad(self.number[:, 1:] == self.number[:, :-1], (1, 0)))

    def after(self, x: Tensor) -> Tensor:
        """``x`` at the token after, 0 at the last of an answer, (B, T)."""
        shifted = pad(x, (0, 1))[:, 1:]
        if self.number is None:
            return shifted
        return masked(shifted, pad(self.number[:, 1:] == self.number[:, :-1], (0, 1)))

    def whole(self, x: Tensor) -> Tensor:
        """The sum over the whole answer, at each of its tokens, (B, T)."""
        if self.number is None:
            return x.sum(-1, keepdim=True).expand_as(x)
        return self.so_far(x) + self.to_go(x) - x

    def same(self, other: Tensor) -> Tensor:
        """Whether the tokens at the positions ``other``, (B, T), belong to the same answers."""
        if self.number is None:
            return torch.ones_like(other, dtype=torch.bool)
        return self.number.gather(-1, other) == self.number


def _sums_to_go(x: Tensor, number: Tensor) -> Tensor:
    """By doubling (Hillis and Steele 1986): no sum is taken that reaches over an end."""
    step = 1
    while step < x.shape[-1]:
        same = number[:, step:] == number[:, :-step]
        x = x + pad(masked(x[:, step:], same), (0, step))
        step *= 2
    return x
