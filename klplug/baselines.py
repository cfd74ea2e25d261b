"""Baselines on the KL return: what an answer's KL is compared with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from klplug.numerics import finite


def others_mean(returns: Tensor, group_ids: Sequence[Hashable] | Tensor | None) -> Tensor:
    """For each answer and position, the mean return of the other answers of its group.

    An unbiased baseline; the mean that includes the answer itself would shrink the gradient by
    ``1 - 1/N``. An answer that has ended has a return of 0 and counts: leaving it out would bias.

    Args:
        returns: (B, T), at each position the sum over this and later ones.
        group_ids: B of them, answers to one prompt alike; ``None`` for one group of all. A tensor
            on a device is waited for.

    Raises:
        ValueError: not one id per answer, or an answer that is alone in its group.
    """
    size = returns.shape[0]
    if isinstance(group_ids, Tensor) and group_ids.dim() != 1:
        raise ValueError(f"group_ids has shape {tuple(group_ids.shape)}, and must have (B,)")
    if group_ids is None:
        ids: list[Hashable] = [0] * size
    else:
        ids = group_ids.tolist() if isinstance(group_ids, Tensor) else list(group_ids)
    if len(ids) != size:
        raise ValueError(f"group_ids has {len(ids)} entries for {size} answers")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(ids))}
    counts = [0] * len(numbers)
    for name in ids:
        counts[numbers[name]] += 1
    for name, number in numbers.items():
        if counts[number] < 2:
            of = "the batch" if group_ids is None else f"group {name!r}"
            raise ValueError(
                f"a baseline needs at least 2 answers to compare, and {of} has one. "
                "Sample more answers to each prompt, or use baseline=none"
            )
    index = torch.tensor([numbers[name] for name in ids], dtype=torch.long, device=returns.device)
    others = returns.new_tensor([counts[numbers[name]] - 1 for name in ids]).unsqueeze(-1)
    totals = returns.new_zeros(len(numbers), returns.shape[1]).index_add_(0, index, returns)
    # Two saturated exponents would add up to inf, and inf less inf is no number.
    return finite((finite(totals)[index] - returns) / others)
