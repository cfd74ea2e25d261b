"""The KL on answers that the reference gave once, with their log-probs stored beside them.

There the reference is the policy that was sampled, so each sample counts for u = pi/ref, and no
policy chooses the prefixes: the own-token gradient ``u (f'(u) - f'(1))`` is that of

    sum_t E_{y ~ ref} D_f(pi_t, ref_t)        D_f = E_ref f(u)

whole, and no semi-gradient. For ``forward`` it is KL(ref||pi) of whole answers, and ``u - 1`` in
place of the likelihood's -1: at the reference its noise is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from klplug.estimators import ESTIMATORS, Function, alpha_divergence
from klplug.numerics import finite, finite_, largest, masked_
from klplug.spec import KLSpec, TermSpec, parse

if TYPE_CHECKING:
    from torch import Tensor

    from klplug.tally import Tally
    from klplug.term import KLTerm

PREFIX = "klplug/source/"
"""Of metrics that are of the stored answers, and not of the policy's own."""

# Sums of a tally that are of samples of the policy: here it is the reference that was sampled.
_OF_SAMPLES = ("k1", "k1_square", "k3", "abs", "growth_square", "k3_growth")
# What is alike on all answers, and watched: a name of its own would hide it.
_AS_EVER = ("klplug/active", "klplug/nonfinite")
_NOT_SHOWN = ("kl", "k1", "k2", "k3", "abs", "gradient_cosine", "gradient_norm_ratio")

SERVED = "forward, js, hellinger, tv, and alpha below 1"


# Estimators whose value is of the policy's own samples alone, and their gradient on these.
_WITHOUT_A_DIVERGENCE = {
    "k1": f"0 in the mean. Use one of {SERVED}",
    "k3": "that of 'forward_as_loss'. Use that",
    "abs": "twice that of 'tv_as_loss'. Use that",
}
# Options that have one value on the reference's own answers, and why.
_ONE_VALUE = (
    ("reference", "ref", "the answers are the reference's"),
    ("vocab", "sample", "stored are the log-probs of what was sampled"),
    ("head", "separate", "there is no policy loss on these answers"),
    ("ratio", "old", "the reference made these answers, and each counts for pi/ref"),
    ("baseline", "none", "it is made of the policy's answers"),
    ("weight", "none", "it is made of the policy's answers"),
)


def reasons(spec: KLSpec) -> Iterator[str]:
    """Why a ``kl_type`` can't act on the reference's own answers, each in one sentence."""
    if not spec.terms:
        yield f"it has no term that could act on them. Use one of {SERVED}, as a loss"
    for term in spec.terms:
        if (reason := _reason(term)) is not None:
            yield reason


def _reason(term: TermSpec) -> str | None:
    if term.placement == "in_reward":
        finite_there = term.estimator if term.definition.has_limit else "forward"
        return (
            "a reward is of the policy's own answers, and these have none. Use "
            f"'{finite_there}_as_loss'"
        )
    if term.estimator in _WITHOUT_A_DIVERGENCE:
        gradient = _WITHOUT_A_DIVERGENCE[term.estimator]
        return f"{term.estimator} is refused: on these answers its gradient is {gradient}"
    if not term.definition.has_limit:
        return (
            f"{term.estimator} is refused: it is large where the policy goes and the reference "
            f"does not, which these answers don't show. Use one of {SERVED}"
        )
    for option, needed, why in _ONE_VALUE:
        if (value := getattr(term, option)) != needed:
            return f"{option}={value} is refused: {why}. Leave it out"
    return None


@dataclass(frozen=True, eq=False)
class StoredKL:
    """The KL of some stored answers, per token; every tensor is (B, T) and zero where masked.

    Attributes:
        term: as ``kl_term`` makes it, with the reference in the place of the policy that sampled.
        value: estimate of the divergence, nats per token, detached: weighted, as the samples are.
        tally: sums and maxima; ``stored_metrics`` names what is made of them.
    """

    term: KLTerm
    value: Tensor
    tally: Tally

    @property
    def loss(self) -> Tensor:
        """``value`` with the term's gradient: to be added to a loss, times kl_coef."""
        return self.term.with_gradient(self.value, self.term.gradient)


def stored_kl(
    spec: str | KLSpec, log_probs: Tensor, ref_log_probs: Tensor, response_mask: Tensor
) -> StoredKL:
    """The KL that ``spec`` names, on answers that the reference sampled (DPH-RL).

    Direction and sign as in ``kl_term``: a penalty on how far pi is from ref. The samples are the
    reference's; the gradient is unbiased below ``cap``. ``horizon=token`` has each token's
    divergence at the reference's prefixes, the others that of ``kl_types()``. No reference model
    is needed.

    With ``horizon=sequence``, but for ``forward``, a token whose own pi/ref is below e^-88 adds
    next to nothing to the gradient of those before it, in float32, in place of f(0).

    Args:
        spec: terms as a loss whose divergence stays finite where the reference rules a token out.
        log_probs: (B, T), log pi of the stored tokens, nats; carries the gradient.
        ref_log_probs: (B, T), log ref of them, as they were sampled: at the same temperature.
        response_mask: (B, T), nonzero where a token counts.

    Raises:
        ValueError: a ``kl_type`` that needs answers of the policy; or as ``kl_term``.

    Source: arXiv 2509.07430.
    """
    from klplug.tally import Tally
    from klplug.term import kl_term

    spec = parse(spec)
    for reason in reasons(spec):
        raise ValueError(f"kl_type {str(spec)!r} on the reference's own answers: {reason}")
    term = kl_term(spec, log_probs, ref_log_probs, response_mask, old_log_probs=ref_log_probs)
    # The other way round these are samples of the first policy: an estimate of KL(ref||pi).
    forward = kl_term("monitor", ref_log_probs, log_probs.detach(), response_mask).tally
    sums = {k: v for k, v in term.tally.sums.items() if k.rpartition("/")[2] not in _OF_SAMPLES}
    sums |= {name: forward.sums[name] for name in _OF_SAMPLES}
    log_ratio = log_probs.detach().to(term.value.dtype) - ref_log_probs.detach()
    values = [_value(part, log_ratio) for part in term.parts]
    value = finite(sum(values[1:], values[0]))
    return StoredKL(term, value, Tally(sums, term.tally.maxima))


def _value(term: KLTerm, log_ratio: Tensor) -> Tensor:
    """``w f(u)/u`` of one term, as ``f(u) exp(log w - log u)``: where u is nearly 0, no product of
    its parts is a number of the dtype, and f(u) itself is."""
    (spec,) = term.spec.terms
    importance = term._acting.importance
    assert importance is not None
    if spec.horizon == "answer":
        log_ratio = importance.log_weight
    value = spec.factor * _of_reference(spec)(-log_ratio)
    if spec.horizon == "answer":  # an even share of it, as its term has
        value = value / importance.mask.sum(-1, keepdim=True)
    held = value.abs() >= largest(value)  # f(u) above the reference, where f(u)/u is a number
    value = (importance.weight * term.value).where(held, value * importance.times_exp(-log_ratio))
    return masked_(finite_(value), importance.mask)


def _of_reference(spec: TermSpec) -> Function:
    """Of ``-x``, f(u): the value that u f(1/u), the divergence with its policies swapped, has."""
    if spec.alpha is not None:
        return alpha_divergence(1 - spec.alpha).value
    return ESTIMATORS["k1" if spec.estimator == "forward" else spec.estimator].value


def stored_metrics(tally: Tally) -> dict[str, Tensor]:
    """The metrics of ``StoredKL.tally`` by their names.

    ``klplug/source/forward_kl``: KL(ref||pi), nats per token, of the stored answers. The others
    are under ``klplug/source/`` what ``Tally.metrics`` says of a weight, which is pi/ref here, and
    of a coefficient. ``klplug/active`` and ``klplug/nonfinite`` have their usual names.
    """
    metrics = tally.metrics()
    found = {PREFIX + "forward_kl": metrics["klplug/kl"]}
    for name, value in metrics.items():
        own = name.removeprefix("klplug/")
        if name.startswith(_AS_EVER):
            found[name] = value
        elif own.rpartition("/")[2] not in _NOT_SHOWN:
            found[PREFIX + own] = value
    return found
