"""What the metrics see of a term, and of a sum as a whole."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from klplug.batch import Batch, weight_name
from klplug.gradients import Acting, Estimate
from klplug.numerics import HUGE, finite, finite_, masked, masked_
from klplug.spec import TermSpec
from klplug.weights import ImportanceWeight


@dataclass(frozen=True)
class Seen:
    """What the metrics of one term are made of; tensors are (B, T), zero where masked.

    Where there is no weight it is 1; where there are no flags nothing acted.

    Attributes:
        name: of the term in its metrics, empty for the whole.
        counted: the tokens that the caller counts.
        numbers: those of them that are numbers.
        in_the_kl: those and the ones at their limit, where pi/ref is infinite.
        log_ratio: of those, to the term's reference; ``None`` where the whole has none to ref.
        coefficient: what stands beside an advantage; ``None`` where sampled tokens have none, or
            not the whole of it.
        gradient: what multiplies each token's score.
        principled: what would with ``c = x``.
        expected: the divergence over the vocabulary, where it is taken.
        is_bound: whether that is a lower bound, of the reference's top tokens.
        saturating: of weight and coefficient those that may hold the dtype's largest number where
            ref/pi does not.
        steep: whether weight or coefficient may be more than 1.8e19, whose square float32 has not.
        capped, bounded: bool, where it acted.
        sample_weight: how much each token counts; ``None`` without ``weight=``.
        inputs: the caller's tensors by name, anything where masked.
    """

    name: str
    counted: Tensor
    numbers: Tensor
    in_the_kl: Tensor
    log_ratio: Tensor | None
    coefficient: Tensor | None
    gradient: Tensor
    principled: Tensor
    expected: Tensor | None = None
    is_bound: bool = False
    weight: Tensor | None = None
    saturating: Sequence[Tensor] = ()
    steep: bool = False
    capped: Tensor | None = None
    bounded: Tensor | None = None
    sample_weight: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Part:
    """One term of a ``kl_type``, worked out."""

    spec: TermSpec
    estimate: Estimate
    acting: Acting


def seen_of(parts: Sequence[Part], batch: Batch) -> list[Seen]:
    """The whole first, and then each term; a single term to ref is the whole."""
    if len(parts) == 1 and parts[0].spec.reference == "ref":
        return [_seen("", parts[0], batch)]
    terms = [_seen(in_a_key(part.spec) + "/", part, batch) for part in parts]
    return [_whole(terms, batch), *terms]


_IN_A_KEY = str.maketrans({",": ".", "=": "-", "*": "x", ":": "-"})


def in_a_key(written: object) -> str:
    """A term, or a part of one, as a metric's name has it."""
    return str(written).translate(_IN_A_KEY)


def _seen(name: str, part: Part, batch: Batch) -> Seen:
    spec, estimate, importance = part.spec, part.estimate, part.acting.importance
    gradient, over = part.acting.gradient(), spec.over_vocabulary
    bounded = None
    if estimate.unbounded is not None:
        bounded = (estimate.unbounded.abs() > spec.bound) & estimate.mask
    own_token = spec.placement == "as_loss" and spec.horizon == "token"
    # Over whole answers the weights are inside the sum: what competes with an advantage is it.
    coefficient = part.acting.coefficient if own_token else gradient
    read = (*spec.requires, "return_baseline")
    names = [name for name in batch.others if name in read]
    inputs = {"log_probs": batch.log_probs, **{name: batch.others[name] for name in names}}
    if spec.weight != "none":
        key = in_a_key(f"sample_weights/{spec.weight}")
        inputs[key] = batch.others[weight_name(spec)]
    return Seen(
        name=name,
        counted=batch.counted,
        numbers=estimate.numbers,
        in_the_kl=estimate.mask,
        # Of the posterior a token has but a share.
        log_ratio=None if spec.reference == "posterior" else estimate.log_ratio,
        coefficient=None if over else coefficient,
        gradient=gradient,
        principled=gradient if over else _principled(part, batch, gradient),
        expected=estimate.value if over else None,
        is_bound=spec.top is not None,
        weight=None if importance is None else importance.weight,
        saturating=_saturating(spec, importance, None if over else coefficient),
        steep=_uncapped(importance) or spec.estimator not in ("k1", "k2", "abs"),
        capped=None if importance is None else importance.capped(),
        bounded=bounded,
        sample_weight=estimate.sample_weight,
        inputs=inputs,
    )


def _saturating(
    spec: TermSpec, importance: ImportanceWeight | None, coefficient: Tensor | None
) -> list[Tensor]:
    found = []
    if importance is not None and _uncapped(importance):
        found.append(importance.weight)
    # As losses the other derivatives grow no faster than ref/pi.
    own_token = spec.placement == "as_loss" and spec.horizon == "token"
    own_token = own_token and spec.factor == 1 and spec.weight == "none"
    if coefficient is not None and not (own_token and spec.estimator not in ("chi2", "alpha")):
        found.append(coefficient)
    return found


def _uncapped(importance: ImportanceWeight | None) -> bool:
    return importance is not None and importance.cap > HUGE


def _principled(part: Part, batch: Batch, gradient: Tensor) -> Tensor:
    """The gradient that the same formulation has with c = x and no baseline."""
    spec, estimate, importance = part.spec, part.estimate, part.acting.importance
    log_ratio = estimate.log_ratio
    weight = None if importance is None else importance.weight
    if estimate.scale is not None:
        log_ratio = finite_(estimate.scale * log_ratio)
    if spec.reference == "posterior":  # whose reward is of the whole answer, at each of its tokens
        whole = masked(finite(batch.answers.whole(log_ratio)), estimate.mask)
        return finite_(whole if weight is None else weight * whole)
    if spec.placement == "as_loss" and spec.horizon == "token":
        if estimate.own is log_ratio:
            return gradient
        if importance is None:
            return log_ratio
        product = importance.weight * log_ratio
        return product if importance.cap <= HUGE else finite_(product)
    if estimate.own is log_ratio and spec.baseline == "none":
        return gradient
    if spec.head == "separate" and spec.placement == "as_loss" and weight is not None:
        to_go = batch.answers.to_go(finite_(weight * log_ratio))
    else:
        to_go = batch.answers.to_go(log_ratio)
        to_go = to_go if weight is None else weight * to_go
    return masked_(to_go, estimate.mask)


def _whole(terms: Sequence[Seen], batch: Batch) -> Seen:
    """What a sum does as a whole, and the KL to ref, where there is one."""
    numbers, log_ratio = batch.mask, None
    if "ref_log_probs" in batch.others:
        log_ratio, numbers = batch.compared("ref")
    zero = torch.zeros_like(batch.log_probs)
    gradient = principled = finite(sum((term.gradient for term in terms), zero))
    if any(term.principled is not term.gradient for term in terms):
        principled = finite(sum((term.principled for term in terms), zero))
    acting = list({id(term.in_the_kl): term.in_the_kl for term in terms}.values())
    in_the_kl = functools.reduce(torch.logical_or, acting) if acting else numbers
    over = next((term for term in terms if term.expected is not None), None)
    inputs = {name: tensor for term in terms for name, tensor in term.inputs.items()}
    if log_ratio is not None:
        inputs |= {"log_probs": batch.log_probs, "ref_log_probs": batch.others["ref_log_probs"]}
    return Seen(
        name="",
        counted=batch.counted,
        numbers=numbers,
        in_the_kl=in_the_kl,
        log_ratio=log_ratio,
        # Beside a KL over the vocabulary the sampled tokens' coefficients are not the whole of it.
        coefficient=gradient if over is None else None,
        saturating=(gradient,) if over is None else (),
        steep=any(term.steep for term in terms),
        gradient=gradient,
        principled=principled,
        expected=None if over is None else over.expected,
        is_bound=over is not None and over.is_bound,
        inputs=inputs,
    )
