"""Where coefficient and weight meet: ``kl_term``, one KL term of a training step."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from klplug.estimators import ESTIMATORS, k2, k3, overflows
from klplug.metrics import Tally, _total
from klplug.spec import KLSpec, parse
from klplug.weights import importance_weight


@dataclass(frozen=True)
class KLTerm:
    """A KL term per token; every tensor is (B, T) and exactly zero where masked.

    Aggregate it once, as the policy loss is aggregated (``klplug.aggregate`` where there is no
    host), and multiply by ``kl_coef``. The term is a penalty: it is *added* to a loss, and
    ``coefficient`` is *subtracted* from a reward.

    Attributes:
        loss: differentiable. Its value is the estimate, its gradient ``weight * coefficient *
            grad log_probs``: the formulation's, whatever the estimate's own derivative is.
        value: detached, unweighted estimate of KL(pi||ref) by the named estimator, nats per token.
        coefficient: detached c; for ``in_reward`` the number to join to each token's reward.
        weight: detached w; 1 where there is no ratio.

    For a sum of terms ``loss`` and ``value`` are the sums of the parts', and ``weight`` is 1.
    """

    loss: Tensor
    value: Tensor
    coefficient: Tensor
    weight: Tensor
    _mask: Tensor
    _log_ratio: Tensor
    _sampling_weight: Tensor
    _capped: Tensor
    _bounded: Tensor
    _overflowed: Tensor

    @functools.cached_property
    def tally(self) -> Tally:
        """Sums and maxima over the counted tokens, for merging over micro-batches and ranks."""
        size = self.coefficient.abs()
        # Squares and sums of these stay finite; a weight beyond 1e100 is all there is anyway.
        weight = self._sampling_weight.double().clamp(max=1e100)
        return Tally(
            sums={
                "tokens": _total(self._mask),
                "k1": _total(self._log_ratio),
                "k2": _total(k2(self._log_ratio)),
                "k3": _total(k3(self._log_ratio)),
                "coef": _total(size),
                "weight": _total(weight),
                "weight_square": _total(weight.square()),
                "capped": _total(self._capped),
                "bounded": _total(self._bounded),
                "overflow": _total(self._overflowed),
            },
            maxima={"coef": size.amax() if size.numel() else size.new_zeros(())},
        )

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
        ref_log_probs: (B, T), log pi_ref of the same tokens. May be ``None`` for ``none`` only.
        response_mask: (B, T), nonzero where a token counts. Elsewhere the other tensors may hold
            anything, nan and inf too. A mask of zeros gives a zero term.
        old_log_probs: (B, T), the trainer's recomputation at the start of the step; for ratio=old.
        rollout_log_probs: (B, T), the sampler's own; for ratio=rollout.

    Raises:
        ValueError: a tensor that the formulation needs is missing, or shapes differ.

    Source: arXiv 2510.01555 for one token; ``tests/core/test_oracle.py`` proves whose gradient each
    formulation has on answers of many tokens.
    """
    spec = parse(spec)
    supplied = {
        "ref_log_probs": ref_log_probs,
        "old_log_probs": old_log_probs,
        "rollout_log_probs": rollout_log_probs,
    }
    _check(spec, log_probs, response_mask, supplied)
    mask = response_mask != 0
    dtype = log_probs.dtype
    for tensor in supplied.values():
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    dtype = torch.promote_types(dtype, torch.float32)

    def counted(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor.to(dtype), 0.0)

    current = counted(log_probs)
    others = {
        name: counted(tensor.detach())
        for name, tensor in supplied.items()
        if tensor is not None and name in spec.requires
    }
    if spec.estimator == "none":
        return _nothing(current, mask)
    terms = [_single(term, current, others, mask) for term in spec.terms]
    return terms[0] if len(terms) == 1 else _sum(spec, terms, current)


def _single(spec: KLSpec, current: Tensor, others: dict[str, Tensor], mask: Tensor) -> KLTerm:
    assert spec.estimator is not None and spec.placement is not None and spec.bound is not None
    estimator = ESTIMATORS[spec.estimator]
    detached = current.detach()
    log_ratio = detached - others["ref_log_probs"]
    value = estimator.value(log_ratio)
    coefficient = torch.where(mask, estimator.role(spec.placement).coefficient(log_ratio), 0.0)
    never = torch.zeros_like(mask)
    bounded, capped, overflowed = never, never, overflows(-log_ratio)
    if not math.isinf(spec.bound):
        bounded = coefficient.abs() > spec.bound
        coefficient = coefficient.clamp(-spec.bound, spec.bound)
    weight = sampling_weight = mask.to(detached.dtype)
    if spec.ratio != "none":
        assert spec.level is not None and spec.cap is not None and spec.mode is not None
        importance = importance_weight(
            detached,
            others[f"{spec.ratio}_log_probs"],
            mask,
            level=spec.level,
            cap=spec.cap,
            mode=spec.mode,
        )
        weight = sampling_weight = importance.weight
        capped = importance.capped
        overflowed = overflowed | importance.overflowed
    if spec.placement == "as_loss" and spec.horizon == "sequence":
        # Per decision: sum_{s>=t} w_s c_s. At sequence level w is one number per answer, so this
        # is w times the reward-to-go there, and without a ratio the reward-to-go itself.
        force = torch.where(mask, _finite(reward_to_go(_finite(weight * coefficient))), 0.0)
        # A token whose own weight is 0 (dropped by mode=mask) still answers for later ones.
        weight = torch.where(weight > 0, weight, mask.to(weight.dtype))
        coefficient = torch.where(mask, _finite(force / weight), 0.0)
    else:
        force = _finite(weight * coefficient)
    return KLTerm(
        loss=value + force * (current - detached),
        value=value,
        coefficient=coefficient,
        weight=weight,
        _mask=mask,
        _log_ratio=log_ratio,
        _sampling_weight=sampling_weight,
        _capped=capped,
        _bounded=bounded,
        _overflowed=overflowed,
    )


def reward_to_go(x: Tensor) -> Tensor:
    """``sum_{s>=t} x_s`` along the last dimension."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _finite(x: Tensor) -> Tensor:
    # Products and sums of numbers of which one is a saturated exponent, and counted as such.
    limit = torch.finfo(x.dtype).max
    return x.clamp(-limit, limit)


def _sum(spec: KLSpec, terms: list[KLTerm], current: Tensor) -> KLTerm:
    first = terms[0]
    weighted = next((t for t, s in zip(terms, spec.terms, strict=True) if s.ratio != "none"), first)
    zero = torch.zeros_like(first.value)
    force = _finite(sum((_finite(t.weight * t.coefficient) for t in terms), zero))
    value = _finite(sum((t.value for t in terms), zero))
    return KLTerm(
        loss=value + force * (current - current.detach()),
        value=value,
        coefficient=force,
        weight=first._mask.to(value.dtype),
        _mask=first._mask,
        _log_ratio=first._log_ratio,
        _sampling_weight=weighted._sampling_weight,
        _capped=weighted._capped,
        _bounded=torch.stack([t._bounded for t in terms]).any(0),
        _overflowed=torch.stack([t._overflowed for t in terms]).any(0),
    )


def _nothing(current: Tensor, mask: Tensor) -> KLTerm:
    zero, never = torch.zeros_like(current.detach()), torch.zeros_like(mask)
    weight = mask.to(current.dtype)
    return KLTerm(
        loss=zero * (current - current.detach()),
        value=zero,
        coefficient=zero,
        weight=weight,
        _mask=mask,
        _log_ratio=zero,
        _sampling_weight=weight,
        _capped=never,
        _bounded=never,
        _overflowed=never,
    )


def _check(
    spec: KLSpec, log_probs: Tensor, response_mask: Tensor, supplied: dict[str, Tensor | None]
) -> None:
    for name in spec.requires:
        if supplied[name] is None:
            raise ValueError(f"kl_type {str(spec)!r} needs {name}, which is missing")
    if log_probs.dim() != 2 or not log_probs.is_floating_point():
        raise ValueError(
            "log_probs must be a floating-point tensor of shape (B, T), got "
            f"{tuple(log_probs.shape)} of {log_probs.dtype}"
        )
    for name, tensor in (*supplied.items(), ("response_mask", response_mask)):
        if tensor is not None and tensor.shape != log_probs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, log_probs has {tuple(log_probs.shape)}: "
                "all tensors must be (B, T), response tokens only"
            )
