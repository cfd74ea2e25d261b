"""``kl_term``: one KL term of a training step, per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from klplug.answers import Answers
from klplug.batch import Batch, ClipRange, Given, Groups, needed_by
from klplug.gradients import (
    Acting,
    acting,
    baseline,
    estimate_of,
    inside_the_policy_loss,
    returns,
    sum_of,
)
from klplug.seen import Part, seen_of
from klplug.spec import KLSpec, parse
from klplug.tally import Tally, tally

Made = TypeVar("Made")


class KLTerm:
    """A KL term per token; every tensor is (B, T) and exactly zero where masked.

    Aggregate it once, as the policy loss is aggregated (``klplug.aggregate`` where there is no
    host), and multiply by ``kl_coef``. The term is a penalty: it is *added* to a loss, and
    ``coefficient`` is *subtracted* from a reward. What it hands out is the reader's own: to change
    it in place changes neither the others nor the metrics. ``loss`` alone has the memory of the
    estimate, and autograd refuses to change it in place.

    Attributes:
        spec: what it is a term of.
        parts: the terms of a sum, and of ``none`` none; a single term is its own only part.
        value: detached, unweighted estimate of the KL by the named estimator, nats per token.
        coefficient: detached c; for ``in_reward`` the number to join to each token's reward.
        weight: detached w; 1 where there is no ratio, and over whole answers where w is 0 and the
            token still answers for later ones.
        gradient: detached, that of ``loss.sum()`` with respect to ``log_probs``, whatever the
            estimate's own derivative is: ``weight * coefficient`` of a term as_loss, and of one in
            the reward what a host makes of it, ``sum_{s>=t} c_s``.
        loss: differentiable; its value is ``value``, its gradient ``gradient``, and that of
            ``pathwise``.
        pathwise: with vocab=exact or topk, what of ``loss`` goes through ``exact_kl`` instead: 0,
            with the gradient ``weight * grad exact_kl``; otherwise ``None``. Of an own token it is
            all.
        tally: sums and maxima over the counted tokens, which merge over micro-batches and ranks.
        metrics: 0-d tensors by name, of the moment of the call; see ``Tally.metrics``. Which tensor
            had a number that is none is seen when they are asked for.

    For a sum of terms ``value`` and ``gradient`` are the sums of the parts', ``coefficient`` is the
    sum of their ``weight * coefficient``, and ``weight`` is 1.
    """

    def __init__(
        self,
        spec: KLSpec,
        log_probs: Tensor,
        acting: Acting,
        tally: Callable[[], Tally],
        parts: tuple[KLTerm, ...] = (),
    ) -> None:
        self.spec = spec
        self._log_probs, self._acting, self._tally, self._parts = log_probs, acting, tally, parts
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
            RuntimeError: ``log_probs`` had no gradient when the term was made, and the term acts
                through them.
        """
        pathwise = self._acting.pathwise
        scored = any(not t.over_vocabulary or t.horizon == "sequence" for t in self.spec.terms)
        if (scored or pathwise is None) and self.spec.terms and not self._log_probs.requires_grad:
            what = "no gradient" if pathwise is None else "the gradient of exact_kl alone"
            raise RuntimeError(
                f"the loss of kl_type {str(self.spec)!r} would have {what}: kl_term was called "
                "under no_grad, or with log_probs that need none. To measure, read value"
            )
        # It may be asked for under no_grad: what counts is how kl_term was called.
        with torch.enable_grad():
            loss = with_gradient(self._log_probs, value, gradient)
            return loss if pathwise is None else loss + pathwise

    @property
    def tally(self) -> Tally:
        return self._once("tally", self._tally)

    @property
    def metrics(self) -> dict[str, Tensor]:
        return self._once("metrics", lambda: self.tally.metrics())

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
        value, gradient, weight = made["value"], made["gradient"], made["weight"]
        self.spec, self._parts, self._made = state["spec"], state["parts"], dict(made)
        self._log_probs, self._tally = value, lambda: made["tally"]
        self._acting = Acting(weight != 0, value, made["coefficient"], lambda: gradient, weight)


_PICKLED = ("value", "coefficient", "weight", "gradient", "tally", "metrics")


def kl_term(
    spec: str | KLSpec,
    log_probs: Tensor,
    ref_log_probs: Tensor | None,
    response_mask: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    posterior_log_probs: Tensor | None = None,
    advantages: Tensor | None = None,
    kl_coef: float | Tensor | None = None,
    clip_range: ClipRange | None = None,
    group_ids: Groups = None,
    return_baseline: Tensor | None = None,
    segment_ids: Tensor | None = None,
    exact_kl: Tensor | None = None,
    sample_weights: Mapping[str, Tensor] | None = None,
) -> KLTerm:
    """The KL term that ``spec`` names, per token: ``KL(pi_theta || pi_ref)``, in nats per token.

    With ``x = log_probs - ref_log_probs``, the gradient of ``KLTerm.loss`` is
    ``w * c * grad log_probs``, c being the estimator's value (``in_reward``) or derivative
    (``as_loss``) at ``x``, detached, and w the importance weight, detached. Whose gradient that
    is, in expectation over samples, ``kl_types()`` says for each name. Samples come from pi_theta,
    or from the policy that ``ratio`` names.

    Work is done in float32 at least; float64 stays. Nothing is clamped but by ``cap`` and
    ``bound``, and exponents at the dtype's maximum (``klplug/overflow_share``; not those within
    ``exact_kl``). A counted token with a nan or an infinite number in one of its tensors
    leaves the KL, and its ratio with it, as if it were masked (``klplug/nonfinite_share``); where
    only pi/ref is infinite, an estimator that is finite there (js, tv, hellinger, forward, alpha
    below 1) or is bounded has its limit.

    Args:
        spec: a ``kl_type`` string or its ``KLSpec``.
        log_probs: (B, T), log pi_theta of the sampled tokens, nats; carries the gradient.
        ref_log_probs: (B, T), log pi_ref of the same tokens. May be ``None`` where
            no term is to it; if given there, the metrics have the KL to it too.
        response_mask: (B, T), nonzero where a token counts. Elsewhere the other tensors may hold
            anything, nan and inf too. A mask of zeros gives a zero term, and a row of zeros is no
            answer.
        old_log_probs: (B, T), the trainer's recomputation at the start of the step; for ratio=old
            and the heads.
        rollout_log_probs: (B, T), the sampler's own; for ratio=rollout.
        teacher_log_probs: (B, T), of a second frozen model; for reference=teacher.
        posterior_log_probs: (B, T), for reference=posterior: of ``klplug.posterior_log_probs``.
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
            that name, at the same tokens; carries the gradient of the policy. For vocab=topk:K
            that of ``klplug.topk_kl``.
        sample_weights: by what ``weight=`` names, (B, T) each, of ``klplug.sample_weights``, which
            checks that they are finite and not negative; detached.

    Raises:
        ValueError: an input that the formulation needs is missing, has another shape, dtype or
            device, or a baseline over packed rows, which ``return_baseline`` alone can have; or
            ``exact_kl`` carries no gradient where ``log_probs`` does.
        TypeError: an input that is no tensor.

    Source: arXiv 2510.01555 for one token; ``tests/core/test_oracle.py`` proves whose gradient each
    formulation has on answers of many tokens.
    """
    given = Given(
        log_probs=log_probs,
        response_mask=response_mask,
        ref_log_probs=ref_log_probs,
        old_log_probs=old_log_probs,
        rollout_log_probs=rollout_log_probs,
        teacher_log_probs=teacher_log_probs,
        posterior_log_probs=posterior_log_probs,
        advantages=advantages,
        kl_coef=kl_coef,
        clip_range=clip_range,
        group_ids=group_ids,
        return_baseline=return_baseline,
        segment_ids=segment_ids,
        exact_kl=exact_kl,
        sample_weights=sample_weights,
    )
    return term_of(parse(spec), given)


def term_of(spec: KLSpec, given: Given) -> KLTerm:
    """``kl_term``, of tensors that are carried together."""
    given.check(spec, needed_by(spec))
    batch = Batch.of(spec, given)
    if "ref_log_probs" in batch.others and [t.reference for t in spec.terms] != ["ref"]:
        batch.compared("ref")  # the metrics alone may have it, and are of this moment
    differentiable = torch.is_grad_enabled() and given.log_probs.requires_grad
    log_probs = given.log_probs if differentiable else given.log_probs.detach()

    def made(spec: KLSpec, whole: Acting, of: list[Part], terms: tuple[KLTerm, ...] = ()) -> KLTerm:
        return KLTerm(spec, log_probs, whole, lambda: tally(seen_of(of, batch)), terms)

    estimates = [(term, estimate_of(term, batch)) for term in spec.terms]
    inside = inside_the_policy_loss(estimates, batch)
    parts = [Part(term, e, acting(term, batch, e, inside)) for term, e in estimates]
    terms = tuple(made(part.spec, part.acting, [part]) for part in parts)
    if len(terms) == 1:
        return terms[0]
    return made(spec, sum_of([part.acting for part in parts], batch), parts, terms)


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
    reference: dict[str, Any] = {f"{term.reference}_log_probs": ref_log_probs}
    given = Given(log_probs, response_mask, group_ids=group_ids, **reference)
    # The step's own inputs, ratio and heads, are not needed for it.
    given.check(spec, (*reference, *(("group_ids",) if term.baseline == "group" else ())))
    batch = Batch.of(spec, given)
    estimate = estimate_of(term, batch)
    return baseline(term, batch, estimate, returns(estimate, batch))


def reward_to_go(x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """``sum_{s>=t} x_s`` along the last dimension, of packed rows within each answer; in float32 at
    least.

    Raises:
        TypeError, ValueError: ``x`` is no tensor, or ``segment_ids`` are of another shape.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if segment_ids is not None and segment_ids.shape != x.shape:
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)}, x has {tuple(x.shape)}"
        )
    if segment_ids is not None and x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, and must be (B, T) with segment_ids")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mask = torch.ones_like(x, dtype=torch.bool)
    return Answers.of(segment_ids, mask).to_go(x)


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
