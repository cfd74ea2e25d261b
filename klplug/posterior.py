"""``reference=posterior``: the best policy there is for a reward, as what a divergence is taken to.

``p(y) = ref(y) exp(r(y)/beta) / Z`` over the whole answers to a prompt is where
``E[r] - beta KL(pi||ref)`` is highest, and ``beta KL(pi||p)`` is minus that, but for a constant. So
the reward acts through the divergence, with ``beta = kl_coef`` in both places and no policy loss
beside it. Another divergence has the same optimum, and another way there.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from klplug.baselines import group_numbers
from klplug.numerics import masked, number_of
from klplug.samples import Samples


def posterior_log_probs(samples: Samples, beta: float) -> Tensor:
    """The log-probs of ``ref exp(r/beta) / Z``, for ``kl_term``: (B, T), 0 where masked.

    An answer's sum up to its own, ``sum_t log ref + r/beta - log Z``; what is not ref's has no
    place in it, and lies evenly over its tokens. For the start of a step, of all its answers.

    Z of a prompt is estimated from the *other* answers to it, by importance weights: the mean of
    ``exp(r/beta) ref/old``, which is unbiased; its logarithm is too low on average. As it does not
    know the answer that it is used for, it is a baseline to ``k2`` and a factor to what has a power
    of u. So the expected gradient is exact of k2 and chi2. Of ``forward``, ``hellinger`` and
    ``alpha`` it has a factor of each prompt, and of the others a bias; both fall with the number of
    answers. An answer alone has no estimate: its own ratio is 1, so that nothing moves it at first.

    Args:
        samples: with ``log_probs``, ``ref_log_probs``, ``rewards`` and ``group_ids``.
        beta: the coefficient of the KL, above 0, in units of the reward per nat.

    Raises:
        ValueError: ``samples`` lacks one of them, one has another shape, or beta is not positive.

    Source: f-DPG, arXiv 2302.08215.
    """
    for name in ("log_probs", "ref_log_probs", "rewards", "group_ids"):
        if getattr(samples, name) is None:
            raise ValueError(f"reference=posterior needs {name}, which is missing")
        samples.check(name)
    number = number_of(beta)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"reference=posterior with beta={beta!r}, which must be a positive number")
    log_probs, ref_log_probs, rewards = samples.log_probs, samples.ref_log_probs, samples.rewards
    assert log_probs is not None and ref_log_probs is not None and rewards is not None
    assert samples.group_ids is not None
    mask = samples.mask
    toward_ref = ref_log_probs.double() - log_probs.double()  # halves would lose digits first
    # A token that is no number leaves the KL; one that ref rules out has a weight of 0.
    numbers = mask & (toward_ref < math.inf)
    toward_ref = masked(toward_ref, numbers).sum(-1)
    tilt = rewards.double() / number
    groups = group_numbers(samples.group_ids, toward_ref).tolist()
    log_weights = tilt + toward_ref
    # An answer whose reward is no number leaves the KL, and the others' Z.
    known = numbers.any(-1) & (log_weights < math.inf)
    log_z = _of_others(log_weights, groups, known.tolist())
    share = ((tilt - log_z) / numbers.sum(-1).clamp(min=1)).unsqueeze(-1)
    dtype = torch.promote_types(ref_log_probs.dtype, torch.float32)
    posterior = (ref_log_probs + share).masked_fill(~numbers, math.nan)
    return masked(posterior.to(dtype), mask)


def _of_others(log_weights: Tensor, groups: list[int], present: list[bool]) -> Tensor:
    """Of each answer, the log of the mean weight of its group's other answers."""
    log_z = log_weights.clone()
    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        if present[row]:
            members[group].append(row)
    for rows in members.values():
        others = len(rows) - 1
        if others:
            own = torch.eye(len(rows), dtype=torch.bool, device=log_weights.device)
            whole = log_weights[rows].expand(len(rows), -1).masked_fill(own, -math.inf)
            log_z[rows] = whole.logsumexp(-1) - math.log(others)
    return log_z
