"""The axes of a ``kl_type``: a row for each option, with what it may be and what it means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from klplug.spec import TermSpec

Value: TypeAlias = "str | float | None"

PLACEMENTS = ("in_reward", "as_loss")

NAME = "NAME"
"""In ``needs``, any value that is a name."""


@dataclass(frozen=True)
class Axis:
    """One option of a term.

    Attributes:
        name: as it is written.
        choices: the words that it may be, default first; of a number the words beside it.
        default: what it is where it is left out, given the axes above it; ``None`` where it does
            not apply.
        meaning: in words, for README, documentation and command line.
        elsewhere: where its choices or its default are others.
        number: whether it is one; the word ``none`` is then no bound.
        named: whether it may be a name that others can add to, beside its choices.
        sized: words that it may be with a whole number after a colon, beside its choices.
        needs: what ``kl_term`` needs from a batch, by value.
    """

    name: str
    choices: tuple[str, ...]
    default: Callable[[TermSpec], Value]
    meaning: str
    elsewhere: str = ""
    number: bool = False
    named: bool = False
    sized: tuple[str, ...] = ()
    needs: Mapping[Value, tuple[str, ...]] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        """What it may be, as a user is told."""
        return (*self.choices, *(f"{word}:K" for word in self.sized))

    def needed(self, value: Value) -> tuple[str, ...]:
        """What ``kl_term`` needs from a batch where it is ``value``."""
        if self.sized:
            value, _ = size_of(str(value))
        return self.needs.get(NAME if self.named and value not in self.choices else value, ())

    def shown(self, value: Value) -> str:
        """``value`` as a user writes it."""
        if not isinstance(value, float):
            return str(value)
        if value == math.inf and "none" in self.choices:
            return "none"
        return repr(value).removesuffix(".0")


def size_of(value: str) -> tuple[str, int | None]:
    """``topk:64`` as the word and its number; of a word alone there is none."""
    word, colon, number = value.partition(":")
    return word, int(number) if colon else None


def _default_horizon(term: TermSpec) -> Value:
    if term.reference == "posterior":
        return "answer"
    return "sequence" if term.placement == "in_reward" else "token"


def _default_ratio(term: TermSpec) -> Value:
    if term.placement == "in_reward":
        return "none"
    if term.head != "separate":
        return None
    if term.over_vocabulary and term.horizon == "token":
        return "none"
    return "rollout" if term.reference == "rollout" else "old"


def _default_level(term: TermSpec) -> Value:
    if term.horizon == "answer":
        return _weighted(term, "sequence")
    prefix = term.horizon == "sequence" or term.over_vocabulary
    return _weighted(term, "prefix" if prefix else "token")


def _weighted(term: TermSpec, value: Value) -> Value:
    """A default that only a term with a ratio has."""
    return None if term.ratio in (None, "none") else value


# In the order in which defaults are decided.
AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis(
            "alpha",
            (),
            lambda term: 0.5 if term.estimator == "alpha" else None,
            "the number that chooses the divergence of the estimator alpha; neither 0 nor 1",
            number=True,
        ),
        Axis(
            "reference",
            ("ref", "rollout", "old", "teacher", "posterior"),
            lambda term: "ref",
            "the policy that the KL is taken to. ref: the reference model. rollout: the sampler "
            "itself, with ratio=rollout or none. old: the policy at the start of the step. The "
            "last two make a trust region and load no reference model. teacher: a second frozen "
            "model, beside the reference. posterior: ref exp(r/kl_coef)/Z over whole answers, "
            "through which the reward r acts, with no policy loss beside it",
            needs={
                "ref": ("ref_log_probs",),
                "posterior": ("ref_log_probs", "posterior_log_probs"),
                "rollout": ("rollout_log_probs",),
                "old": ("old_log_probs",),
                "teacher": ("teacher_log_probs",),
            },
        ),
        Axis(
            "vocab",
            ("sample", "exact"),
            lambda term: "sample",
            "sample: a token's KL is estimated from the token that was sampled. exact: it is "
            "summed over the whole vocabulary. The gradient is then the same, without the noise of "
            "the own token, which needs no ratio. A ratio is that of the tokens before it. topk:K: "
            "the same of the reference's K most likely tokens and one category of all others, a "
            "lower bound",
            sized=("topk",),
            needs={"exact": ("exact_kl",), "topk": ("exact_kl",)},
        ),
        Axis(
            "horizon",
            ("token", "sequence", "answer"),
            _default_horizon,
            "token: each token's own divergence (LOC). sequence: the sum of the tokens' "
            "divergences over whole answers (FULL), in its exact form. k1, k3 and abs as a loss "
            "have none. answer: the divergence between whole answers, by the answer's ratio "
            "pi/ref. For the KLs that is the sum already",
            elsewhere="in the reward: sequence; with reference=posterior: answer",
        ),
        Axis(
            "head",
            ("separate", "combined", "clipped"),
            lambda term: "separate",
            "separate: a term of its own. combined: inside the policy loss, under its ratio and "
            "clip. clipped: a term of its own under PPO's ratio and clip. The last two have the "
            "policy loss's ratio pi/old, and take no ratio, level, cap or mode",
            needs={"combined": ("old_log_probs", "advantages"), "clipped": ("old_log_probs",)},
        ),
        Axis(
            "ratio",
            ("old", "none", "rollout"),
            _default_ratio,
            "which policy the samples are corrected for: each counts for pi/old, for pi/rollout, "
            "or for 1. The weight is detached, and exactly 1 on-policy",
            elsewhere="in the reward, and of an own token with vocab=exact or topk: none; with "
            "reference=rollout: rollout, none",
            needs={"old": ("old_log_probs",), "rollout": ("rollout_log_probs",)},
        ),
        Axis(
            "level",
            ("token", "prefix", "sequence"),
            _default_level,
            "what the ratio is a product over: this token, the answer up to it, or the whole "
            "answer. It is never a geometric mean",
            elsewhere="with horizon=sequence: prefix, sequence; with horizon=answer: sequence; "
            "with vocab=exact or topk: prefix",
        ),
        Axis(
            "baseline",
            ("none", "batch", "group"),
            lambda term: "none",
            "what a whole answer's KL is compared with. It is nothing, or the mean of the others "
            "in the batch or in its group",
            needs={"group": ("group_ids",)},
        ),
        Axis(
            "cap",
            ("none",),
            lambda term: _weighted(term, 10.0 if term.baseline == "none" else math.inf),
            "upper bound of the ratio. The share of tokens above it is logged",
            elsewhere="with a baseline: none, for a capped weight would bias it",
            number=True,
        ),
        Axis(
            "mode",
            ("truncate", "mask"),
            lambda term: _weighted(term, "truncate"),
            "truncate: a ratio above the cap is set to the cap. mask: it is set to 0",
        ),
        Axis(
            "bound",
            ("none",),
            lambda term: math.inf,
            "upper bound of each token's |c|, before ratio and horizon. For an own token the "
            "result is the gradient of a Huber-like divergence. Over whole answers it is that of "
            "no divergence. The optimum is the same if no token there is beyond the bound",
            number=True,
        ),
        Axis(
            "weight",
            ("none",),
            lambda term: "none",
            "how much each token or answer counts. It multiplies its c, after the bound and before "
            "ratio and horizon. It has no gradient, and is made once a step from all answers. Its "
            "name is positive, difficulty, entropy, entropy_floor, root, mask:NAME, or an entry "
            "point of klplug.weights",
            named=True,
            needs={NAME: ("sample_weights",)},
        ),
        Axis(
            "reward_norm",
            ("none", "group"),
            lambda term: "none" if term.placement == "in_reward" else None,
            "none: the KL joins after group normalisation, with strength kl_coef. group: it joins "
            "before, with strength kl_coef over the group's standard deviation",
            elsewhere="in the reward only",
        ),
    )
}

# In the order in which they are written.
OPTIONS = (
    "alpha",
    "vocab",
    "ratio",
    "level",
    "cap",
    "mode",
    "head",
    "horizon",
    "baseline",
    "bound",
    "weight",
    "reference",
    "reward_norm",
)

# What an option that is neither a number nor a name may be.
CHOICES = {
    "placement": PLACEMENTS,
    **{
        option: AXES[option].choices
        for option in OPTIONS
        if not AXES[option].number and not AXES[option].named
    },
}
