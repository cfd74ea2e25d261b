"""Where coefficient and weight meet: ``kl_term``, one KL term of a training step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from klplug.baselines import others_mean
from klplug.numerics import finite, finite_, flags, largest, largest_exponent, masked, masked_
from klplug.spec import KLSpec, TermSpec, parse
from klplug.tally import Diagnosis, Tally
from klplug.weights import ImportanceWeight, clipped_weight, importance_weight

ClipRange: TypeAlias = "float | tuple[float, float]"
Groups: TypeAlias = "Sequence[Hashable] | Tensor | None"


@dataclass(frozen=True, eq=False)
class KLTerm:
    """A KL term per token; every tensor is (B, T) and exactly zero where masked.

    Aggregate it once, as the policy loss is aggregated (``klplug.aggregate`` where there is no
    host), and multiply by ``kl_coef``. The term is a penalty: it is *added* to a loss, and
    ``coefficient`` is *subtracted* from a reward.

    Attributes:
        spec: what it is a term of.
        value: detached, unweighted estimate of the KL by the named estimator, nats per token.
        coefficient: detached c; for ``in_reward`` the number to join to each token's reward.
        gradient: detached ``weight * coefficient``: that of ``loss.sum()`` with respect to
            ``log_probs``, whatever the estimate's own derivative is.
        pathwise: with vocab=exact, what of ``loss`` goes through ``exact_kl`` instead: 0, with the
            gradient ``weight * grad exact_kl``; otherwise ``None``. Of an own token it is all.
        parts: the terms of a sum, and of ``none`` none; a single term is its own only part.

    For a sum of terms ``value`` and ``gradient`` are the sums of the parts', ``coefficient`` is
    ``gradient``, and ``weight`` is 1.
    """

    spec: KLSpec
    value: Tensor
    coefficient: Tensor
    gradient: Tensor
    _log_probs: Tensor = field(repr=False)
    _mask: Tensor = field(repr=False)
    _weight: Tensor | None = field(repr=False)
    # What only some callers ask for is made when they do: most of the cost is here.
    _diagnose: Callable[[], Diagnosis] = field(repr=False)
    _parts: tuple[KLTerm, ...] = field(default=(), repr=False)
    pathwise: Tensor | None = field(default=None, repr=False)

    @property
    def parts(self) -> tuple[KLTerm, ...]:
        return (self,) if len(self.spec.terms) == 1 else self._parts

    @functools.cached_property
    def loss(self) -> Tensor:
        """Differentiable: its value is ``value``, its gradient ``gradient``."""
        # Made on first use, which may be under no_grad: what counts is how kl_term was called.
        with torch.enable_grad():
            loss = with_gradient(self._log_probs, self.value, self.gradient)
            return loss if self.pathwise is None else loss + self.pathwise

    @functools.cached_property
    def weight(self) -> Tensor:
        """Detached w; 1 where there is no ratio."""
        return self._mask.to(self.value.dtype) if self._weight is None else self._weight

    @functools.cached_property
    def tally(self) -> Tally:
        """Sums and maxima over the counted tokens, for merging over micro-batches and ranks."""
        return self._diagnose().tally()

    @property
    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors by name, computed when asked for; see ``Tally.metrics``."""
        return self.tally.metrics()


def kl_term(
    spec: str | KLSpec,
    log_probs: Tensor,
    ref_log_probs: Tensor | None,
    response_mask: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    advantages: Tensor | None = None,
    kl_coef: float | Tensor | None = None,
    clip_range: ClipRange | None = None,
    group_ids: Groups = None,
    return_baseline: Tensor | None = None,
    exact_kl: Tensor | None = None,
) -> KLTerm:
    """The KL term that ``spec`` names, per token: ``KL(pi_theta || pi_ref)``, in nats per token.

    With ``lr = log_probs - ref_log_probs``, the gradient of ``KLTerm.loss`` is
    ``w * c * grad log_probs``, c being the estimator's value (``in_reward``) or derivative
    (``as_loss``) at ``lr``, detached, and w the importance weight, detached. Whose gradient that
    is, in expectation over samples, ``kl_types()`` says for each name. Samples come from pi_theta,
    or from the policy that ``ratio`` names.

    Work is done in float32 at least; float64 stays. Nothing is clamped but by ``cap`` and
    ``bound``, and exponents at the dtype's maximum (``klplug/overflow_share``).

    Args:
        spec: a ``kl_type`` string or its ``KLSpec``.
        log_probs: (B, T), log pi_theta of the sampled tokens, nats; carries the gradient.
        ref_log_probs: (B, T), log pi_ref of the same tokens. May be ``None`` for ``none`` and
            ``reference=rollout``.
        response_mask: (B, T), nonzero where a token counts. Elsewhere the other tensors may hold
            anything, nan and inf too. A mask of zeros gives a zero term.
        old_log_probs: (B, T), the trainer's recomputation at the start of the step; for ratio=old
            and the heads.
        rollout_log_probs: (B, T), the sampler's own; for ratio=rollout.
        advantages: (B, T), for head=combined: its clip looks at advantage and KL together.
        kl_coef: beta, for head=combined likewise.
        clip_range: PPO's, for the heads: epsilon, or (low, high).
        group_ids: B of them, for baseline=group: answers to one prompt alike. On the CPU, or the
            device is waited for.
        return_baseline: (B, T), used as the baseline instead of one from this batch, for batches
            that cut groups: ``klplug.kl_return_baseline`` of the whole one.
        exact_kl: (B, T), for vocab=exact: the ``kl`` of ``klplug.exact_kl`` with the divergence of
            that name, at the same tokens; carries the gradient of the policy.

    Raises:
        ValueError: an input that the formulation needs is missing, shapes differ, an answer is
            alone under a baseline, or ``exact_kl`` carries no gradient where ``log_probs`` does.

    Source: arXiv 2510.01555 for one token; ``tests/core/test_oracle.py`` proves whose gradient each
    formulation has on answers of many tokens.
    """
    spec = parse(spec)
    supplied = {
        "ref_log_probs": ref_log_probs,
        "old_log_probs": old_log_probs,
        "rollout_log_probs": rollout_log_probs,
        "advantages": advantages,
        "return_baseline": return_baseline,
        "exact_kl": exact_kl,
    }
    options = {"kl_coef": kl_coef, "clip_range": clip_range, "group_ids": group_ids}
    _check(spec, log_probs, response_mask, supplied, options)
    clip = None if clip_range is None else low_and_high(clip_range)
    batch = _Batch.of(spec, log_probs, response_mask, supplied)
    if not spec.terms:
        return _nothing(spec, batch)
    terms = [
        _over_the_vocabulary(term, batch, exact_kl)
        if term.vocab == "exact" and exact_kl is not None
        else _single(term, batch, kl_coef, clip, group_ids)
        for term in spec.terms
    ]
    return terms[0] if len(terms) == 1 else _sum(spec, terms)


def kl_return_baseline(
    spec: str | KLSpec,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    response_mask: Tensor,
    group_ids: Groups = None,
) -> Tensor:
    """What ``baseline=...`` compares each answer's KL return with: (B, T), detached, nats.

    At each position the mean, over the other answers of the group (or of the batch, by ``spec``),
    of the KL that is still to come. For the start of a step, when the whole batch is at hand and
    the policy is the one that sampled: any function of the *other* answers is an unbiased baseline,
    so this one serves all updates of the step.

    Raises:
        ValueError: a ``kl_type`` of several terms or without a baseline, or as ``kl_term``.
    """
    spec = parse(spec)
    if len(spec.terms) != 1 or spec.terms[0].baseline == "none":
        raise ValueError(f"kl_type {str(spec)!r} has no baseline")
    (term,) = spec.terms
    reference = f"{term.reference}_log_probs"
    batch = _Batch.of(spec, log_probs, response_mask, {reference: ref_log_probs})
    _, own, later = _value_and_coefficients(term, batch, batch.log_ratio(reference))
    return others_mean(_returns(own, later, batch), _groups(term, group_ids))


@dataclass
class _Batch:
    """The tensors of one call, detached but the first, in the dtype of the work."""

    differentiable: Tensor
    log_probs: Tensor
    mask: Tensor
    others: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        spec: KLSpec,
        log_probs: Tensor,
        response_mask: Tensor,
        supplied: dict[str, Tensor | None],
    ) -> _Batch:
        others = {}
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        for name in (*spec.requires, "return_baseline"):
            tensor = supplied.get(name)
            if tensor is not None:
                others[name] = tensor.detach()
                dtype = torch.promote_types(dtype, tensor.dtype)
        detached = log_probs.detach()
        differentiable = log_probs if torch.is_grad_enabled() else detached
        return cls(differentiable, detached.to(dtype), response_mask.bool(), others)

    def log_ratio(self, other: str) -> Tensor:
        """``log_probs`` less another policy's, 0 where masked."""
        return masked_(self.raw_log_ratio(other), self.mask)

    def raw_log_ratio(self, other: str) -> Tensor:
        """The same, and anything where masked."""
        return self.log_probs - self.others[other]

    def masked(self, x: Tensor) -> Tensor:
        return masked(x.to(self.log_probs.dtype), self.mask)

    @property
    def ones(self) -> Tensor:
        return self.mask.to(self.log_probs.dtype)


class _WithGradient(torch.autograd.Function):
    """``value``, with ``derivative`` as its derivative with respect to ``log_probs``."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, value: Tensor, derivative: Tensor) -> Tensor:
        ctx.save_for_backward(derivative)
        ctx.dtype = log_probs.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        gradient = gradients[0] * derivative
        if gradient.dtype != ctx.dtype:  # whose largest number may be less
            limit = torch.finfo(ctx.dtype).max
            gradient = gradient.clamp_(-limit, limit).to(ctx.dtype)
        return gradient, None, None


def with_gradient(log_probs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value``, differentiable: that times ``gradient`` is what ``log_probs`` gets of it."""
    return cast(Tensor, _WithGradient.apply(log_probs, value, gradient))  # type: ignore[no-untyped-call]


# ── What a term does to each token: c, w, and the gradient w c, by head and horizon ──────────────


@dataclass(frozen=True)
class _Acting:
    """c, w (``None`` where it is 1) and the gradient with respect to ``log_probs``.

    ``principled``, for the metrics, is the gradient that the same formulation has with c = lr.
    """

    coefficient: Tensor
    weight: Tensor | None
    gradient: Tensor
    principled: Callable[[], Tensor]


def _single(
    spec: TermSpec,
    batch: _Batch,
    kl_coef: float | Tensor | None,
    clip: tuple[float, float] | None,
    group_ids: Groups,
) -> KLTerm:
    log_ratio = batch.log_ratio(f"{spec.reference}_log_probs")
    value, own, later = _value_and_coefficients(spec, batch, log_ratio)
    importance = _importance(spec, batch)
    if spec.placement == "in_reward":
        acting = _in_the_reward(spec, batch, log_ratio, own, group_ids)
    elif spec.head != "separate":
        assert importance is not None and clip is not None
        coefficient = own if spec.horizon == "token" else _returns(own, later, batch)
        slope = coefficient
        if spec.head == "combined":
            assert kl_coef is not None
            slope = kl_coef * coefficient - batch.masked(batch.others["advantages"])
        importance = clipped_weight(importance, slope, clip)
        acting = _under_a_head(spec, batch, log_ratio, coefficient, importance.weight)
    else:
        weight = None if importance is None else importance.weight
        if spec.horizon == "token":
            acting = _own_token(log_ratio, own, weight)
        else:
            acting = _whole_answer(spec, batch, log_ratio, own, later, weight, group_ids)

    def diagnose() -> Diagnosis:
        bounded = None
        coefficient = acting.coefficient
        if not math.isinf(spec.bound):
            unbounded = spec.definition.role(spec.placement).coefficient(log_ratio)
            bounded = flags(torch.gt, unbounded.abs(), spec.bound)
        overflowed = flags(torch.lt, log_ratio, -largest_exponent(log_ratio))
        if coefficient is not log_ratio:
            overflowed += flags(torch.ge, coefficient.abs(), largest(value))
        if importance is not None:
            overflowed += importance.overflowed()
        gradient, principled = acting.gradient, acting.principled()
        if spec.placement == "in_reward":  # the host credits it to all tokens before its own
            gradient = batch.masked(finite_(reward_to_go(coefficient)))
            principled = gradient if coefficient is log_ratio else principled
        return Diagnosis(
            mask=batch.mask,
            log_ratio=log_ratio,
            coefficient=coefficient,
            gradient=gradient,
            principled=principled,
            overflowed=overflowed.clamp_(max=1),
            k3=value if spec.estimator == "k3" else None,
            weight=None if importance is None else importance.weight,
            capped=None if importance is None else importance.capped(),
            bounded=bounded,
        )

    return KLTerm(
        spec,
        value,
        acting.coefficient,
        acting.gradient,
        batch.differentiable,
        batch.mask,
        acting.weight,
        diagnose,
    )


def _over_the_vocabulary(spec: TermSpec, batch: _Batch, exact_kl: Tensor) -> KLTerm:
    """``Q_t grad D_t``, and over whole answers ``s_t sum_{s>t} Q_s D_s`` too (LOC, FULL).

    D is the exact KL, Q the weight of the tokens before: the expectation over a token is in its D,
    so neither ``grad D_t`` nor a later token's ``D_s`` needs that token's own ratio.
    """
    log_ratio = batch.log_ratio(f"{spec.reference}_log_probs")
    value = batch.masked(batch.others["exact_kl"])
    importance = _importance(spec, batch)
    weight = before = None if importance is None else importance.weight
    gradient = coefficient = torch.zeros_like(value)
    if spec.horizon == "sequence":
        to_go = reward_to_go(value if before is None else finite_(before * value))
        later = torch.nn.functional.pad(to_go[:, 1:], (0, 1))
        gradient = coefficient = masked_(finite_(later), batch.mask)
        if before is not None:
            # A token whose own weight is 0 (dropped by mode=mask) still answers for later ones.
            weight = torch.where(before > 0, before, batch.ones)
            coefficient = masked_(finite_(gradient / weight), batch.mask)
    pathwise = None
    if exact_kl.requires_grad and torch.is_grad_enabled():
        own = exact_kl.where(batch.mask, 0.0)
        pathwise = (own - own.detach()) * (1.0 if before is None else before)

    def diagnose() -> Diagnosis:
        overflowed = flags(torch.lt, log_ratio, -largest_exponent(log_ratio))
        if importance is not None:
            overflowed += importance.overflowed()
        return Diagnosis(
            mask=batch.mask,
            log_ratio=log_ratio,
            coefficient=None,
            gradient=gradient,
            principled=gradient,
            overflowed=overflowed.clamp_(max=1),
            exact=value,
            weight=before,
            capped=None if importance is None else importance.capped(),
        )

    return KLTerm(
        spec,
        value,
        coefficient,
        gradient,
        batch.differentiable,
        batch.mask,
        weight,
        diagnose,
        pathwise=pathwise,
    )


def _own_token(log_ratio: Tensor, own: Tensor, weight: Tensor | None) -> _Acting:
    """``w_t c_t``: prefixes held fixed (LOC)."""
    if weight is None:
        return _Acting(own, None, own, lambda: log_ratio)
    gradient = finite_(weight * own)
    if own is log_ratio:
        return _Acting(own, weight, gradient, lambda: gradient)
    return _Acting(own, weight, gradient, lambda: finite_(weight * log_ratio))


def _whole_answer(
    spec: TermSpec,
    batch: _Batch,
    log_ratio: Tensor,
    own: Tensor,
    later: Tensor,
    weight: Tensor | None,
    group_ids: Groups,
) -> _Acting:
    """``w_t c_t + sum_{s>t} w_s v_s``, less ``w_t`` times the baseline (FULL).

    v is what a token adds to those before it, c itself for k2. With a weight of the whole answer
    all w are one; with the prefixes' this is the per-decision form. The ``coefficient`` is that
    sum over ``w_t``, so that weight times coefficient is the gradient here too.
    """
    gradient = _returns(own, later, batch, weight)
    if spec.baseline != "none":
        compared = _baseline(spec, batch, gradient, group_ids)
        gradient = gradient - (compared if weight is None else weight * compared)
    gradient = masked_(finite_(gradient), batch.mask)

    def principled() -> Tensor:
        return masked_(_returns(log_ratio, log_ratio, batch, weight), batch.mask)

    if weight is None:
        return _Acting(gradient, None, gradient, principled)
    # A token whose own weight is 0 (dropped by mode=mask) still answers for later ones.
    shown = torch.where(weight > 0, weight, batch.ones)
    coefficient = masked_(finite_(gradient / shown), batch.mask)
    return _Acting(coefficient, shown, gradient, principled)


def _in_the_reward(
    spec: TermSpec, batch: _Batch, log_ratio: Tensor, own: Tensor, group_ids: Groups
) -> _Acting:
    """``c_t``, which a host credits to this token and all before it: ``sum_{s>=t} c_s`` (FULL)."""
    coefficient = own
    if spec.baseline != "none":
        compared = _baseline(spec, batch, _returns(own, own, batch), group_ids)
        coefficient = finite_(own - _credited(compared, batch.mask))

    def principled() -> Tensor:
        return batch.masked(finite_(reward_to_go(log_ratio)))

    return _Acting(coefficient, None, coefficient, principled)


def _under_a_head(
    spec: TermSpec, batch: _Batch, log_ratio: Tensor, coefficient: Tensor, weight: Tensor
) -> _Acting:
    """``rho_t c_t``, and 0 where PPO's clip drops it; over whole answers c_t is the sum to go."""
    if spec.horizon == "sequence":
        coefficient = masked_(coefficient, batch.mask)

    def principled() -> Tensor:
        if spec.horizon == "sequence":
            return masked_(weight * _returns(log_ratio, log_ratio, batch), batch.mask)
        return gradient if coefficient is log_ratio else finite_(weight * log_ratio)

    gradient = finite_(weight * coefficient)
    return _Acting(coefficient, weight, gradient, principled)


def _value_and_coefficients(
    spec: TermSpec, batch: _Batch, log_ratio: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The estimate, each token's own coefficient, and what it adds to those of the tokens before
    it."""
    estimator = spec.definition
    on_answers = spec.placement == "as_loss" and spec.horizon == "sequence"
    if on_answers and estimator.of_answer is not None:
        own = batch.masked(estimator.of_answer(log_ratio))
        return estimator.value(log_ratio), own, torch.zeros_like(own)
    coefficient = estimator.role(spec.placement).coefficient
    own = coefficient(log_ratio)
    if coefficient is estimator.value:
        value = own
    elif estimator.value_of_derivative is not None:
        value = estimator.value_of_derivative(log_ratio, own)
    else:
        value = estimator.value(log_ratio)
    if not math.isinf(spec.bound):
        own = own.clamp(-spec.bound, spec.bound)
    if spec.estimator == "k1" and spec.placement == "as_loss":
        own = batch.masked(own)  # the one coefficient that is not 0 where lr is
    if not on_answers or estimator.later is None or estimator.later is coefficient:
        return value, own, own
    return value, own, estimator.later(log_ratio)


def _importance(spec: TermSpec, batch: _Batch) -> ImportanceWeight | None:
    if spec.ratio == "none":
        return None
    # The heads have none of these options: theirs is the policy loss's own ratio.
    return importance_weight(
        batch.raw_log_ratio(f"{spec.ratio or 'old'}_log_probs"),
        batch.mask,
        level=spec.level or "token",
        cap=math.inf if spec.cap is None else spec.cap,
        mode=spec.mode or "truncate",
        own=spec.vocab == "sample",
    )


def _returns(own: Tensor, later: Tensor, batch: _Batch, weight: Tensor | None = None) -> Tensor:
    """A token's own coefficient and all that later ones add to it, each under its weight."""
    added = later if weight is None else finite_(weight * later)
    returns = reward_to_go(added)
    if own is not later:
        returns = returns - added + (own if weight is None else finite_(weight * own))
    return finite_(returns)


def _groups(spec: TermSpec, group_ids: Groups) -> Groups:
    return None if spec.baseline == "batch" else group_ids


def _baseline(spec: TermSpec, batch: _Batch, returns: Tensor, group_ids: Groups) -> Tensor:
    if "return_baseline" in batch.others:
        return batch.masked(batch.others["return_baseline"])
    return others_mean(returns, _groups(spec, group_ids))


def _credited(to_go: Tensor, mask: Tensor) -> Tensor:
    """Per-token numbers, zero where masked, whose sum over this token and later ones is
    ``to_go`` at every counted token."""
    length = mask.shape[-1]
    position = torch.arange(length, device=mask.device).expand_as(mask)
    following = position.where(mask, length).flip(-1).cummin(-1).values.flip(-1)
    following = torch.nn.functional.pad(following[:, 1:], (0, 1), value=length)
    padded = torch.nn.functional.pad(to_go, (0, 1))
    return torch.where(mask, to_go - padded.gather(-1, following), 0.0)


def reward_to_go(x: Tensor) -> Tensor:
    """``sum_{s>=t} x_s`` along the last dimension."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _sum(spec: KLSpec, terms: list[KLTerm]) -> KLTerm:
    first = terms[0]
    weighted = next((i for i, term in enumerate(terms) if term.spec.ratio != "none"), 0)
    zero = torch.zeros_like(first.value)
    gradient = finite(sum((t.gradient for t in terms), zero))
    value = finite(sum((t.value for t in terms), zero))
    paths = [t.pathwise for t in terms if t.pathwise is not None]

    def diagnose() -> Diagnosis:
        seen = [t._diagnose() for t in terms]
        of_weight = seen[weighted]
        bounded = [s.bounded for s in seen if s.bounded is not None]
        return dataclasses.replace(
            seen[0],
            coefficient=None if any(s.coefficient is None for s in seen) else gradient,
            exact=next((s.exact for s in seen if s.exact is not None), None),
            weight=of_weight.weight,
            capped=of_weight.capped,
            gradient=finite(sum((s.gradient for s in seen), zero)),
            overflowed=torch.stack([s.overflowed for s in seen]).amax(0),
            bounded=torch.stack(bounded).amax(0) if bounded else None,
        )

    return KLTerm(
        spec,
        value,
        gradient,
        gradient,
        first._log_probs,
        first._mask,
        None,
        diagnose,
        tuple(terms),
        torch.stack(paths).sum(0) if paths else None,
    )


def _nothing(spec: KLSpec, batch: _Batch) -> KLTerm:
    zero = torch.zeros_like(batch.log_probs)

    def diagnose() -> Diagnosis:
        return Diagnosis(batch.mask, zero, zero, zero, zero, overflowed=torch.zeros_like(zero))

    return KLTerm(spec, zero, zero, zero, batch.differentiable, batch.mask, None, diagnose)


def low_and_high(clip_range: ClipRange) -> tuple[float, float]:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    if not (0 <= low < math.inf and 0 <= high < math.inf):
        raise ValueError(f"clip_range={clip_range!r} must be epsilon or (low, high), none negative")
    return low, high


def _check(
    spec: KLSpec,
    log_probs: Tensor,
    response_mask: Tensor,
    tensors: dict[str, Tensor | None],
    options: dict[str, Any],
) -> None:
    needed, heads = spec.requires, [term.head for term in spec.terms]
    if "combined" in heads:
        needed = (*needed, "clip_range", "kl_coef")
    elif "clipped" in heads:
        needed = (*needed, "clip_range")
    for name in needed:
        given = tensors.get("return_baseline" if name == "group_ids" else name)
        if given is None and options.get(name) is None:
            raise ValueError(f"kl_type {str(spec)!r} needs {name}, which is missing")
    over = {(t.estimator, t.alpha) for t in spec.terms if t.vocab == "exact"}
    if len(over) > 1:
        raise ValueError(
            f"kl_type {str(spec)!r} has several divergences over the vocabulary, and exact_kl is "
            "of one divergence: use kl_term for each, and add the losses"
        )
    exact_kl = tensors.get("exact_kl")
    if over and exact_kl is not None:
        lost = log_probs.requires_grad and torch.is_grad_enabled() and not exact_kl.requires_grad
        if lost:
            raise ValueError(
                f"kl_type {str(spec)!r}: exact_kl carries no gradient, so the term would do "
                "nothing: hand in the kl of klplug.exact_kl as it is"
            )
    shape = log_probs.shape
    if log_probs.dim() != 2 or not log_probs.is_floating_point():
        raise ValueError(
            "log_probs must be a floating-point tensor of shape (B, T), got "
            f"{tuple(shape)} of {log_probs.dtype}"
        )
    for name, tensor in (*tensors.items(), ("response_mask", response_mask)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, log_probs has {tuple(shape)}: "
                "all tensors must be (B, T), response tokens only"
            )
