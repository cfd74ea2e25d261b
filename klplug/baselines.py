"""Baselines on the KL return: what an answer's KL is compared with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from klplug.numerics import finite


def others_mean(
    returns: Tensor,
    group_ids: Sequence[Hashable] | Tensor | None,
    present: Tensor | None = None,
) -> Tensor:
    """For each answer and position, the mean return of the other answers of its group.

    An unbiased baseline; the mean that includes the answer itself would shrink the gradient by
    ``1 - 1/N``. An answer that has ended has a return of 0 and counts: leaving it out would bias.
    An answer alone has nothing to be compared with, and a baseline of 0.

    Args:
        returns: (B, T), at each position the sum over this and later ones.
        group_ids: B of them, answers to one prompt alike; ``None`` for one group of all. A tensor
            is not looked at, so it may be on the device.
        present: (B,) bool, rows that are answers: one without tokens, as hosts pad their batches,
            is none. ``None`` for all.

    Raises:
        ValueError: not one id per answer.
    """
    group = group_numbers(group_ids, returns)
    counted = returns.new_ones(len(returns)) if present is None else present.to(returns.dtype)
    totals = torch.zeros_like(returns).index_add_(0, group, returns)[group]
    counts = torch.zeros_like(counted).index_add_(0, group, counted)[group]
    others = (counts - counted).clamp(min=1).unsqueeze(-1)
    # Two saturated exponents would add up to inf, and inf less inf is no number.
    alone = (counts - counted < 1).unsqueeze(-1)
    return finite((finite(totals) - returns) / others).masked_fill(alone, 0.0)


def group_numbers(group_ids: Sequence[Hashable] | Tensor | None, like: Tensor) -> Tensor:
    """(B,), each below B and the same for the rows of one group, on the device of ``like``."""
    size, device = len(like), like.device
    if group_ids is None:
        return torch.zeros(size, dtype=torch.long, device=device)
    if isinstance(group_ids, Tensor):
        if group_ids.dim() != 1:
            raise ValueError(f"group_ids has shape {tuple(group_ids.shape)}, and must have (B,)")
        alike = group_ids.device == device and not group_ids.is_floating_point()  # nan is not nan
        if len(group_ids) == size and size and alike:
            # The first row with the same id.
            return (group_ids[:, None] == group_ids).to(torch.uint8).argmax(-1)
        group_ids = group_ids.tolist()
    try:
        # Tensors of one number are hashed by who they are, and not by what.
        ids = [name.tolist() if isinstance(name, Tensor) else name for name in group_ids]
        hash(tuple(ids))
    except TypeError:
        raise TypeError(
            f"group_ids must be B hashable names or numbers, got {group_ids!r}"
        ) from None
    if len(ids) != size:
        raise ValueError(f"group_ids has {len(ids)} entries for {size} answers")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(ids))}
    # Filled where it is, run by run: a list that is copied to a device is waited for.
    runs = [(number, len(list(run))) for number, run in groupby(numbers[name] for name in ids)]
    if not runs:
        return torch.zeros(0, dtype=torch.long, device=device)
    return torch.cat([torch.full((n,), k, dtype=torch.long, device=device) for k, n in runs])
