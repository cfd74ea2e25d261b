"""What a term does at each token: its coefficient c, its weight w, and where they meet.

====================================  =============================================
one term                              its gradient: what multiplies grad log pi(y_t)
====================================  =============================================
own token (LOC)                       ``w_t c_t``
whole answer (FULL)                   ``w_t c_t + sum_{s>t} w_s v_s - w_t b_t``
between whole answers                 the same, with v = 0
in the reward (FULL)                  ``sum_{s>=t} c_s - b_t``
under a head                          ``rho_t c_t``, or 0 where PPO's clip drops it
over the vocabulary (LOC)             ``Q_t grad D_t``, by autograd
over the vocabulary (FULL)            the same, and ``sum_{s>t} Q_s D_s``
====================================  =============================================

c is the estimator's value in the reward and its derivative as a loss, v what a token adds to the
coefficients before it, b a baseline, D the expectation over the vocabulary and Q the weight of the
tokens before. All of them are detached but ``grad D_t``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from klplug.answers import Answers
from klplug.baselines import others_mean
from klplug.batch import Batch, policy_of, weight_name
from klplug.numerics import HUGE, finite, finite_, masked, masked_
from klplug.spec import TermSpec
from klplug.weights import ImportanceWeight, clipped_weight, importance_weight


@dataclass(frozen=True, eq=False)
class Estimate:
    """The estimate and its coefficients, (B, T) each, zero where masked.

    Attributes:
        mask: the tokens that are in the KL.
        numbers: those of them whose log-ratio, too, is a number.
        log_ratio: of those.
        reach: of all of ``mask``, an infinite one as the dtype's largest number.
        value: the estimate, nats.
        own: each token's own c.
        later: v, what it adds to the coefficients of the tokens before it, in its answer.
        sample_weight: of ``weight=``; ``None`` where there is none.
        scale: the factor times the sample weight, which c and v have; ``None`` where it is 1.
        unbounded: c before its bound, anything where masked; ``None`` where it has none.
        falling: y of a c that is ``1 - exp(-y)``, whose weight may fall as fast as it grows;
            ``None`` of others.
    """

    mask: Tensor
    numbers: Tensor
    log_ratio: Tensor
    reach: Tensor
    value: Tensor
    own: Tensor
    later: Tensor
    sample_weight: Tensor | None = None
    scale: float | Tensor | None = None
    unbounded: Tensor | None = None
    falling: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Acting:
    """What acts on each token, (B, T) each, zero where masked.

    Attributes:
        mask: the tokens that are in the KL.
        value: the estimate, nats.
        coefficient: c.
        gradient: made when it is asked for: a host that joins c to a reward never does.
        weight: w; ``None`` where it is 1.
        importance: what w was made of, as the metrics show it.
        pathwise: 0, with the gradient that goes through ``exact_kl``.
    """

    mask: Tensor
    value: Tensor
    coefficient: Tensor
    gradient: Callable[[], Tensor]
    weight: Tensor | None = None
    importance: ImportanceWeight | None = None
    pathwise: Tensor | None = None

    @property
    def weight_or_one(self) -> Tensor:
        return self.mask.to(self.value.dtype) if self.weight is None else self.weight


def acting(
    spec: TermSpec, batch: Batch, estimate: Estimate, inside: Tensor | None = None
) -> Acting:
    """What the term ``spec`` does, by where it acts, times its factor and its sample weight.

    The value has the factor alone: it is an estimate of a KL, whichever of its tokens are weighed.
    ``inside`` is of ``inside_the_policy_loss``.
    """
    alone = _acting(spec, batch, estimate, inside)
    if alone.pathwise is not None and estimate.scale is not None:
        alone = replace(alone, pathwise=estimate.scale * alone.pathwise)
    return alone if spec.factor == 1 else replace(alone, value=finite_(spec.factor * alone.value))


def _acting(spec: TermSpec, batch: Batch, estimate: Estimate, inside: Tensor | None) -> Acting:
    if spec.over_vocabulary:
        return _over_the_vocabulary(spec, batch, estimate)
    if spec.placement == "in_reward":
        return _in_the_reward(spec, batch, estimate)
    if spec.head in ("combined", "clipped"):
        return _under_a_head(spec, batch, estimate, inside)
    if spec.horizon != "token":
        return _whole_answer(spec, batch, estimate)
    return _own_token(spec, batch, estimate)


def sum_of(parts: list[Acting], batch: Batch) -> Acting:
    """The sum of several, with the weights in its coefficient; of none of them zero."""
    zero = torch.zeros_like(batch.log_probs)
    # Each held by itself: of two that saturate with other signs the sum would be no number.
    weighted = (finite(a.weight_or_one * a.coefficient) for a in parts)
    paths = [a.pathwise for a in parts if a.pathwise is not None]
    return Acting(
        batch.mask,
        value=finite(sum((a.value for a in parts), zero)),
        coefficient=finite(sum(weighted, zero)),
        gradient=lambda: finite(sum((a.gradient() for a in parts), zero)),
        pathwise=torch.stack(paths).sum(0) if paths else None,
    )


# ── The gradients, one by one ────────────────────────────────────────────────────────────────────


def _own_token(spec: TermSpec, batch: Batch, estimate: Estimate) -> Acting:
    """``w_t c_t``: prefixes held fixed (LOC)."""
    importance = _importance(spec, batch, estimate.mask)
    weight = None if importance is None else importance.weight
    gradient = estimate.own if importance is None else _weighed(estimate, importance)
    return Acting(estimate.mask, estimate.value, estimate.own, lambda: gradient, weight, importance)


def _whole_answer(spec: TermSpec, batch: Batch, estimate: Estimate) -> Acting:
    """``w_t c_t + sum_{s>t} w_s v_s - w_t b_t`` (FULL).

    v is c itself for k2. With a weight of the whole answer all w are one; with the prefixes' this
    is the per-decision form. The ``coefficient`` is that sum over ``w_t``, so that weight times
    coefficient is the gradient here too.
    """
    importance = _importance(spec, batch, estimate.mask)
    weight = None if importance is None else importance.weight
    gradient = returns(estimate, batch, importance)
    if spec.baseline != "none":
        compared = baseline(spec, batch, estimate, gradient)
        gradient = gradient - (compared if weight is None else weight * compared)
    gradient = masked_(finite_(gradient), estimate.mask)
    coefficient = gradient
    if weight is not None:
        weight, coefficient = _apart(gradient, weight)
    return Acting(estimate.mask, estimate.value, coefficient, lambda: gradient, weight, importance)


def _in_the_reward(spec: TermSpec, batch: Batch, estimate: Estimate) -> Acting:
    """``sum_{s>=t} c_s - b_t``: what a host credits to a token of the c after it (FULL)."""
    coefficient = estimate.own
    if spec.baseline != "none":
        compared = baseline(spec, batch, estimate, returns(estimate, batch))
        credited = _credited(compared, estimate.mask, batch.answers)
        coefficient = finite_(coefficient - credited)

    made: list[Tensor] = []

    def gradient() -> Tensor:
        if not made:
            made.append(masked_(finite_(batch.answers.to_go(coefficient)), estimate.mask))
        return made[0]

    return Acting(estimate.mask, estimate.value, coefficient, gradient)


def _under_a_head(
    spec: TermSpec, batch: Batch, estimate: Estimate, inside: Tensor | None
) -> Acting:
    """``rho_t c_t``, and 0 where PPO's clip drops it; over whole answers c_t is the sum to go."""
    ratio = _importance(spec, batch, estimate.mask)
    assert ratio is not None and batch.clip is not None
    slope = coefficient = _under_the_ratio(spec, batch, estimate)
    if spec.head == "combined":
        assert batch.given.kl_coef is not None
        together = coefficient if inside is None else inside
        slope = batch.given.kl_coef * together - batch.masked("advantages")
    importance = clipped_weight(ratio, slope, batch.clip)
    weight = importance.weight
    gradient = finite_(weight * coefficient)
    return Acting(estimate.mask, estimate.value, coefficient, lambda: gradient, weight, importance)


def inside_the_policy_loss(
    estimates: Sequence[tuple[TermSpec, Estimate]], batch: Batch
) -> Tensor | None:
    """The sum of c of all that is ``head=combined``, which is what its one clip looks at; ``None``
    where that is a term alone."""
    within = [(spec, estimate) for spec, estimate in estimates if spec.head == "combined"]
    if len(within) < 2:
        return None
    return finite_(torch.stack([_under_the_ratio(s, batch, e) for s, e in within]).sum(0))


def _under_the_ratio(spec: TermSpec, batch: Batch, estimate: Estimate) -> Tensor:
    if spec.horizon != "sequence":
        return estimate.own
    return masked_(returns(estimate, batch), estimate.mask)


def _over_the_vocabulary(spec: TermSpec, batch: Batch, estimate: Estimate) -> Acting:
    """``Q_t grad D_t`` (LOC), and over whole answers ``sum_{s>t} Q_s D_s`` too (FULL).

    The expectation over a token is in its D, so neither ``grad D_t`` nor a later token's ``D_s``
    needs that token's own ratio.
    """
    importance = _importance(spec, batch, estimate.mask)
    weight = before = None if importance is None else importance.weight
    gradient = coefficient = estimate.own
    if spec.horizon == "sequence":
        added = estimate.later if before is None else finite_(before * estimate.later)
        to_go = batch.answers.after(batch.answers.to_go(added))
        gradient = coefficient = masked_(finite_(to_go), estimate.mask)
        if before is not None:
            weight, coefficient = _apart(gradient, before)
    pathwise, exact_kl = None, batch.given.exact_kl
    assert exact_kl is not None
    if exact_kl.requires_grad and torch.is_grad_enabled():
        own = exact_kl.where(estimate.mask, 0.0)
        pathwise = (own - own.detach()) * (1.0 if before is None else before)
    return Acting(
        estimate.mask, estimate.value, coefficient, lambda: gradient, weight, importance, pathwise
    )


# ── The coefficient ──────────────────────────────────────────────────────────────────────────────


def estimate_of(spec: TermSpec, batch: Batch) -> Estimate:
    """Value, c and v of the term ``spec``; ``bound`` has acted on c, and after it factor and sample
    weight on c and v. The value is the estimate's own, for the metrics."""
    estimate = _estimate_of(spec, batch)
    scale: float | Tensor = spec.factor
    weight = None
    if spec.weight != "none":
        weight = masked(batch.others[weight_name(spec)].to(estimate.own), estimate.mask)
        scale = weight if scale == 1 else scale * weight
    elif scale == 1:
        return estimate
    own = finite_(scale * estimate.own)
    is_own = estimate.later is estimate.own
    later = own if is_own else finite_(scale * estimate.later)
    return replace(estimate, own=own, later=later, sample_weight=weight, scale=scale)


def _estimate_of(spec: TermSpec, batch: Batch) -> Estimate:
    if spec.over_vocabulary:
        return _expected(spec, batch)
    bounded = not math.isinf(spec.bound)
    limits = spec.definition.has_limit or bounded
    estimate = _with_limits(spec, batch) if limits else _of_numbers(spec, batch)
    if spec.placement == "as_loss" and spec.horizon == "sequence":
        return _over_answers(spec, batch, estimate)
    if spec.horizon == "answer":
        return _of_answers(spec, batch, estimate)
    return estimate


def _expected(spec: TermSpec, batch: Batch) -> Estimate:
    """D in place of an estimate; a sampled token has no c of its own."""
    log_ratio, mask = batch.compared(spec.reference)
    value = masked(batch.others["exact_kl"].to(log_ratio.dtype), mask)
    return Estimate(mask, mask, log_ratio, log_ratio, value, torch.zeros_like(value), value)


def _of_numbers(spec: TermSpec, batch: Batch) -> Estimate:
    row, coefficient = spec.definition, spec.definition.role(spec.placement).coefficient
    log_ratio, mask = batch.compared(spec.reference)
    own = coefficient(log_ratio)
    if coefficient is row.value:
        value = own
    elif row.value_of_derivative is not None:
        value = row.value_of_derivative(log_ratio, own)
    else:
        value = row.value(log_ratio)
    if spec.name == "k1_as_loss":
        own = masked_(own, mask)  # the one coefficient that is not 0 where x is
    return Estimate(mask, mask, log_ratio, log_ratio, value, own, own)


def _with_limits(spec: TermSpec, batch: Batch) -> Estimate:
    """With an infinite pi/ref as the largest number: the term stays where it is finite there."""
    row, coefficient = spec.definition, spec.definition.role(spec.placement).coefficient
    log_ratio = batch.log_ratio(spec.reference)
    numbers = batch.mask & (log_ratio.abs() < math.inf)
    of_policy = batch.mask & (batch.log_probs.abs() < math.inf) & (log_ratio > -math.inf)
    log_ratio = masked_(finite(log_ratio), of_policy)
    own, value = coefficient(log_ratio), row.value(log_ratio)
    unbounded = None
    if math.isinf(spec.bound):
        held = torch.maximum(own.abs(), value.abs())
    else:
        unbounded, own = own, own.clamp(-spec.bound, spec.bound)
        held = own.abs()
    mask = of_policy & (numbers | (held < HUGE))
    own = masked(own, mask)
    value = masked(value, mask & (numbers | (value.abs() < HUGE)))
    reach = masked(log_ratio, mask)
    log_ratio = masked(log_ratio, numbers)
    falling = reach if row.of_answer is not None and unbounded is None else None
    return Estimate(
        mask,
        numbers,
        log_ratio,
        reach,
        value,
        own,
        own,
        unbounded=unbounded,
        falling=falling,
    )


def _over_answers(spec: TermSpec, batch: Batch, estimate: Estimate) -> Estimate:
    """With v, what a token adds to those before it; or with c by the answer so far."""
    row, mask = spec.definition, estimate.mask
    if row.of_answer is not None:
        so_far = batch.answers.so_far(estimate.reach)
        own = masked_(row.of_answer(so_far), mask)
        falling = None if estimate.falling is None else so_far
        return replace(estimate, own=own, later=torch.zeros_like(own), falling=falling)
    if row.later is None or row.later is row.as_loss.coefficient:
        return estimate
    if row.later is row.value:
        return replace(estimate, later=estimate.value)
    return replace(estimate, later=masked_(row.later(estimate.reach), mask))


def _of_answers(spec: TermSpec, batch: Batch, estimate: Estimate) -> Estimate:
    """With c by the ratio of the whole answer, alike at all its tokens, and an even share of the
    value. ``D_f(pi, ref)`` of answers has the gradient ``E_pi[(f'(U) - f'(1)) sum_t s_t]``."""
    row, mask = spec.definition, estimate.mask
    log_ratio = answer_log_ratio(batch, estimate)
    unbounded = row.as_loss.coefficient(log_ratio)
    own = unbounded.clamp(-spec.bound, spec.bound)
    value = row.value(log_ratio) / batch.answers.whole(mask.to(log_ratio.dtype))
    own, value = masked(own, mask), masked(value, mask)
    falling = None if estimate.falling is None else log_ratio
    none = torch.zeros_like(own)
    bounded = replace(estimate, value=value, own=own, later=none, falling=falling)
    return bounded if math.isinf(spec.bound) else replace(bounded, unbounded=unbounded)


def answer_log_ratio(batch: Batch, estimate: Estimate) -> Tensor:
    """log U, the log-ratio of the whole answer at each of its tokens, (B, T)."""
    return finite(batch.answers.whole(estimate.reach))


# ── Weights and baselines ────────────────────────────────────────────────────────────────────────


def _importance(spec: TermSpec, batch: Batch, mask: Tensor) -> ImportanceWeight | None:
    policy = policy_of(spec)
    if policy is None:
        return None
    # The heads have none of these options: theirs is the policy loss's own ratio.
    return importance_weight(
        batch.log_ratio(policy),
        mask,
        level=spec.level or "token",
        cap=math.inf if spec.cap is None else spec.cap,
        mode=spec.mode or "truncate",
        answers=batch.answers,
        own=not spec.over_vocabulary,
    )


def _apart(gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``gradient`` as weight times coefficient. The weight is 1 where it is 0 and the gradient is
    not: a token that mode=mask dropped still answers for later ones."""
    divisor = weight.where(weight > 0, 1.0)
    return weight.where(gradient == 0, divisor), finite_(gradient / divisor)


def _weighed(estimate: Estimate, importance: ImportanceWeight) -> Tensor:
    """``w c``, which is a number on the reference's answers where neither w nor c is one."""
    product, y = importance.weight * estimate.own, estimate.falling
    if y is not None:
        scale = 1.0 if estimate.scale is None else estimate.scale
        below = importance.times_exp(-y) * y.clamp(max=0).expm1() * scale
        product = below.where(y < 0, product)
    return finite_(product)


def returns(estimate: Estimate, batch: Batch, importance: ImportanceWeight | None = None) -> Tensor:
    """``w_t c_t + sum_{s>t} w_s v_s``."""
    own, later = estimate.own, estimate.later
    added = later if importance is None else finite_(importance.weight * later)
    to_go = batch.answers.to_go(added)
    if own is not later:
        own = own if importance is None else _weighed(estimate, importance)
        # Not less what is added here, which may be so large that no digit of the rest is left.
        to_go = batch.answers.after(to_go) + own
    return finite_(to_go)


def baseline(spec: TermSpec, batch: Batch, estimate: Estimate, returned: Tensor) -> Tensor:
    """The mean return of the other answers, or what was handed in for it."""
    if "return_baseline" in batch.others:
        return batch.masked("return_baseline")
    groups = None if spec.baseline == "batch" else batch.given.group_ids
    return others_mean(returned, groups, estimate.mask.any(-1))


def _credited(to_go: Tensor, mask: Tensor, answers: Answers) -> Tensor:
    """Per-token numbers, zero where masked, whose sum over this token and later ones of its answer
    is ``to_go`` at every counted token."""
    length = mask.shape[-1]
    position = torch.arange(length, device=mask.device).expand_as(mask)
    following = position.where(mask, length).flip(-1).cummin(-1).values.flip(-1)
    following = pad(following[:, 1:], (0, 1), value=length)
    after = pad(to_go, (0, 1)).gather(-1, following)
    if answers.number is not None and length:
        after = masked_(after, answers.same(following.clamp(max=length - 1)))
    return torch.where(mask, to_go - after, 0.0)
