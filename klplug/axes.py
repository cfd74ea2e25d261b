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
        needs: what ``kl_term`` needs from a batch, by value.
    """

    name: str
    choices: tuple[str, ...]
    default: Callable[[TermSpec], Value]
    meaning: str
    elsewhere: str = ""
    number: bool = False
    named: bool = False
    needs: Mapping[Value, tuple[str, ...]] = field(default_factory=dict)

    def needed(self, value: Value) -> tuple[str, ...]:
        """What ``kl_term`` needs from a batch where it is ``value``."""
        return self.needs.get(NAME if self.named and value not in self.choices else value, ())

    def shown(self, value: Value) -> str:
        """``value`` as a user writes it."""
        if not isinstance(value, float):
            return str(value)
        if value == math.inf and "none" in self.choices:
            return "none"
        return repr(value).removesuffix(".0")


def _default_ratio(term: TermSpec) -> Value:
    if term.placement == "in_reward":
        return "none"
    if term.head != "separate":
        return None
    if term.vocab == "exact" and term.horizon == "token":
        return "none"
    return "rollout" if term.reference == "rollout" else "old"


def _default_level(term: TermSpec) -> Value:
    if term.horizon == "answer":
        return _weighted(term, "sequence")
    prefix = term.horizon == "sequence" or term.vocab == "exact"
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
            "which divergence the estimator alpha is of; neither 0 nor 1",
            number=True,
        ),
        Axis(
            "reference",
            ("ref", "rollout", "old"),
            lambda term: "ref",
            "the policy that the KL is taken to: the reference model; or, as the trust region and "
            "with no reference model, the sampler itself (with ratio=rollout or none) or the "
            "policy at the start of the step",
            needs={
                "ref": ("ref_log_probs",),
                "rollout": ("rollout_log_probs",),
                "old": ("old_log_probs",),
            },
        ),
        Axis(
            "vocab",
            ("sample", "exact"),
            lambda term: "sample",
            "what stands for a token's distribution: the token that was sampled, or the whole "
            "vocabulary. The gradient is the same without the own token's noise and ratio: what a "
            "ratio then weighs is the tokens before it",
            needs={"exact": ("exact_kl",)},
        ),
        Axis(
            "horizon",
            ("token", "sequence", "answer"),
            lambda term: "sequence" if term.placement == "in_reward" else "token",
            "own token (LOC), or whole answer (FULL): the form that is exact for the divergence of "
            "each token, summed along answers. k1, k3 and abs as loss have none. Or the divergence "
            "between whole answers, with c by the answer's ratio pi/ref: of the KLs the sum is "
            "that already",
            elsewhere="in the reward: sequence",
        ),
        Axis(
            "head",
            ("separate", "combined", "clipped"),
            lambda term: "separate",
            "a term of its own; inside the policy loss's ratio and clip; or a term of its own "
            "under PPO's ratio and clip. The last two have the policy loss's ratio pi/old, and no "
            "ratio, level, cap or mode",
            needs={"combined": ("old_log_probs", "advantages"), "clipped": ("old_log_probs",)},
        ),
        Axis(
            "ratio",
            ("old", "none", "rollout"),
            _default_ratio,
            "the policy that the samples are corrected for, by the weight pi/old or pi/rollout: "
            "detached, and exactly 1 on-policy",
            elsewhere="in the reward, and of an own token with vocab=exact: none; with "
            "reference=rollout: rollout, none",
            needs={"old": ("old_log_probs",), "rollout": ("rollout_log_probs",)},
        ),
        Axis(
            "level",
            ("token", "prefix", "sequence"),
            _default_level,
            "the product that makes up the ratio: this token's, the answer's so far, or the whole "
            "answer's (never a geometric mean)",
            elsewhere="with horizon=sequence: prefix, sequence; with horizon=answer: sequence; "
            "with vocab=exact: prefix",
        ),
        Axis(
            "baseline",
            ("none", "batch", "group"),
            lambda term: "none",
            "what the KL of a whole answer is compared with: nothing, or the mean of all other "
            "answers in the batch or in their group",
            needs={"group": ("group_ids",)},
        ),
        Axis(
            "cap",
            ("none",),
            lambda term: _weighted(term, 10.0 if term.baseline == "none" else math.inf),
            "bound of the ratio; the share of tokens above it is logged",
            elsewhere="with a baseline: none, for a capped weight would bias it",
            number=True,
        ),
        Axis(
            "mode",
            ("truncate", "mask"),
            lambda term: _weighted(term, "truncate"),
            "what becomes of a ratio above the cap: it is held there, or it is 0",
        ),
        Axis(
            "bound",
            ("none",),
            lambda term: math.inf,
            "bound of each token's |c|, keeping its sign, before ratio and horizon. Of an own "
            "token: the gradient of a Huber-like divergence. Over whole answers: no divergence's, "
            "with the same optimum where no token of it is beyond the bound",
            number=True,
        ),
        Axis(
            "weight",
            ("none",),
            lambda term: "none",
            "how much each token or answer counts: a number that multiplies its c after the bound "
            "and before ratio and horizon, without a gradient of its own. Made once a step of all "
            "answers, by a name: positive, difficulty, entropy, root, mask:NAME, or an entry point "
            "of klplug.weights",
            named=True,
            needs={NAME: ("sample_weights",)},
        ),
        Axis(
            "reward_norm",
            ("none", "group"),
            lambda term: "none" if term.placement == "in_reward" else None,
            "joined after group normalisation, so that its force is kl_coef; or before it: kl_coef "
            "over the group's standard deviation",
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
