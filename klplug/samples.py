"""``weight=``: how much each token or answer counts in a KL, a row for each name.

A weight is one number per token, made once a step of all its answers, before the policy moves. It
multiplies c, and what a token adds to those before it. No gradient goes through it, and no ratio or
bound sees it. Nothing here needs torch before there are tensors.

Others add theirs by the entry-point group ``klplug.weights``: a name, and a ``SampleWeight``. So a
name is one function in every process that has the package, and a process that lacks it stops.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

from klplug.estimators import chi2
from klplug.numerics import finite
from klplug.refusals import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from klplug.spec import KLSpec

    Groups: TypeAlias = "Sequence[Hashable] | Tensor | None"

GROUP = "klplug.weights"


@dataclass(frozen=True, eq=False)
class Samples:
    """What a weight sees: the answers of a whole step, at the policy that the step starts from.

    Attributes:
        mask: (B, T) bool, the tokens that count; elsewhere the others may hold anything.
        log_probs: (B, T), log pi of the sampled tokens, nats.
        ref_log_probs: (B, T), of the reference model.
        advantages: (B, T); a KL in the reward is made before there are any.
        rewards: (B,), as they were given, without a KL.
        group_ids: B of them, answers to one prompt alike.
        entropy: (B, T), of the policy's distribution at each token, nats.
        tensors: (B, T) each, what else the batch carries, by name.
    """

    mask: Tensor
    log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    rewards: Tensor | None = None
    group_ids: Groups = None
    entropy: Tensor | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def check(self, name: str) -> None:
        """Refuse what is no tensor, lies elsewhere, or would be spread over tokens or answers that
        it is not of."""
        from klplug.baselines import group_numbers

        _check_tensor("mask", self.mask, self.mask)
        if str(self.mask.dtype) != "torch.bool":
            raise ValueError(f"mask must be of dtype bool, got {self.mask.dtype}")
        found, shape = getattr(self, name), self.mask.shape
        if name == "tensors":
            if not isinstance(found, Mapping):
                raise TypeError(f"tensors must be a mapping, got {type(found).__name__}")
        elif name == "group_ids":
            group_numbers(found, self.mask)
        else:
            _check_tensor(name, found, self.mask)
            wanted = shape[:1] if name == "rewards" else shape
            if found.shape != wanted:
                raise ValueError(
                    f"{name} has shape {tuple(found.shape)}, and must have {tuple(wanted)}"
                )


def _check_tensor(name: str, found: Any, mask: Any) -> None:
    from torch import Tensor

    if not isinstance(found, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(found).__name__}")
    if found.device != mask.device:
        raise ValueError(f"{name} is on {found.device}, mask is on {mask.device}")
    if found.is_complex():
        raise ValueError(f"{name} is of {found.dtype}: real numbers are needed")


@dataclass(frozen=True)
class SampleWeight:
    """One row.

    Attributes:
        function: of the samples, and of what stands after the name's colon. It gives (B, T), or
            (B,) for a number per answer. All are finite, not negative and detached.
        meaning: in words, for documentation and command line.
        source: where it comes from.
        needs: attributes of ``Samples`` that it reads.
        per_answer: whether all tokens of an answer have one number.
        argument: what may stand after the colon, as it is written best; it raises ``ValueError`` in
            words. ``None`` where nothing may.
        default: what stands there where nothing is written; ``None`` where something must.
    """

    function: Callable[[Samples, str], Tensor]
    meaning: str
    source: str = ""
    needs: tuple[str, ...] = ()
    per_answer: bool = False
    argument: Callable[[str], str] | None = None
    default: str | None = None


# ── The rows ────────────────────────────────────────────────────────────────────────────────────


def _positive(samples: Samples, _: str) -> Tensor:
    assert samples.advantages is not None
    return (samples.advantages > 0).to(samples.advantages.dtype)


def _difficulty(samples: Samples, _: str) -> Tensor:
    """1 - exp(-e p) where A > 0, p the share of the group that is right. 1 elsewhere, and where p
    is 0 or 1. A row without tokens is no answer, and one whose reward is nan is neither."""
    assert samples.advantages is not None and samples.rewards is not None
    right = (samples.rewards >= 1).to(_widened(samples.advantages).dtype)
    share = right.clone()
    known = (samples.mask.any(-1) & ~samples.rewards.isnan()).tolist()
    groups = list(samples.group_ids) if samples.group_ids is not None else []
    for name in dict.fromkeys(groups):
        rows = [row for row, other in enumerate(groups) if other == name and known[row]]
        if rows:
            share[rows] = right[rows].mean()
    inside = (share > 0) & (share < 1)
    shaped = (1 - (-math.e * share).exp()).where(inside, 1.0).unsqueeze(-1)
    return shaped.where(samples.advantages > 0, 1.0)


def _below_quantile(samples: Samples, quantile: str) -> Tensor:
    """1 for the ``quantile`` of all counted tokens that has the least entropy, else 0."""
    assert samples.entropy is not None
    counted = samples.entropy[samples.mask]
    counted = counted[counted.abs() < math.inf].sort().values
    if not len(counted):
        return samples.mask.to(samples.entropy.dtype)
    # Of the number as it is written: 0.55 of 20 is 11, and as floats a little more.
    threshold = counted[math.ceil(Fraction(quantile) * len(counted)) - 1]
    return (samples.entropy <= threshold).to(samples.entropy.dtype)


def _entropy_floor(samples: Samples, floor: str) -> Tensor:
    """max(1/2, floor / (H + 0.1)), H the mean entropy of all counted tokens."""
    assert samples.entropy is not None
    counted = samples.entropy[samples.mask].double()
    counted = counted[counted.abs() < math.inf]
    mean = counted.sum() / max(len(counted), 1)
    factor = (float(floor) / (mean + 0.1)).clamp(min=0.5)
    return factor.to(_widened(samples.entropy).dtype).expand(len(samples.mask))


def _root(samples: Samples, _: str) -> Tensor:
    """d sqrt(D) / dD = 1 / (2 sqrt(D)), D the mean of U + 1/U - 2; 0 where D is."""
    assert samples.log_probs is not None and samples.ref_log_probs is not None
    log_ratio = _widened(samples.log_probs) - _widened(samples.ref_log_probs)
    log_ratio = log_ratio.where(samples.mask & (log_ratio.abs() < math.inf), 0.0)
    answers = samples.mask.any(-1)
    of_answer = chi2(finite(log_ratio.sum(-1)))[answers]
    divergence = of_answer.double().sum() / max(len(of_answer), 1)
    weight = divergence.sqrt().mul(2).reciprocal().where(divergence > 0, 0.0)
    return weight.to(log_ratio.dtype).expand(len(answers))


def _widened(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.element_size() == 8 and x.is_floating_point() else x.float()


def _of_mask(samples: Samples, name: str) -> Tensor:
    return samples.tensors[name]


def _quantile(text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise ValueError(f"{text!r} is no quantile: write a number above 0 and below 1")
    return repr(number)


def _nats(text: str) -> str:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{text!r} is no entropy: write a number of nats above 0")
    return repr(number)


def _identifier(text: str) -> str:
    if not text.isidentifier():
        raise ValueError(f"{text!r} is no name of a tensor: write letters, digits and _")
    return text


WEIGHTS: dict[str, SampleWeight] = {
    "positive": SampleWeight(
        _positive,
        "1 for tokens whose advantage is above 0, else 0",
        "klplug",
        needs=("advantages",),
    ),
    "difficulty": SampleWeight(
        _difficulty,
        "1 - exp(-e p) for tokens whose advantage is above 0. p is the share of the group's "
        "answers with a reward of at least 1. 1 for other tokens, and where all or none are right",
        "DADS of APO, arXiv 2506.21655, as in the code of View-R1",
        needs=("advantages", "rewards", "group_ids"),
    ),
    "entropy": SampleWeight(
        _below_quantile,
        "1 for the share of the step's tokens with the least entropy, 0.8 unless another is "
        "written. 0 for the others, which stay free",
        "klplug; the rule by which Archer, arXiv 2507.15778, tells tokens apart, over the step",
        needs=("entropy",),
        argument=_quantile,
        default="0.8",
    ),
    "entropy_floor": SampleWeight(
        _entropy_floor,
        "max(1/2, floor / (H + 0.1)) for all, H being the mean entropy of the step's tokens. floor "
        "is 2 nats, unless another is written. It is more than 1 where the policy has become sure",
        "SAFE, by its public code",
        needs=("entropy",),
        per_answer=True,
        argument=_nats,
        default="2.0",
    ),
    "root": SampleWeight(
        _root,
        "1 / (2 sqrt(D)), D being the mean over the step's answers of U + 1/U - 2. D is chi2 "
        "between whole answers. The weight is what the gradient of its square root has of its own",
        "Correlated Proxies, arXiv 2403.03185",
        needs=("log_probs", "ref_log_probs"),
        per_answer=True,
    ),
    "mask": SampleWeight(
        _of_mask,
        "the tensor of that name which the batch carries, a number per token",
        "klplug",
        needs=("tensors",),
        argument=_identifier,
    ),
}


# ── By name ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Named:
    """A ``weight=``, looked up.

    Attributes:
        written: as its term writes it, ``mask:tool`` for one.
        argument: after the colon.
        row: what it is.
        package: whose it is, with the version, for logs.
    """

    written: str
    argument: str
    row: SampleWeight
    package: str

    @property
    def needs(self) -> tuple[str, ...]:
        return self.row.needs

    @property
    def tensor(self) -> str | None:
        """The name of the one tensor of the batch that it reads, if any."""
        return self.argument if "tensors" in self.needs else None

    @property
    def key(self) -> str:
        """A name for its tensor in a host's batch."""
        return "klplug_weight_" + re.sub(r"\W", "_", self.written)


@functools.lru_cache
def named(written: str) -> Named:
    """The weight of that name.

    Raises:
        Refused: no row has that name, two packages have, or its argument is none.
    """
    name, colon, argument = written.partition(":")
    row, package = _row(name)
    if row.argument is None:
        if colon:
            raise Refused(
                f"weight={written}: {name} takes nothing after a colon", "weight-argument"
            )
        return Named(name, "", row, package)
    if not argument and row.default is None:
        raise Refused(
            f"weight={written}: {name} needs a name, as in weight={name}:NAME", "weight-argument"
        )
    try:
        argument = row.argument(argument or str(row.default))
    except ValueError as error:
        raise Refused(f"weight={written}: {error}", "weight-argument") from None
    shown = name if argument == row.default else f"{name}:{argument}"
    return Named(shown, argument, row, package)


def _row(name: str) -> tuple[SampleWeight, str]:
    import klplug

    if name in WEIGHTS:
        return WEIGHTS[name], f"klplug {klplug.__version__}"
    others = importlib.metadata.entry_points(group=GROUP)
    found = [entry for entry in others if entry.name == name]
    if len(found) == 1:
        (entry,) = found
        row = entry.load()
        if not isinstance(row, SampleWeight):
            raise Refused(
                f"weight={name}: {entry.value} is {type(row).__name__}, and must be a "
                "klplug.SampleWeight",
                "unknown-value",
            )
        dist = entry.dist
        return row, "?" if dist is None else f"{dist.name} {dist.version}"
    if found:
        packages = ", ".join(sorted(e.dist.name for e in found if e.dist is not None))
        raise Refused(
            f"weight={name} is of several packages: {packages}. Uninstall all but one",
            "unknown-value",
        )
    known = [*WEIGHTS, *sorted({entry.name for entry in others})]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise Refused(
        f"weight={name} is unknown.{hint} Known: none, {', '.join(known)}. Others are entry points "
        f"of the group {GROUP}",
        "unknown-value",
    )


def weights_of(spec: KLSpec, reading: str | None = None) -> tuple[Named, ...]:
    """The weights of its terms, each once; only those that read ``reading``, where it is given."""
    written = (term.weight for term in spec.terms if term.weight != "none")
    found = (named(name) for name in dict.fromkeys(written))
    return tuple(own for own in found if reading is None or reading in own.needs)


def described(spec: KLSpec) -> str:
    """Whose they are, for the line by which a process says that it is active."""
    return "".join(f" weight={own.written} ({own.package})" for own in weights_of(spec))


def sample_weights(spec: str | KLSpec, samples: Samples) -> dict[str, Tensor]:
    """What ``kl_term`` takes as its ``sample_weights``: by ``weight=``, (B, T), 0 where masked.

    For the start of a step, when the whole batch is at hand. A weight may compare answers, and a
    micro-batch has some of them only.

    Args:
        spec: a ``kl_type`` string or its ``KLSpec``.
        samples: with all that its weights need.

    Raises:
        ValueError: ``samples`` lacks what a weight needs, or has it in another shape or elsewhere.
            Or a weight is so, is negative or no number at a counted token, or has a gradient.
        TypeError: either is no tensor.
    """
    from klplug.spec import parse

    return {own.written: _checked(own, samples) for own in weights_of(parse(spec))}


def _checked(own: Named, samples: Samples) -> Tensor:
    for name in own.needs:
        if getattr(samples, name) is None:
            raise ValueError(f"weight={own.written} needs {name}, which is missing")
        samples.check(name)
        missing = own.tensor if name == "tensors" else None
        if missing is not None and missing not in samples.tensors:
            there = ", ".join(sorted(samples.tensors)) or "none"
            raise ValueError(
                f"weight={own.written}: the batch carries no tensor {missing!r}. It has: {there}"
            )
    weight, mask = own.row.function(samples, own.argument), samples.mask
    says = f"weight={own.written} ({own.package})"
    _check_tensor(says, weight, mask)
    shape = tuple(weight.shape)
    if shape not in (tuple(mask.shape), (len(mask),)):
        raise ValueError(
            f"{says} has shape {shape}: it must be {tuple(mask.shape)}, a number per token, or "
            f"{(len(mask),)}, one per answer"
        )
    if weight.requires_grad:
        raise ValueError(f"{says} has a gradient: a weight must be detached")
    if not weight.is_floating_point():
        weight = weight.float()
    if weight.dim() == 1:
        weight = weight.unsqueeze(-1).expand(mask.shape)
    weight = weight.where(mask, 0.0)
    wrong = weight[~((weight >= 0) & (weight < math.inf))]  # nan is neither
    if len(wrong):
        raise ValueError(
            f"{says} is {float(wrong[0]):g} at a token: it must be finite and not negative"
        )
    return weight
