"""The tensors of one micro-batch: as a caller hands them in, and as a term works with them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from klplug.answers import Answers
from klplug.numerics import MOST, masked, masked_, number_of
from klplug.spec import KLSpec, TermSpec

ClipRange: TypeAlias = "float | Sequence[float]"
Groups: TypeAlias = "Sequence[Hashable] | Tensor | None"


@dataclass(frozen=True, eq=False)
class Given:
    """What a caller hands in, as it came; each field is documented at ``kl_term``."""

    log_probs: Tensor
    response_mask: Tensor
    ref_log_probs: Tensor | None = None
    old_log_probs: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    teacher_log_probs: Tensor | None = None
    posterior_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    kl_coef: float | Tensor | None = None
    clip_range: ClipRange | None = None
    group_ids: Groups = None
    return_baseline: Tensor | None = None
    segment_ids: Tensor | None = None
    exact_kl: Tensor | None = None
    sample_weights: Mapping[str, Tensor] | None = None

    @property
    def numbers(self) -> dict[str, Tensor]:
        """By name, the floating-point tensors beside ``log_probs`` that are there."""
        tensors = {name: getattr(self, name) for name in _NUMBERS}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def weights(self, spec: KLSpec) -> dict[str, Tensor]:
        """The sample weights of the terms of ``spec``, by what they are called in ``Batch``."""
        given = self.sample_weights or {}
        return {weight_name(t): given[t.weight] for t in spec.terms if t.weight in given}

    def check(self, spec: KLSpec, needed: Sequence[str]) -> None:
        """Refuse what ``spec`` can't be computed from, before anything is.

        Raises:
            ValueError, TypeError: as ``kl_term``.
        """
        weights = self.sample_weights
        if not isinstance(weights, (Mapping, type(None))):
            raise TypeError(
                f"sample_weights must be a mapping from names to tensors, got "
                f"{type(weights).__name__}"
            )
        for name in needed:
            # A baseline that is handed in needs no groups.
            instead = self.return_baseline if name == "group_ids" else None
            if getattr(self, name) is None and instead is None:
                raise ValueError(f"kl_type {str(spec)!r} needs {name}, which is missing")
        self._check_tensors(self.weights(spec))
        kl_coef = self.kl_coef
        if isinstance(kl_coef, Tensor):
            self._check_coefficient(kl_coef)
        elif kl_coef is not None:
            number = number_of(kl_coef)
            if number is None:
                kind = type(kl_coef).__name__
                raise TypeError(f"kl_coef must be a number or a tensor, got {kind}")
            if not 0 <= number <= MOST:
                raise ValueError(f"kl_coef={number!r} must be finite in float32, and not negative")
        self._check_weights(spec)
        self._check_exact(spec)
        compared = [term for term in spec.terms if term.baseline in ("batch", "group")]
        if self.segment_ids is not None and compared and self.return_baseline is None:
            raise ValueError(
                f"kl_type {str(compared[0])!r}: a baseline over packed rows can't be made here, "
                "for group_ids is of rows. Hand in return_baseline"
            )

    def _check_tensors(self, weights: Mapping[str, Tensor]) -> None:
        always = ("log_probs", "response_mask")
        given: dict[str, Any] = {
            name: getattr(self, name) for name in (*always, *_NUMBERS, "segment_ids")
        }
        given |= weights
        for name, tensor in given.items():
            needed = name in always or name in weights
            if not isinstance(tensor, Tensor) and (tensor is not None or needed):
                kind = "None" if tensor is None else type(tensor).__name__
                raise TypeError(f"{name} must be a tensor of shape (B, T), got {kind}")
        shape, device = self.log_probs.shape, self.log_probs.device
        if self.log_probs.dim() != 2 or not self.log_probs.is_floating_point():
            raise ValueError(
                "log_probs must be a floating-point tensor of shape (B, T), got "
                f"{tuple(shape)} of {self.log_probs.dtype}"
            )
        for name, tensor in given.items():
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, log_probs has {tuple(shape)}: "
                    "all tensors must be (B, T), response tokens only"
                )
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, log_probs is on {device}")
            if name in (*_NUMBERS, *weights) and not tensor.is_floating_point():
                raise ValueError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
            if name == "segment_ids" and (tensor.is_floating_point() or tensor.is_complex()):
                raise ValueError(f"segment_ids must be integers, got {tensor.dtype}")

    def _check_coefficient(self, kl_coef: Tensor) -> None:
        shape, of_log_probs = tuple(kl_coef.shape), tuple(self.log_probs.shape)
        sizes = zip(reversed(shape), reversed(of_log_probs), strict=False)
        if len(shape) > 2 or any(size not in (1, whole) for size, whole in sizes):
            raise ValueError(
                f"kl_coef has shape {shape}, and must be one number, or one for each of "
                f"log_probs' {of_log_probs}"
            )
        # On a device a look would wait for it, and what is compiled has no numbers to look at.
        may_look = kl_coef.device.type == "cpu" and not torch.compiler.is_compiling()
        if may_look and not (allowed := (kl_coef >= 0) & (kl_coef.double() <= MOST)).all():
            wrong = kl_coef[~allowed].flatten()[0].item()
            raise ValueError(f"kl_coef={wrong!r} must be finite in float32, and not negative")

    def _check_weights(self, spec: KLSpec) -> None:
        weights = self.weights(spec)
        for term in spec.terms:
            if term.weight != "none" and weight_name(term) not in weights:
                there = ", ".join(self.sample_weights or {}) or "none"
                raise ValueError(
                    f"kl_type {str(term)!r}: sample_weights has no {term.weight!r}. It has: {there}"
                )
        for name, tensor in weights.items():
            if tensor.requires_grad:
                raise ValueError(f"{name} has a gradient: a weight must be detached")

    def _check_exact(self, spec: KLSpec) -> None:
        over = {(t.estimator, t.alpha, t.vocab) for t in spec.terms if t.over_vocabulary}
        if len(over) > 1:
            raise ValueError(
                f"kl_type {str(spec)!r} has several divergences over the vocabulary, and exact_kl "
                "is of one. Use kl_term for each, and add the losses"
            )
        if not over or self.exact_kl is None or not torch.is_grad_enabled():
            return
        if self.log_probs.requires_grad and not self.exact_kl.requires_grad:
            raise ValueError(
                f"kl_type {str(spec)!r}: exact_kl carries no gradient, so the term would do "
                "nothing. Hand in the kl of klplug.exact_kl or topk_kl as it is"
            )


_NUMBERS = (
    *("ref_log_probs", "old_log_probs", "rollout_log_probs", "teacher_log_probs"),
    *("posterior_log_probs", "advantages", "return_baseline", "exact_kl"),
)


def needed_by(spec: KLSpec) -> tuple[str, ...]:
    """The fields of ``Given`` that a step under ``spec`` can't do without."""
    heads = {term.head for term in spec.terms}
    needed = spec.requires
    if heads & {"combined", "clipped"}:
        needed = (*needed, "clip_range")
    return (*needed, "kl_coef") if "combined" in heads else needed


def low_and_high(clip_range: ClipRange) -> tuple[float, float]:
    """PPO's range (low, high), of epsilon or of the two."""
    pair = clip_range if isinstance(clip_range, Sequence) else (clip_range, clip_range)
    # In two lists: torch.compile reads no walrus in one.
    found = [number_of(x) for x in pair]
    numbers = [x for x in found if x is not None]
    if not len(pair) == len(numbers) == 2 or not all(0 <= x <= MOST for x in numbers):
        raise ValueError(
            f"clip_range={clip_range!r} must be epsilon or (low, high), none negative, and finite "
            "in float32"
        )
    low, high = numbers
    return low, high


@dataclass(frozen=True, eq=False)
class Batch:
    """The same in the dtype of the work, detached.

    Attributes:
        given: as it came; its ``log_probs`` and ``exact_kl`` carry the gradient.
        log_probs: (B, T).
        counted: (B, T) bool, the tokens that the caller counts.
        mask: those of them whose weights and advantages are numbers.
        others: (B, T) each, by name, in their own dtypes.
        answers: which answer of its row a token belongs to.
        clip: PPO's range (low, high); ``None`` where none was given.
    """

    given: Given
    log_probs: Tensor
    counted: Tensor
    mask: Tensor
    others: dict[str, Tensor]
    answers: Answers
    clip: tuple[float, float] | None
    _compared: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, spec: KLSpec, given: Given) -> Batch:
        clip = None if given.clip_range is None else low_and_high(given.clip_range)
        dtype = torch.promote_types(given.log_probs.dtype, torch.float32)
        others = {}
        for name, tensor in given.numbers.items():
            if name in (*spec.requires, "return_baseline", "ref_log_probs"):
                others[name] = tensor.detach()
                if name != "ref_log_probs" or name in spec.requires:
                    dtype = torch.promote_types(dtype, tensor.dtype)
        others |= given.weights(spec)
        log_probs = given.log_probs.detach().to(dtype)
        counted = given.response_mask != 0
        answers = Answers.of(given.segment_ids, counted)
        batch = cls(given, log_probs, counted, counted, others, answers, clip)
        return replace(batch, mask=batch._usable(spec))

    def _usable(self, spec: KLSpec) -> Tensor:
        """The counted tokens at which every tensor but a reference is a number."""
        policies = {policy for policy in map(policy_of, spec.terms) if policy is not None}
        references = {term.reference for term in spec.terms}
        # A token without one of several references leaves all terms of a sum.
        compared = policies | references if len(references) > 1 else policies
        numbers = [
            self.log_ratio(name) for name in sorted(compared) if f"{name}_log_probs" in self.others
        ]
        weights = map(weight_name, spec.terms)
        for name in ("advantages", "return_baseline", "exact_kl", *weights):
            if name in self.others:
                numbers.append(self.others[name])
        usable = self.counted
        if "posterior" in references:  # made of ref, it rules out what that does
            usable = usable & ~self.others["ref_log_probs"].isnan()
        if not numbers:
            return usable
        together = numbers[0]
        for number in numbers[1:]:
            together = together + number  # no number as soon as one of them is none
        return usable & (together.abs() < math.inf)

    def log_ratio(self, policy: str) -> Tensor:
        """``log_probs`` less those of another policy; anything where masked."""
        return self.log_probs - self.others[f"{policy}_log_probs"]

    def compared(self, reference: str) -> tuple[Tensor, Tensor]:
        """The log-ratio to a reference where it is a number, else 0, and where it is one.

        Made once, for all terms that have it: what is summed of it is summed once, too.
        """
        if reference not in self._compared:
            # Of a wider dtype where only the metrics have the reference.
            log_ratio = self.log_ratio(reference).to(self.log_probs.dtype)
            numbers = self.mask & (log_ratio.abs() < math.inf)
            self._compared[reference] = masked_(log_ratio, numbers), numbers
        return self._compared[reference]

    def masked(self, name: str) -> Tensor:
        """One of the others, 0 where masked."""
        return masked(self.others[name].to(self.log_probs.dtype), self.mask)


def weight_name(term: TermSpec) -> str:
    """What a term's sample weight is called among a batch's tensors and in errors."""
    return f"sample_weights[{term.weight!r}]"


def policy_of(term: TermSpec) -> str | None:
    """The policy that a term's weight corrects for: ``old``, ``rollout`` or none."""
    if term.head in ("combined", "clipped"):
        return "old"
    return term.ratio if term.ratio in ("old", "rollout") else None
