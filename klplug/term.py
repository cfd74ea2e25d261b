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
from klplug.numerics import finite, finite_, flags, largest_exponent, masked, masked_
from klplug.spec import KLSpec, parse
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
        loss: differentiable. Its value is the estimate, its gradient ``weight * coefficient *
            grad log_probs``: the formulation's, whatever the estimate's own derivative is.
        value: detached, unweighted estimate of the KL by the named estimator, nats per token.
        coefficient: detached c; for ``in_reward`` the number to join to each token's reward.
        weight: detached w; 1 where there is no ratio.

    For a sum of terms ``loss`` and ``value`` are the sums of the parts', and ``weight`` is 1.
    """

    value: Tensor
    coefficient: Tensor
    _log_probs: Tensor = field(repr=False)
    _force: Tensor = field(repr=False)
    _mask: Tensor = field(repr=False)
    _weight: Tensor | None = field(repr=False)
    # What only some callers ask for is made when they do: most of the cost is here.
    _diagnose: Callable[[], Diagnosis] = field(repr=False)

    @functools.cached_property
    def loss(self) -> Tensor:
        # Made on first use, which may be under no_grad: what counts is how kl_term was called.
        with torch.enable_grad():
            return _with_gradient(self._log_probs, self.value, self._force)

    @functools.cached_property
    def weight(self) -> Tensor:
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

    Raises:
        ValueError: an input that the formulation needs is missing, shapes differ, or an answer is
            alone under a baseline.

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
    }
    options = {"kl_coef": kl_coef, "clip_range": clip_range, "group_ids": group_ids}
    _check(spec, log_probs, response_mask, supplied, options)
    clip = None if clip_range is None else _low_and_high(clip_range)
    batch = _Batch.of(spec, log_probs, response_mask, supplied)
    if spec.estimator == "none":
        return _nothing(batch)
    terms = [_single(t, batch, kl_coef, clip, group_ids) for t in spec.terms]
    return terms[0] if len(terms) == 1 else _sum(spec, terms)


def policy_loss(
    spec: str | KLSpec,
    log_probs: Tensor,
    ref_log_probs: Tensor | None,
    response_mask: Tensor,
    *,
    old_log_probs: Tensor,
    advantages: Tensor,
    kl_coef: float | Tensor,
    clip_range: ClipRange = 0.2,
    rollout_log_probs: Tensor | None = None,
    group_ids: Groups = None,
    return_baseline: Tensor | None = None,
) -> Tensor:
    """PPO's and GRPO's clipped surrogate with its KL, per token: (B, T), differentiable.

    With ``rho = pi/old``, ``head=combined`` is ``-min(rho A', clip(rho) A')``,
    ``A' = sg(A - kl_coef * c)``: the KL inside the ratio and the clip, c at the *current* policy
    (which a KL in the reward has at the start of the step). Any other as_loss term is added to the
    surrogate of ``A`` as ``kl_coef * KLTerm.loss``. The one difference between the heads is whose
    sign decides where the clip drops the gradient.

    Args:
        spec: terms as_loss (``k1_in_reward,head=combined`` is one), or ``none``.
        advantages: (B, T), already normalised over their groups; not differentiated.
        kl_coef: beta.
        clip_range: epsilon, or (low, high): the ratio is held in [1 - low, 1 + high].

    The others, and the errors, are ``kl_term``'s. Aggregate the result as the policy loss is.

    Raises:
        ValueError: a term in the reward: it belongs to the advantages that are handed in.
    """
    spec = parse(spec)
    if spec.placed("in_reward").estimator != "none":
        raise ValueError(
            f"kl_type {str(spec)!r} is in the reward: join it to the advantages, or use "
            "'k1_in_reward,head=combined'"
        )
    given: dict[str, Any] = {
        "old_log_probs": old_log_probs,
        "rollout_log_probs": rollout_log_probs,
        "advantages": advantages,
        "kl_coef": kl_coef,
        "clip_range": clip_range,
        "group_ids": group_ids,
        "return_baseline": return_baseline,
    }
    low, high = _low_and_high(clip_range)
    terms = {
        term: kl_term(term, log_probs, ref_log_probs, response_mask, **given) for term in spec.terms
    }
    mask = response_mask.bool()
    dtype = next(iter(terms.values())).value.dtype
    force = masked(advantages.detach().to(dtype), mask)
    for term, kl in terms.items():
        if term.head == "combined":
            force = force - kl_coef * kl.coefficient
    log_ratio = log_probs.detach().to(dtype) - old_log_probs.detach()
    ratio = importance_weight(log_ratio, mask, level="token", cap=math.inf, mode="truncate")
    rho, held = ratio.weight, clipped_weight(ratio, -force, (low, high)).weight
    value = -torch.minimum(rho * force, rho.clamp(1 - low, 1 + high) * force)
    force = -held * force
    for term, kl in terms.items():
        if term.head in ("separate", "clipped"):
            value, force = value + kl_coef * kl.value, force + kl_coef * kl._force
    # Not by autograd, to which the gradient of a saturated exponent is no number.
    return _with_gradient(log_probs, finite(value), finite(force))


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
    if spec.baseline in (None, "none"):
        raise ValueError(f"kl_type {str(spec)!r} has no baseline")
    reference = f"{spec.reference}_log_probs"
    batch = _Batch.of(spec, log_probs, response_mask, {reference: ref_log_probs})
    _, own, later = _value_and_coefficients(spec, batch, batch.log_ratio(reference))
    return others_mean(_returns(own, later, None), _groups(spec, group_ids))


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
    """``value``, with ``force`` as its derivative with respect to ``log_probs``."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, value: Tensor, force: Tensor) -> Tensor:
        ctx.save_for_backward(force)
        ctx.dtype = log_probs.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (force,) = ctx.saved_tensors
        gradient = gradients[0] * force
        if gradient.dtype != ctx.dtype:  # whose largest number may be less
            limit = torch.finfo(ctx.dtype).max
            gradient = gradient.clamp_(-limit, limit).to(ctx.dtype)
        return gradient, None, None


def _with_gradient(log_probs: Tensor, value: Tensor, force: Tensor) -> Tensor:
    return cast(Tensor, _WithGradient.apply(log_probs, value, force))  # type: ignore[no-untyped-call]


def _single(
    spec: KLSpec,
    batch: _Batch,
    kl_coef: float | Tensor | None,
    clip: tuple[float, float] | None,
    group_ids: Groups,
) -> KLTerm:
    log_ratio = batch.log_ratio(f"{spec.reference}_log_probs")
    value, coefficient, later = _value_and_coefficients(spec, batch, log_ratio)
    importance = _importance(spec, batch)
    weight = None if importance is None else importance.weight
    force: Tensor | None = None
    if spec.placement == "as_loss" and spec.horizon == "sequence":
        # Per decision: sum_{s>=t} w_s c_s. At sequence level w is one number per answer, so this
        # is w times the reward-to-go there, and without a ratio the reward-to-go itself.
        inside = weight if spec.head == "separate" else None
        force = _returns(coefficient, later, inside)
        if spec.baseline != "none":
            compared = _baseline(spec, batch, force, group_ids)
            force = force - (compared if inside is None else inside * compared)
        coefficient = force = masked_(finite_(force), batch.mask)
        if inside is not None:
            # A token whose own weight is 0 (dropped by mode=mask) still answers for later ones.
            weight = torch.where(inside > 0, inside, batch.ones)
            coefficient = masked_(finite_(force / weight), batch.mask)
    elif spec.baseline != "none":
        compared = _baseline(spec, batch, _returns(coefficient, later, None), group_ids)
        coefficient = finite_(coefficient - _credited(compared, batch.mask))
    if spec.head != "separate":
        assert importance is not None and clip is not None
        slope = coefficient
        if spec.head == "combined":
            assert kl_coef is not None
            slope = kl_coef * coefficient - batch.masked(batch.others["advantages"])
        importance = clipped_weight(importance, slope, clip)
        weight, force = importance.weight, None
    if force is None:
        force = coefficient if weight is None else finite_(weight * coefficient)

    def diagnose() -> Diagnosis:
        bounded = None
        assert spec.bound is not None and spec.placement is not None
        if not math.isinf(spec.bound):
            unbounded = spec.definition.role(spec.placement).coefficient(log_ratio)
            bounded = flags(torch.gt, unbounded.abs(), spec.bound)
        overflowed = flags(torch.lt, log_ratio, -largest_exponent(log_ratio))
        if coefficient is not log_ratio:
            overflowed += flags(torch.ge, coefficient.abs(), torch.finfo(value.dtype).max)
        if importance is not None:
            overflowed += importance.overflowed()
        return Diagnosis(
            mask=batch.mask,
            log_ratio=log_ratio,
            coefficient=coefficient,
            **_forces(spec, batch, log_ratio, coefficient, force, importance),
            overflowed=overflowed.clamp_(max=1),
            k3=value if spec.estimator == "k3" else None,
            weight=None if importance is None else importance.weight,
            capped=None if importance is None else importance.capped(),
            bounded=bounded,
        )

    return KLTerm(value, coefficient, batch.differentiable, force, batch.mask, weight, diagnose)


def _value_and_coefficients(
    spec: KLSpec, batch: _Batch, log_ratio: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The estimate, each token's own coefficient, and what it adds to those of the tokens before
    it."""
    assert spec.placement is not None and spec.bound is not None
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


def _forces(
    spec: KLSpec,
    batch: _Batch,
    log_ratio: Tensor,
    coefficient: Tensor,
    force: Tensor,
    importance: ImportanceWeight | None,
) -> dict[str, Tensor]:
    """The term's force on each token's score, and the same with ``c = lr``."""
    weight = None if importance is None else importance.weight
    if spec.placement == "in_reward":
        # The host credits it to all earlier tokens.
        force = principled = batch.masked(finite_(reward_to_go(coefficient)))
        if coefficient is not log_ratio:
            principled = batch.masked(finite_(reward_to_go(log_ratio)))
    elif spec.horizon == "sequence":
        inside = weight if spec.head == "separate" else None
        principled = _returns(log_ratio, log_ratio, inside)
        if spec.head != "separate" and weight is not None:
            principled = weight * principled
        principled = masked_(principled, batch.mask)
    elif weight is None:
        principled = log_ratio
    else:
        principled = force if coefficient is log_ratio else finite_(weight * log_ratio)
    return {"force": force, "principled": principled}


def _importance(spec: KLSpec, batch: _Batch) -> ImportanceWeight | None:
    if spec.ratio == "none":
        return None
    # The heads have none of these options: theirs is the policy loss's own ratio.
    return importance_weight(
        batch.raw_log_ratio(f"{spec.ratio or 'old'}_log_probs"),
        batch.mask,
        level=spec.level or "token",
        cap=math.inf if spec.cap is None else spec.cap,
        mode=spec.mode or "truncate",
    )


def _returns(own: Tensor, later: Tensor, weight: Tensor | None) -> Tensor:
    """A token's own coefficient and all that later ones add to it, each under its weight."""
    added = later if weight is None else finite_(weight * later)
    returns = reward_to_go(added)
    if own is not later:
        returns = returns - added + (own if weight is None else finite_(weight * own))
    return finite_(returns)


def _groups(spec: KLSpec, group_ids: Groups) -> Groups:
    return None if spec.baseline == "batch" else group_ids


def _baseline(spec: KLSpec, batch: _Batch, returns: Tensor, group_ids: Groups) -> Tensor:
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
    weighted = next((i for i, s in enumerate(spec.terms) if s.ratio != "none"), 0)
    zero = torch.zeros_like(first.value)
    force = finite(sum((t._force for t in terms), zero))
    value = finite(sum((t.value for t in terms), zero))

    def diagnose() -> Diagnosis:
        seen = [t._diagnose() for t in terms]
        of_weight = seen[weighted]
        bounded = [s.bounded for s in seen if s.bounded is not None]
        return dataclasses.replace(
            seen[0],
            coefficient=force,
            weight=of_weight.weight,
            capped=of_weight.capped,
            force=finite(sum((s.force for s in seen), zero)),
            overflowed=torch.stack([s.overflowed for s in seen]).amax(0),
            bounded=torch.stack(bounded).amax(0) if bounded else None,
        )

    return KLTerm(value, force, first._log_probs, force, first._mask, None, diagnose)


def _nothing(batch: _Batch) -> KLTerm:
    zero = torch.zeros_like(batch.log_probs)

    def diagnose() -> Diagnosis:
        return Diagnosis(batch.mask, zero, zero, zero, zero, overflowed=torch.zeros_like(zero))

    return KLTerm(zero, zero, batch.differentiable, zero, batch.mask, None, diagnose)


def _low_and_high(clip_range: ClipRange) -> tuple[float, float]:
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
