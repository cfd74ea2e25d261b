"""The KL of one micro-batch beside its policy loss: what changes the advantages, what is added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from klplug.batch import ClipRange, Given, Groups, low_and_high
from klplug.numerics import finite, masked
from klplug.spec import KLSpec, parse
from klplug.tally import Tally
from klplug.term import KLTerm, term_of, with_gradient
from klplug.weights import clipped_weight, importance_weight


@dataclass(frozen=True, eq=False)
class KLStep:
    """Where each part of a micro-batch's KL acts.

    ``head=combined`` acts inside the policy loss, through its advantages; any other term as_loss
    is added to it; a term in the reward has acted already. The value and the metrics are of all.
    With ``reference=posterior`` the reward acts through the KL, and the advantages are 0.

    Attributes:
        term: the whole KL.
    """

    term: KLTerm

    @property
    def inside(self) -> list[KLTerm]:
        return [part for part in self.term.parts if part.spec.head == "combined"]

    @property
    def beside(self) -> list[KLTerm]:
        parts = (part for part in self.term.parts if part.spec.placement == "as_loss")
        return [part for part in parts if part.spec.head != "combined"]

    @property
    def changes_advantages(self) -> bool:
        return bool(self.inside) or self.term.spec.has_the_reward

    def advantages(self, advantages: Tensor, kl_coef: float | Tensor) -> Tensor:
        """``A - kl_coef * c`` of what is inside the policy loss, (B, T)."""
        if self.term.spec.has_the_reward:
            return torch.zeros_like(advantages)
        for part in self.inside:
            advantages = advantages - finite(kl_coef * part.coefficient)
        return advantages

    @property
    def loss(self) -> Tensor:
        """What is added to the policy loss, times kl_coef: (B, T), differentiable."""
        if len(self.beside) == len(self.term.parts):
            return self.term.loss
        return self.term.with_gradient(self.value, self._gradient)

    @property
    def value(self) -> Tensor:
        """Of what is added, without a gradient: for a host that evaluates its loss."""
        zero = torch.zeros_like(self.term.value)
        return finite(sum((part.value for part in self.beside), zero))

    @property
    def reported(self) -> Tensor:
        """The same with the value of all terms, for a host that logs what it adds."""
        if len(self.beside) == len(self.term.parts):
            return self.term.loss
        return self.term.with_gradient(self.term.value, self._gradient)

    @property
    def _gradient(self) -> Tensor:
        zero = torch.zeros_like(self.term.value)
        return finite(sum((part.gradient for part in self.beside), zero))

    @property
    def tally(self) -> Tally:
        return self.term.tally


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
    teacher_log_probs: Tensor | None = None,
    posterior_log_probs: Tensor | None = None,
    group_ids: Groups = None,
    return_baseline: Tensor | None = None,
    segment_ids: Tensor | None = None,
    exact_kl: Tensor | None = None,
    sample_weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """PPO's and GRPO's clipped surrogate with its KL, per token: (B, T), differentiable.

    With ``rho = pi/old``, ``head=combined`` is ``-min(rho A', clip(rho) A')``,
    ``A' = sg(A - kl_coef * c)``: the KL inside the ratio and the clip, c at the *current* policy
    (which a KL in the reward has at the start of the step). Any other as_loss term is added to the
    surrogate of ``A`` as ``kl_coef * KLTerm.loss``; with ``reference=posterior`` it is all of the
    loss. The one difference between the heads is whose
    sign decides where the clip drops the gradient.

    Args:
        spec: terms as_loss (``k1_in_reward,head=combined`` is one), or ``none``.
        advantages: (B, T), already normalised over their groups; not differentiated.
        kl_coef: beta; not differentiated.
        clip_range: epsilon, or (low, high): the ratio is held in [1 - low, 1 + high].

    The others, and the errors, are ``kl_term``'s. Aggregate the result as the policy loss is. A
    token whose log-prob or advantage is nan or infinite is 0 in the surrogate. It is in the KL
    beside it where what that needs is a number. The metrics of ``kl_term`` count such log-probs and
    advantages only where the term needs them.

    Raises:
        ValueError: a term in the reward: it belongs to the advantages that are handed in.
        RuntimeError: ``exact_kl`` carries a gradient, and ``log_probs`` none.
    """
    spec = parse(spec)
    if any(term.placement == "in_reward" for term in spec.terms):
        raise ValueError(
            f"kl_type {str(spec)!r} is in the reward: join it to the advantages, or use "
            "'k1_in_reward,head=combined'"
        )
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
    given.check(spec, ("old_log_probs", "advantages", *(("kl_coef",) if spec.terms else ())))
    term = term_of(spec, given)
    step = KLStep(term)
    clip = low, high = low_and_high(clip_range)
    dtype = term.value.dtype
    log_ratio = log_probs.detach().to(dtype) - old_log_probs.detach()
    advantages = advantages.detach().to(dtype)
    # A token with a number that is none leaves the policy loss as it leaves the KL.
    mask = (response_mask != 0) & ((log_ratio + advantages).abs() < math.inf)
    advantages = step.advantages(masked(advantages, mask), kl_coef)
    ratio = importance_weight(log_ratio, mask, level="token", cap=math.inf, mode="truncate")
    rho, held = ratio.weight, clipped_weight(ratio, -advantages, clip).weight
    value = -torch.minimum(rho * advantages, rho.clamp(1 - low, 1 + high) * advantages)
    gradient = -held * advantages
    for part in step.beside:
        # Each held by itself: of two that saturate with other signs the sum would be no number.
        value = value + finite(kl_coef * part.value)
        gradient = gradient + finite(kl_coef * part.gradient)
    # Not by autograd, to which the gradient of a saturated exponent is no number.
    loss = with_gradient(log_probs, finite(value), finite(gradient))
    if term.pathwise is None:
        return loss
    if not log_probs.requires_grad:
        raise RuntimeError(
            f"the policy loss with kl_type {str(spec)!r} would have the gradient of exact_kl "
            "alone: log_probs need none"
        )
    return loss + kl_coef * term.pathwise
