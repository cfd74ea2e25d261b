"""Where coefficient and weight meet: ``kl_term``, one KL term of a training step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from klplug.answers import Answers
from klplug.baselines import others_mean
from klplug.numerics import HUGE, finite, finite_, flags, masked, masked_
from klplug.spec import KLSpec, TermSpec, parse
from klplug.tally import Seen, Tally, tally
from klplug.weights import ImportanceWeight, clipped_weight, importance_weight

ClipRange: TypeAlias = "float | Sequence[float]"
Groups: TypeAlias = "Sequence[Hashable] | Tensor | None"
Made = TypeVar("Made")


class KLTerm:
    """A KL term per token; every tensor is (B, T) and exactly zero where masked.

    Aggregate it once, as the policy loss is aggregated (``klplug.aggregate`` where there is no
    host), and multiply by ``kl_coef``. The term is a penalty: it is *added* to a loss, and
    ``coefficient`` is *subtracted* from a reward. What it hands out is the reader's own: to change
    it in place changes neither the others nor the metrics.

    Attributes:
        spec: what it is a term of.
        parts: the terms of a sum, and of ``none`` none; a single term is its own only part.
        value: detached, unweighted estimate of the KL by the named estimator, nats per token.
        coefficient: detached c; for ``in_reward`` the number to join to each token's reward.
        weight: detached w; 1 where there is no ratio.
        gradient: detached, that of ``loss.sum()`` with respect to ``log_probs``, whatever the
            estimate's own derivative is: ``weight * coefficient`` of a term as_loss, and of one in
            the reward what a host makes of it, ``sum_{s>=t} c_s``.
        loss: differentiable; its value is ``value``, its gradient ``gradient``, and that of
            ``pathwise``.
        pathwise: with vocab=exact, what of ``loss`` goes through ``exact_kl`` instead: 0, with the
            gradient ``weight * grad exact_kl``; otherwise ``None``. Of an own token it is all.
        tally: sums and maxima over the counted tokens, which merge over micro-batches and ranks.
        metrics: 0-d tensors by name, of the moment of the call; see ``Tally.metrics``.

    For a sum of terms ``value`` and ``gradient`` are the sums of the parts', ``coefficient`` is the
    sum of their ``weight * coefficient``, and ``weight`` is 1.
    """

    def __init__(
        self,
        spec: KLSpec,
        acting: Acting,
        seen: Callable[[], list[Seen]],
        batch: Batch,
        parts: tuple[KLTerm, ...] = (),
    ) -> None:
        self.spec = spec
        self._acting, self._seen, self._batch, self._parts = acting, seen, batch, parts
        self._made: dict[str, Any] = {}

    @property
    def parts(self) -> tuple[KLTerm, ...]:
        return (self,) if len(self.spec.terms) == 1 else self._parts

    @property
    def value(self) -> Tensor:
        return self._once("value", lambda: self._acting.value.clone())

    @property
    def coefficient(self) -> Tensor:
        return self._once("coefficient", lambda: self._acting.coefficient.clone())

    @property
    def weight(self) -> Tensor:
        return self._once("weight", lambda: self._acting.weight_or_one.clone())

    @property
    def gradient(self) -> Tensor:
        return self._once("gradient", lambda: self._acting.gradient().clone())

    @property
    def pathwise(self) -> Tensor | None:
        return self._acting.pathwise

    @property
    def loss(self) -> Tensor:
        acting = self._acting
        return self._once("loss", lambda: self.with_gradient(acting.value, acting.gradient()))

    def with_gradient(self, value: Tensor, gradient: Tensor) -> Tensor:
        """``value``, differentiable by the term's ``log_probs``: its derivative is ``gradient``.

        Raises:
            RuntimeError: ``log_probs`` had no gradient when the term was made.
        """
        pathwise = self._acting.pathwise
        if self.spec.terms and not self._batch.differentiable and pathwise is None:
            raise RuntimeError(
                f"the loss of kl_type {str(self.spec)!r} would have no gradient: kl_term was "
                "called under no_grad, or with log_probs that need none. To measure, read value"
            )
        # It may be asked for under no_grad: what counts is how kl_term was called.
        with torch.enable_grad():
            loss = with_gradient(self._batch.given, value, gradient)
            return loss if pathwise is None else loss + pathwise

    @property
    def tally(self) -> Tally:
        return self._once("tally", self._tally)

    @property
    def metrics(self) -> dict[str, Tensor]:
        return self._once("metrics", lambda: self.tally.metrics())

    def _tally(self) -> Tally:
        seen = self._seen()
        if len(self.spec.terms) == 1:
            (part,) = seen
            if self.spec.terms[0].reference == "ref":  # it is the whole, under plain names
                return tally([dataclasses.replace(part, name="")])
            whole = _seen_whole(self._batch, part.gradient, part.principled, dict(part.inputs))
            seen = [whole, part]
        return tally(seen)

    def _once(self, name: str, make: Callable[[], Made]) -> Made:
        # Not functools.cached_property: its lock, on Python 3.11, stops torch.compile.
        if name not in self._made:
            self._made[name] = make()
        return cast(Made, self._made[name])

    def __repr__(self) -> str:
        return f"KLTerm({str(self.spec)!r}, shape={tuple(self._acting.value.shape)})"

    def __getstate__(self) -> dict[str, Any]:
        """All that it computes, and no graph: a loss that was pickled has no gradient."""
        made = {name: getattr(self, name) for name in _PICKLED}
        return {"spec": self.spec, "made": made, "parts": self._parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        made = state["made"]
        value, gradient = made["value"], made["gradient"]
        self.spec, self._parts, self._made = state["spec"], state["parts"], dict(made)
        self._acting = Acting(value, made["coefficient"], made["weight"], lambda: gradient)
        self._batch = Batch.measured(value)
        self._seen = list


_PICKLED = ("value", "coefficient", "weight", "gradient", "tally", "metrics")


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
    segment_ids: Tensor | None = None,
    exact_kl: Tensor | None = None,
) -> KLTerm:
    """The KL term that ``spec`` names, per token: ``KL(pi_theta || pi_ref)``, in nats per token.

    With ``lr = log_probs - ref_log_probs``, the gradient of ``KLTerm.loss`` is
    ``w * c * grad log_probs``, c being the estimator's value (``in_reward``) or derivative
    (``as_loss``) at ``lr``, detached, and w the importance weight, detached. Whose gradient that
    is, in expectation over samples, ``kl_types()`` says for each name. Samples come from pi_theta,
    or from the policy that ``ratio`` names.

    Work is done in float32 at least; float64 stays. Nothing is clamped but by ``cap`` and
    ``bound``, and exponents at the dtype's maximum (``klplug/overflow_share``). A counted token
    with a nan or an infinite number in one of its tensors leaves the KL, and its ratio with it, as
    if it were masked (``klplug/nonfinite_share``); where only pi/ref is infinite, an estimator that
    is finite there (js, tv, hellinger, forward) or is bounded has its limit.

    Args:
        spec: a ``kl_type`` string or its ``KLSpec``.
        log_probs: (B, T), log pi_theta of the sampled tokens, nats; carries the gradient.
        ref_log_probs: (B, T), log pi_ref of the same tokens. May be ``None`` for ``none`` and
            ``reference=rollout``; if given there, the metrics have the KL to it too.
        response_mask: (B, T), nonzero where a token counts. Elsewhere the other tensors may hold
            anything, nan and inf too. A mask of zeros gives a zero term, and a row of zeros is no
            answer.
        old_log_probs: (B, T), the trainer's recomputation at the start of the step; for ratio=old
            and the heads.
        rollout_log_probs: (B, T), the sampler's own; for ratio=rollout.
        advantages: (B, T), for head=combined: its clip looks at advantage and KL together.
        kl_coef: beta, for head=combined likewise.
        clip_range: PPO's, for the heads: epsilon, or (low, high).
        group_ids: B of them, for baseline=group: answers to one prompt alike. An answer alone has
            a baseline of 0.
        return_baseline: (B, T), used as the baseline instead of one from this batch, for batches
            that cut groups: ``klplug.kl_return_baseline`` of the whole one.
        segment_ids: (B, T) integers, for packed rows: which answer of its row a token belongs to,
            answers side by side; anything where masked. Without it a row is one answer.
        exact_kl: (B, T), for vocab=exact: the ``kl`` of ``klplug.exact_kl`` with the divergence of
            that name, at the same tokens; carries the gradient of the policy.

    Raises:
        ValueError: an input that the formulation needs is missing, has another shape, dtype or
            device, or a baseline over packed rows, which ``return_baseline`` alone can have; or
            ``exact_kl`` carries no gradient where ``log_probs`` does.
        TypeError: an input that is no tensor.

    Source: arXiv 2510.01555 for one token; ``tests/core/test_oracle.py`` proves whose gradient each
    formulation has on answers of many tokens.
    """
    spec = parse(spec)
    tensors = {
        "ref_log_probs": ref_log_probs,
        "old_log_probs": old_log_probs,
        "rollout_log_probs": rollout_log_probs,
        "advantages": advantages,
        "return_baseline": return_baseline,
        "exact_kl": exact_kl,
    }
    options = {"kl_coef": kl_coef, "clip_range": clip_range, "group_ids": group_ids}
    _check(spec, log_probs, response_mask, tensors, options, segment_ids)
    clip = None if clip_range is None else low_and_high(clip_range)
    batch = Batch.of(spec, log_probs, response_mask, tensors, segment_ids)
    if not spec.terms:
        return _nothing(spec, batch)
    terms = [
        _over_the_vocabulary(term, batch, exact_kl)
        if term.vocab == "exact" and exact_kl is not None
        else _single(term, batch, kl_coef, clip, group_ids)
        for term in spec.terms
    ]
    return terms[0] if len(terms) == 1 else _sum(spec, terms, batch)


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
    tensors: dict[str, Tensor | None] = {reference: ref_log_probs}
    # The step's own inputs, ratio and heads, are not needed for it.
    required = (reference, *(("group_ids",) if term.baseline == "group" else ()))
    _check(spec, log_probs, response_mask, tensors, {"group_ids": group_ids}, None, required)
    batch = Batch.of(spec, log_probs, response_mask, tensors, None)
    estimate = _estimate(term, batch)
    returns = _returns(estimate, batch)
    return others_mean(returns, _groups(term, group_ids), estimate.mask.any(-1))


def reward_to_go(x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """``sum_{s>=t} x_s`` along the last dimension, of packed rows within each answer."""
    mask = torch.ones_like(x, dtype=torch.bool)
    return Answers.of(segment_ids, mask).to_go(x)


@dataclass
class Batch:
    """The tensors of one call, in the dtype of the work.

    Attributes:
        given: ``log_probs`` as they came; all others are detached.
        differentiable: whether a loss made of them has a gradient.
        counted: (B, T) bool, the tokens that the caller counts.
        mask: those of them whose weights and advantages are numbers.
        others: by name.
        answers: of packed rows.
    """

    given: Tensor
    differentiable: bool
    log_probs: Tensor
    counted: Tensor
    mask: Tensor
    others: dict[str, Tensor]
    answers: Answers

    @classmethod
    def of(
        cls,
        spec: KLSpec,
        log_probs: Tensor,
        response_mask: Tensor,
        tensors: dict[str, Tensor | None],
        segment_ids: Tensor | None,
    ) -> Batch:
        dtype = torch.promote_types(log_probs.dtype, torch.float32)
        others, detached = {}, log_probs.detach()
        for name, tensor in tensors.items():
            if tensor is not None and name in (*spec.requires, "return_baseline", "ref_log_probs"):
                others[name] = tensor.detach()
                if name != "ref_log_probs" or name in spec.requires:
                    dtype = torch.promote_types(dtype, tensor.dtype)
        counted = response_mask != 0
        answers = Answers.of(segment_ids, counted)
        differentiable = torch.is_grad_enabled() and log_probs.requires_grad
        given = log_probs if differentiable else detached
        batch = cls(given, differentiable, detached.to(dtype), counted, counted, others, answers)
        batch.mask = batch._usable(spec)
        return batch

    @classmethod
    def measured(cls, value: Tensor) -> Batch:
        """What a term has that came without its tensors: no gradient."""
        return cls(value, False, value, value != 0, value != 0, {}, Answers())

    def _usable(self, spec: KLSpec) -> Tensor:
        """The counted tokens at which every tensor but a reference is a number."""
        behaviours = {f"{policy_of(term)}_log_probs" for term in spec.terms if policy_of(term)}
        numbers = [self.log_ratio(name) for name in sorted(behaviours & set(self.others))]
        numbers += [
            self.others[n]
            for n in ("advantages", "return_baseline", "exact_kl")
            if n in self.others
        ]
        references = {f"{term.reference}_log_probs" for term in spec.terms}
        if len(references) > 1:  # the token leaves all terms of a sum
            numbers += [self.log_ratio(name) for name in sorted(references)]
        if not numbers:
            return self.counted
        together = numbers[0]
        for number in numbers[1:]:
            together = together + number  # no number as soon as one of them is none
        return self.counted & (together.abs() < math.inf)

    def log_ratio(self, other: str) -> Tensor:
        """``log_probs`` less another policy's; anything where masked."""
        return self.log_probs - self.others[other]

    def masked(self, name: str) -> Tensor:
        return masked(self.others[name].to(self.log_probs.dtype), self.mask)


def policy_of(term: TermSpec) -> str | None:
    """The policy that a term's weight corrects for: ``old``, ``rollout`` or none."""
    if term.head in ("combined", "clipped"):
        return "old"
    return term.ratio if term.ratio in ("old", "rollout") else None


class _WithGradient(torch.autograd.Function):
    """``value``, with ``derivative`` as its derivative with respect to ``log_probs``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(log_probs: Tensor, value: Tensor, derivative: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        log_probs, _, derivative = inputs
        ctx.save_for_backward(derivative)
        ctx.dtype = log_probs.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        gradient = gradients[0] * derivative
        if gradient.dtype != ctx.dtype:  # whose largest number may be less
            limit = torch.finfo(ctx.dtype).max
            gradient = gradient.clamp(-limit, limit).to(ctx.dtype)
        return gradient, None, None


def with_gradient(log_probs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value``, differentiable: its derivative by ``log_probs`` is ``gradient``."""
    return cast(Tensor, _WithGradient.apply(log_probs, value, gradient))  # type: ignore[no-untyped-call]


# ── What a term does to each token: c, w, and the gradient, by head and horizon ──────────────────


@dataclass(frozen=True)
class Estimate:
    """The estimate and its coefficients, each zero where masked.

    Attributes:
        mask: the tokens that are in the KL.
        log_ratio: of those that are numbers.
        numbers: the tokens whose log-ratio, too, is a number.
        own: each token's own c.
        later: what it adds to the coefficients of the tokens before it, in its answer.
    """

    mask: Tensor
    log_ratio: Tensor
    numbers: Tensor
    value: Tensor
    own: Tensor
    later: Tensor


@dataclass(frozen=True)
class Acting:
    """What acts on each token: c, w (``None`` where it is 1), and the gradient."""

    value: Tensor
    coefficient: Tensor
    weight: Tensor | None
    gradient: Callable[[], Tensor]
    mask: Tensor | None = None
    pathwise: Tensor | None = None

    @property
    def weight_or_one(self) -> Tensor:
        if self.weight is not None:
            return self.weight
        return torch.ones_like(self.value) if self.mask is None else self.mask.to(self.value.dtype)


def _single(
    spec: TermSpec,
    batch: Batch,
    kl_coef: float | Tensor | None,
    clip: tuple[float, float] | None,
    group_ids: Groups,
) -> KLTerm:
    estimate = _estimate(spec, batch)
    importance = _importance(spec, batch, estimate.mask)
    if spec.placement == "in_reward":
        acting = _in_the_reward(spec, batch, estimate, group_ids)
    elif spec.head != "separate":
        assert importance is not None and clip is not None
        acting, importance = _under_a_head(spec, batch, estimate, importance, clip, kl_coef)
    else:
        weight = None if importance is None else importance.weight
        if spec.horizon == "token":
            acting = _own_token(estimate, weight)
        else:
            acting = _whole_answer(spec, batch, estimate, weight, group_ids)

    def seen() -> list[Seen]:
        return [_seen(spec, batch, estimate, acting, importance)]

    return KLTerm(spec, acting, seen, batch)


def _over_the_vocabulary(spec: TermSpec, batch: Batch, exact_kl: Tensor) -> KLTerm:
    """``Q_t grad D_t``, and over whole answers ``s_t sum_{s>t} Q_s D_s`` too (LOC, FULL).

    D is the exact KL, Q the weight of the tokens before: the expectation over a token is in its D,
    so neither ``grad D_t`` nor a later token's ``D_s`` needs that token's own ratio.
    """
    log_ratio = batch.log_ratio(f"{spec.reference}_log_probs")
    mask = batch.mask & (log_ratio.abs() < math.inf)
    log_ratio = masked_(log_ratio, mask)
    value = masked(batch.others["exact_kl"].to(log_ratio.dtype), mask)
    importance = _importance(spec, batch, mask)
    weight = before = None if importance is None else importance.weight
    gradient = coefficient = torch.zeros_like(value)
    if spec.horizon == "sequence":
        to_go = batch.answers.to_go(value if before is None else finite_(before * value))
        gradient = coefficient = masked_(finite_(batch.answers.after(to_go)), mask)
        if before is not None:
            # A token whose own weight is 0 (dropped by mode=mask) still answers for later ones.
            weight = torch.where(before > 0, before, mask.to(before.dtype))
            coefficient = masked_(finite_(gradient / weight), mask)
    pathwise = None
    if exact_kl.requires_grad and torch.is_grad_enabled():
        own = exact_kl.where(mask, 0.0)
        pathwise = (own - own.detach()) * (1.0 if before is None else before)

    def seen() -> list[Seen]:
        return [
            Seen(
                name=str(spec).translate(_IN_A_KEY) + "/",
                counted=batch.counted,
                numbers=mask,
                log_ratio=log_ratio,
                coefficient=None,
                gradient=gradient,
                principled=gradient,
                exact=value,
                weight=before,
                capped=None if importance is None else importance.capped(),
                inputs=_inputs(spec, batch),
            )
        ]

    acting = Acting(value, coefficient, weight, lambda: gradient, mask, pathwise)
    return KLTerm(spec, acting, seen, batch)


def _own_token(estimate: Estimate, weight: Tensor | None) -> Acting:
    """``w_t c_t``: prefixes held fixed (LOC)."""
    own = estimate.own
    gradient = own if weight is None else finite_(weight * own)
    return Acting(estimate.value, own, weight, lambda: gradient, estimate.mask)


def _whole_answer(
    spec: TermSpec, batch: Batch, estimate: Estimate, weight: Tensor | None, group_ids: Groups
) -> Acting:
    """``w_t c_t + sum_{s>t} w_s v_s``, less ``w_t`` times the baseline (FULL).

    v is what a token adds to those before it, c itself for k2. With a weight of the whole answer
    all w are one; with the prefixes' this is the per-decision form. The ``coefficient`` is that
    sum over ``w_t``, so that weight times coefficient is the gradient here too.
    """
    gradient = _returns(estimate, batch, weight)
    if spec.baseline != "none":
        compared = _baseline(spec, batch, estimate, gradient, group_ids)
        gradient = gradient - (compared if weight is None else weight * compared)
    gradient = masked_(finite_(gradient), estimate.mask)
    if weight is None:
        return Acting(estimate.value, gradient, None, lambda: gradient, estimate.mask)
    # A token whose own weight is 0 (dropped by mode=mask) still answers for later ones.
    weight = torch.where(weight > 0, weight, estimate.mask.to(weight.dtype))
    coefficient = masked_(finite_(gradient / weight), estimate.mask)
    return Acting(estimate.value, coefficient, weight, lambda: gradient)


def _in_the_reward(spec: TermSpec, batch: Batch, estimate: Estimate, group_ids: Groups) -> Acting:
    """``c_t``, which a host credits to this token and all before it: ``sum_{s>=t} c_s`` (FULL)."""
    coefficient = estimate.own
    if spec.baseline != "none":
        compared = _baseline(spec, batch, estimate, _returns(estimate, batch), group_ids)
        credited = _credited(compared, estimate.mask, batch.answers)
        coefficient = finite_(coefficient - credited)

    def gradient() -> Tensor:
        return masked_(finite_(batch.answers.to_go(coefficient)), estimate.mask)

    return Acting(estimate.value, coefficient, None, gradient, estimate.mask)


def _under_a_head(
    spec: TermSpec,
    batch: Batch,
    estimate: Estimate,
    ratio: ImportanceWeight,
    clip: tuple[float, float],
    kl_coef: float | Tensor | None,
) -> tuple[Acting, ImportanceWeight]:
    """``rho_t c_t``, and 0 where PPO's clip drops it; over whole answers c_t is the sum to go."""
    coefficient = estimate.own
    if spec.horizon == "sequence":
        coefficient = masked_(_returns(estimate, batch), estimate.mask)
    slope = coefficient
    if spec.head == "combined":
        assert kl_coef is not None
        slope = kl_coef * coefficient - batch.masked("advantages")
    importance = clipped_weight(ratio, slope, clip)
    gradient = finite_(importance.weight * coefficient)
    return Acting(estimate.value, coefficient, importance.weight, lambda: gradient), importance


def _estimate(spec: TermSpec, batch: Batch) -> Estimate:
    row, bounded = spec.definition, not math.isinf(spec.bound)
    coefficient = row.role(spec.placement).coefficient
    log_ratio = batch.log_ratio(f"{spec.reference}_log_probs")
    numbers = batch.mask & (log_ratio.abs() < math.inf)
    mask = numbers
    if row.has_limit or bounded:
        # An infinite pi/ref as the largest number: the term stays where it is finite there.
        of_policy = batch.mask & (batch.log_probs.abs() < math.inf) & ~log_ratio.isnan()
        log_ratio = masked_(finite(log_ratio), of_policy)
        own, value = coefficient(log_ratio), row.value(log_ratio)
        if bounded:
            own = own.clamp(-spec.bound, spec.bound)
        held = own.abs() if bounded else torch.maximum(own.abs(), value.abs())
        mask = of_policy & (numbers | (held < HUGE))
        own = masked(own, mask)
        value = masked(value, mask & (numbers | (value.abs() < HUGE)))
        log_ratio, limits = masked(log_ratio, numbers), masked(log_ratio, mask)
    else:
        log_ratio = limits = masked_(log_ratio, mask)
        own = coefficient(log_ratio)
        if coefficient is row.value:
            value = own
        elif row.value_of_derivative is not None:
            value = row.value_of_derivative(log_ratio, own)
        else:
            value = row.value(log_ratio)
        if spec.estimator == "k1" and spec.placement == "as_loss":
            own = masked_(own, mask)  # the one coefficient that is not 0 where lr is
    later = own
    if spec.placement == "as_loss" and spec.horizon == "sequence":
        if row.of_answer is not None:
            own = masked_(row.of_answer(batch.answers.so_far(limits)), mask)
            later = torch.zeros_like(own)
        elif row.later is not None and row.later is not coefficient:
            later = value if row.later is row.value else masked_(row.later(limits), mask)
    return Estimate(mask, log_ratio, numbers, value, own, later)


def _importance(spec: TermSpec, batch: Batch, mask: Tensor) -> ImportanceWeight | None:
    policy = policy_of(spec)
    if policy is None:
        return None
    # The heads have none of these options: theirs is the policy loss's own ratio.
    return importance_weight(
        batch.log_ratio(f"{policy}_log_probs"),
        mask,
        level=spec.level or "token",
        cap=math.inf if spec.cap is None else spec.cap,
        mode=spec.mode or "truncate",
        answers=batch.answers,
        own=spec.vocab == "sample",
    )


def _returns(estimate: Estimate, batch: Batch, weight: Tensor | None = None) -> Tensor:
    """A token's own coefficient and all that later ones add to it, each under its weight."""
    own, later = estimate.own, estimate.later
    added = later if weight is None else finite_(weight * later)
    returns = batch.answers.to_go(added)
    if own is not later:
        returns = returns - added + (own if weight is None else finite_(weight * own))
    return finite_(returns)


def _groups(spec: TermSpec, group_ids: Groups) -> Groups:
    return None if spec.baseline == "batch" else group_ids


def _baseline(
    spec: TermSpec, batch: Batch, estimate: Estimate, returns: Tensor, group_ids: Groups
) -> Tensor:
    if "return_baseline" in batch.others:
        return batch.masked("return_baseline")
    return others_mean(returns, _groups(spec, group_ids), estimate.mask.any(-1))


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


# ── What the metrics are made of ─────────────────────────────────────────────────────────────────


_IN_A_KEY = str.maketrans({",": ".", "=": "-"})


def _seen(
    spec: TermSpec,
    batch: Batch,
    estimate: Estimate,
    acting: Acting,
    importance: ImportanceWeight | None,
) -> Seen:
    log_ratio, gradient = estimate.log_ratio, acting.gradient()
    bounded = None
    if not math.isinf(spec.bound):
        unbounded = spec.definition.role(spec.placement).coefficient(log_ratio)
        bounded = flags(torch.gt, unbounded.abs(), spec.bound)
    own_token = spec.placement == "as_loss" and spec.horizon == "token"
    return Seen(
        name=str(spec).translate(_IN_A_KEY) + "/",
        counted=batch.counted,
        numbers=estimate.numbers,
        log_ratio=log_ratio,
        # Over whole answers the weights are inside the sum: what competes with an advantage is it.
        coefficient=acting.coefficient if own_token else gradient,
        gradient=gradient,
        principled=_principled(spec, batch, estimate, acting, importance, gradient),
        k3=estimate.value if spec.estimator == "k3" else None,
        weight=None if importance is None else importance.weight,
        capped=None if importance is None else importance.capped(),
        bounded=bounded,
        inputs=_inputs(spec, batch),
    )


def _principled(
    spec: TermSpec,
    batch: Batch,
    estimate: Estimate,
    acting: Acting,
    importance: ImportanceWeight | None,
    gradient: Tensor,
) -> Tensor:
    """The gradient that the same formulation has with c = lr and no baseline."""
    log_ratio = estimate.log_ratio
    weight = None if importance is None else importance.weight
    if spec.placement == "as_loss" and spec.horizon == "token":
        if estimate.own is log_ratio:
            return gradient
        return log_ratio if weight is None else finite_(weight * log_ratio)
    if estimate.own is log_ratio and spec.baseline == "none":
        return gradient
    if spec.head == "separate" and spec.placement == "as_loss" and weight is not None:
        to_go = batch.answers.to_go(finite_(weight * log_ratio))
    else:
        to_go = batch.answers.to_go(log_ratio)
        to_go = to_go if weight is None else weight * to_go
    return masked_(finite_(to_go), estimate.mask)


def _inputs(spec: TermSpec, batch: Batch) -> dict[str, Tensor]:
    """By name, the tensors that may have numbers that are none."""
    names = [n for n in batch.others if n in (*spec.requires, "return_baseline")]
    return {"log_probs": batch.log_probs, **{name: batch.others[name] for name in names}}


def _sum(spec: KLSpec, terms: list[KLTerm], batch: Batch) -> KLTerm:
    # In one order whatever was written: the same sum, the same numbers.
    terms = sorted(terms, key=lambda term: str(term.spec))
    zero = torch.zeros_like(batch.log_probs)
    acting = [term._acting for term in terms]
    value = finite(sum((a.value for a in acting), zero))
    own = (a.coefficient if a.weight is None else a.weight * a.coefficient for a in acting)
    coefficient = finite(sum(own, zero))
    paths = [a.pathwise for a in acting if a.pathwise is not None]
    pathwise = torch.stack(paths).sum(0) if paths else None

    def gradient() -> Tensor:
        return finite(sum((a.gradient() for a in acting), zero))

    def seen() -> list[Seen]:
        parts = [part for term in terms for part in term._seen()]
        principled = finite(sum((part.principled for part in parts), zero))
        inputs = {name: tensor for part in parts for name, tensor in part.inputs.items()}
        whole = _seen_whole(batch, gradient(), principled, inputs)
        exact = next((part.exact for part in parts if part.exact is not None), None)
        if exact is not None:  # the sampled tokens' coefficients are not the whole of it
            whole = dataclasses.replace(whole, coefficient=None, exact=exact)
        return [whole, *parts]

    together = Acting(value, coefficient, None, gradient, batch.mask, pathwise)
    return KLTerm(spec, together, seen, batch, tuple(terms))


def _seen_whole(
    batch: Batch, gradient: Tensor, principled: Tensor, inputs: dict[str, Tensor]
) -> Seen:
    """What a sum does as a whole, and the KL to ref, where there is one."""
    numbers, log_ratio = batch.mask, None
    if "ref_log_probs" in batch.others:
        log_ratio = batch.log_ratio("ref_log_probs")
        numbers = numbers & (log_ratio.abs() < math.inf)
        log_ratio = masked_(log_ratio, numbers)
    return Seen(
        name="",
        counted=batch.counted,
        numbers=numbers,
        log_ratio=log_ratio,
        coefficient=gradient,
        gradient=gradient,
        principled=principled,
        inputs=inputs,
    )


def _nothing(spec: KLSpec, batch: Batch) -> KLTerm:
    zero, none = torch.zeros_like(batch.log_probs), torch.zeros_like(batch.log_probs)

    def seen() -> list[Seen]:
        return [_seen_whole(batch, zero, zero, {})]

    return KLTerm(spec, Acting(zero, zero, None, lambda: none, batch.mask), seen, batch)


def low_and_high(clip_range: ClipRange) -> tuple[float, float]:
    """PPO's range (low, high), of epsilon or of the two."""
    pair = clip_range if isinstance(clip_range, Sequence) else (clip_range, clip_range)
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in pair)
    if len(pair) != 2 or not numbers or not all(0 <= x < math.inf for x in pair):
        raise ValueError(f"clip_range={clip_range!r} must be epsilon or (low, high), none negative")
    low, high = pair
    return float(low), float(high)


def _check(
    spec: KLSpec,
    log_probs: Tensor,
    response_mask: Tensor,
    tensors: dict[str, Tensor | None],
    options: dict[str, Any],
    segment_ids: Tensor | None,
    required: tuple[str, ...] | None = None,
) -> None:
    heads = [term.head for term in spec.terms]
    needed = spec.requires if required is None else required
    if required is None and "combined" in heads:
        needed = (*needed, "clip_range", "kl_coef")
    elif required is None and "clipped" in heads:
        needed = (*needed, "clip_range")
    for name in needed:
        instead = tensors.get("return_baseline" if name == "group_ids" else name)
        if instead is None and options.get(name) is None:
            raise ValueError(f"kl_type {str(spec)!r} needs {name}, which is missing")
    always = {"log_probs": log_probs, "response_mask": response_mask}
    given: dict[str, Any] = {**always, **tensors, "segment_ids": segment_ids}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in always):
            kind = "None" if tensor is None else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of shape (B, T), got {kind}")
    shape = log_probs.shape
    if log_probs.dim() != 2 or not log_probs.is_floating_point():
        raise ValueError(
            "log_probs must be a floating-point tensor of shape (B, T), got "
            f"{tuple(shape)} of {log_probs.dtype}"
        )
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, log_probs has {tuple(shape)}: "
                "all tensors must be (B, T), response tokens only"
            )
        if tensor.device != log_probs.device:
            raise ValueError(f"{name} is on {tensor.device}, log_probs is on {log_probs.device}")
        if name in tensors and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
        if name == "segment_ids" and (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"segment_ids must be integers, got {tensor.dtype}")
    _check_exact(spec, log_probs, tensors.get("exact_kl"))
    compared = [term for term in spec.terms if term.baseline in ("batch", "group")]
    if segment_ids is not None and compared and tensors.get("return_baseline") is None:
        raise ValueError(
            f"kl_type {str(compared[0])!r}: a baseline over packed rows can't be made here, for "
            "group_ids is of rows. Hand in return_baseline"
        )


def _check_exact(spec: KLSpec, log_probs: Tensor, exact_kl: Tensor | None) -> None:
    over = {(term.estimator, term.alpha) for term in spec.terms if term.vocab == "exact"}
    if len(over) > 1:
        raise ValueError(
            f"kl_type {str(spec)!r} has several divergences over the vocabulary, and exact_kl is "
            "of one divergence: use kl_term for each, and add the losses"
        )
    if not over or exact_kl is None or not torch.is_grad_enabled():
        return
    if log_probs.requires_grad and not exact_kl.requires_grad:
        raise ValueError(
            f"kl_type {str(spec)!r}: exact_kl carries no gradient, so the term would do "
            "nothing: hand in the kl of klplug.exact_kl as it is"
        )
