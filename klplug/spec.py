"""``kl_type``: the one string that a user sets, and its parsed, validated form."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from klplug.estimators import ALIASES, ESTIMATORS, Estimator, alpha_divergence

PLACEMENTS = ("in_reward", "as_loss")
# What an option that is no number may be.
CHOICES = {
    "placement": PLACEMENTS,
    "ratio": ("old", "none", "rollout"),
    "level": ("token", "prefix", "sequence"),
    "mode": ("truncate", "mask"),
    "head": ("separate", "combined", "clipped"),
    "horizon": ("token", "sequence"),
    "baseline": ("none", "batch", "group"),
    "reference": ("ref", "rollout"),
    "reward_norm": ("none", "group"),
}

# Written options, in canonical order.
OPTIONS = (
    "alpha",
    "ratio",
    "level",
    "cap",
    "mode",
    "head",
    "horizon",
    "baseline",
    "bound",
    "reference",
    "reward_norm",
)
# Their defaults depend on no option but those before them here; all others' on these.
_DECIDERS = ("alpha", "reference", "head", "ratio", "horizon", "baseline")
_NUMBERS = ("alpha", "cap", "bound")

_NAMES = tuple(f"{e}_{p}" for e in ESTIMATORS for p in PLACEMENTS)
_ALIAS_NAMES = tuple(f"{a}_{p}" for a in ALIASES for p in PLACEMENTS)


def _nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def _choice(option: str, value: Any) -> None:
    allowed = CHOICES[option]
    if value not in allowed:
        raise ValueError(
            f"kl_type option {option}={value!r} is unknown; allowed: {', '.join(allowed)}."
            + _nearest(str(value), allowed)
        )


@dataclass(frozen=True)
class KLSpec:
    """A parsed ``kl_type``: one field per axis, validated, frozen.

    Options that were left out take the default of their axis, which depends on the placement and
    the horizon; an axis that does not apply is ``None``. ``str(spec)`` is canonical and
    ``parse(str(spec)) == spec``.

    Attributes:
        estimator: a name in ``ESTIMATORS``, or ``none``; ``None`` for a sum.
        placement: ``in_reward`` or ``as_loss``; ``None`` for ``none`` and for a sum.
        alpha: the divergence that ``alpha`` means; neither 0 nor 1.
        ratio: the policy that the samples are corrected for: ``old``, ``rollout`` or ``none``.
        level: ``token``, ``prefix`` or ``sequence``: the product that makes up the ratio.
        cap: bound of the ratio; ``inf`` for none.
        mode: ``truncate`` (min(ratio, cap)) or ``mask`` (0 above the cap).
        head: ``separate`` (a term of its own), ``combined`` (inside the policy loss's ratio and
            clip) or ``clipped`` (a term of its own under PPO's ratio and clip). The last two have
            the ratio pi/old of the policy loss, and none of the four axes above.
        horizon: ``token`` (own token, LOC) or ``sequence`` (whole answer, FULL).
        baseline: what an answer's KL is compared with: ``none``, or the mean of all others in the
            ``batch`` or in their ``group``.
        bound: bound of each token's |c|, before ratio and horizon; ``inf`` for none. Of an own
            token the gradient of a Huber-like divergence. Over whole answers no divergence's, with
            the same optimum where no token of it is beyond the bound.
        reference: ``ref``, or ``rollout``: the sampler itself as the trust region.
        reward_norm: in_reward only. ``none`` (joined after group normalisation: its force is
            kl_coef) or ``group`` (joined before, as verl does it: kl_coef over the group's std).
        parts: the terms of a sum, empty for a single one; see ``terms``.
    """

    estimator: str | None = None
    placement: str | None = None
    alpha: float | None = None
    ratio: str | None = None
    level: str | None = None
    cap: float | None = None
    mode: str | None = None
    head: str | None = None
    horizon: str | None = None
    baseline: str | None = None
    bound: float | None = None
    reference: str | None = None
    reward_norm: str | None = None
    parts: tuple[KLSpec, ...] = ()

    def __post_init__(self) -> None:
        if self.parts:
            self._check_sum()
        elif self.estimator == "none":
            self._check_none()
        else:
            self._check_name()
            self._one_program()
            self._complete()

    @property
    def definition(self) -> Estimator:
        """The registry's row of the estimator; only for a single term."""
        if self.alpha is not None:
            return alpha_divergence(self.alpha)
        assert self.estimator is not None
        return ESTIMATORS[self.estimator]

    @property
    def terms(self) -> tuple[KLSpec, ...]:
        """The terms of a sum; a single formulation is its own only term."""
        return self.parts or (self,)

    @functools.cached_property
    def requires(self) -> tuple[str, ...]:
        """Names of what ``kl_term`` needs from a batch, beside ``log_probs`` and the mask."""
        needed: list[str] = []
        for term in self.terms:
            if term.reference == "ref":
                needed.append("ref_log_probs")
            if term.ratio in ("old", "rollout"):
                needed.append(f"{term.ratio}_log_probs")
            if term.head in ("combined", "clipped"):
                needed.append("old_log_probs")
            if term.head == "combined":
                needed.append("advantages")
            if term.baseline == "group":
                needed.append("group_ids")
        return tuple(dict.fromkeys(needed))

    def placed(self, placement: str) -> KLSpec:
        """The part of this formulation with this placement; ``none`` where there is none."""
        _choice("placement", placement)
        terms = tuple(term for term in self.terms if term.placement == placement)
        if not terms:
            return KLSpec("none")
        return terms[0] if len(terms) == 1 else KLSpec(parts=terms)

    def __str__(self) -> str:
        if self.parts:
            return "+".join(str(term) for term in self.parts)
        if self.placement is None:
            return "none"
        name = f"{self.estimator}_{self.placement}"
        # Each default is asked for with all that it depends on.
        decided: dict[str, Any] = {}
        defaults: dict[str, Any] = {}
        for option in (*_DECIDERS, *OPTIONS):
            if option not in defaults:
                default = KLSpec(self.estimator, self.placement, **decided)
                defaults[option] = getattr(default, option)
                if option in _DECIDERS:
                    decided[option] = getattr(self, option)
        written = [name]
        for option in OPTIONS:
            value = getattr(self, option)
            if value is not None and value != defaults[option]:
                written.append(f"{option}={_number(value)}")
        return ",".join(written)

    def _check_sum(self) -> None:
        own = {k: v for k, v in vars(self).items() if k != "parts" and v is not None}
        if own:
            raise ValueError(f"a sum of kl_types takes no options of its own, got {own}")
        if len(self.parts) < 2:
            raise ValueError("a sum of kl_types needs at least two terms")
        for term in self.parts:
            if term.estimator == "none" or term.parts:
                raise ValueError(f"kl_type {str(term)!r} can't be a term of a sum. Leave it out")
        if len(set(self.parts)) < len(self.parts):
            raise ValueError(
                f"kl_type {'+'.join(map(str, self.parts))!r} has the same term twice: "
                "set a larger kl_coef instead"
            )

    def _check_none(self) -> None:
        own = [k for k in ("placement", *OPTIONS) if getattr(self, k) is not None]
        if own:
            raise ValueError(f"kl_type 'none' takes no options, got {', '.join(own)}")

    def _check_name(self) -> None:
        if self.estimator not in ESTIMATORS:
            known = (*ESTIMATORS, "none")
            raise ValueError(
                f"estimator {self.estimator!r} is unknown; known: {', '.join(known)}."
                + _nearest(str(self.estimator), known)
            )
        _choice("placement", self.placement)

    def _one_program(self) -> None:
        """k1 in the reward under the policy loss's own ratio is k2 as loss there, to the bit."""
        if self.placement != "in_reward" or self.head in (None, "separate"):
            return
        _choice("head", self.head)
        if self.estimator != "k1":
            raise ValueError(
                f"kl_type {self.estimator}_in_reward: head={self.head} is refused: the head takes "
                "an estimator's derivative at the current policy, and the reward has its value. "
                f"Use '{self.estimator}_as_loss,head={self.head}'"
            )
        if self.horizon == "token" or self.reward_norm == "group":
            key = "horizon" if self.horizon == "token" else "reward_norm"
            raise ValueError(
                f"kl_type k1_in_reward: {key}={getattr(self, key)} is refused with "
                f"head={self.head}, which joins whole answers' KL after group normalisation. "
                f"Use 'k2_as_loss,head={self.head}'"
            )
        self._fill(estimator="k2", placement="as_loss", horizon="sequence", reward_norm=None)

    def _complete(self) -> None:
        """Fill the axes left out, and refuse what means nothing, with the nearest valid form."""
        name = f"{self.estimator}_{self.placement}"
        self._complete_alpha(name)
        if self.placement == "in_reward":
            self._complete_in_reward(name)
        else:
            self._complete_as_loss(name)
        bound = math.inf if self.bound is None else self.bound
        if math.isnan(bound) or bound <= 0:
            raise ValueError(f"kl_type {name}: bound={bound!r} must be a positive number, or none")
        if math.isfinite(bound) and self.horizon == "sequence" and self.placement == "as_loss":
            self._check_bound_on_answers(name, bound)
        self._fill(bound=float(bound))

    def _complete_alpha(self, name: str) -> None:
        if self.estimator != "alpha":
            if self.alpha is not None:
                raise ValueError(
                    f"kl_type {name}: alpha={_number(self.alpha)} is refused: it is for "
                    f"'alpha_{self.placement}'"
                )
            return
        alpha = 0.5 if self.alpha is None else self.alpha
        if not math.isfinite(alpha) or alpha in (0, 1):
            reason = "it must be finite"
            if alpha in (0, 1):
                other = "forward" if alpha == 0 else "k2"
                reason = f"the divergence's limit there is that of '{other}_as_loss'"
            raise ValueError(f"kl_type {name}: alpha={alpha:g} is refused: {reason}")
        self._fill(alpha=float(alpha))

    def _complete_in_reward(self, name: str) -> None:
        if self.horizon not in (None, "sequence"):
            _choice("horizon", self.horizon)
            raise ValueError(
                f"kl_type {name}: horizon=token is refused: a reward is credited to every token "
                "before it. The own-token form is 'k2_as_loss'"
            )
        if self.ratio not in (None, "none"):
            _choice("ratio", self.ratio)
            raise ValueError(
                f"kl_type {name}: ratio={self.ratio} is refused: a reward is frozen at the start "
                "of the step, and the host's policy loss has the ratio. A weight of its own has "
                f"'{self._over_answers()}'"
            )
        self._refuse_weight_options(
            f"{name} has no ratio of its own. Leave it out, or use '{self._over_answers()}'"
        )
        reference = self.reference or "ref"
        _choice("reference", reference)
        if reference == "rollout":
            raise ValueError(
                f"kl_type {name}: reference=rollout is refused: frozen at the start of the step, "
                "where the policy is the sampler, it holds nothing back. Use "
                "'k2_as_loss,reference=rollout'"
            )
        baseline, reward_norm = self.baseline or "none", self.reward_norm or "none"
        _choice("baseline", baseline)
        _choice("reward_norm", reward_norm)
        if baseline != "none" and reward_norm == "group":
            raise ValueError(
                f"kl_type {name}: baseline={baseline} with reward_norm=group is refused: the "
                "group's mean is taken off already. Leave one of them out"
            )
        self._fill(
            ratio="none",
            head="separate",
            horizon="sequence",
            baseline=baseline,
            reference=reference,
            reward_norm=reward_norm,
        )

    def _complete_as_loss(self, name: str) -> None:
        if self.reward_norm is not None:
            raise ValueError(
                f"kl_type {name}: reward_norm={self.reward_norm} is refused: a KL in the loss "
                f"meets no reward. It is for '{self.estimator}_in_reward'"
            )
        horizon, head = self.horizon or "token", self.head or "separate"
        reference, baseline = self.reference or "ref", self.baseline or "none"
        _choice("horizon", horizon)
        _choice("head", head)
        _choice("reference", reference)
        _choice("baseline", baseline)
        if horizon == "sequence":
            self._check_answers(name)
        self._fill(horizon=horizon, head=head, reference=reference)
        if head == "separate":
            self._complete_ratio(name, horizon, reference, baseline)
        else:
            self._check_head(name, head, reference, baseline)
        self._fill(baseline=baseline)

    def _check_answers(self, name: str) -> None:
        if self._is_exact_on_answers:
            return
        other = {"k3": "forward", "abs": "tv"}.get(str(self.estimator))
        also = f", and of its own divergence '{other}_as_loss,horizon=sequence'" if other else ""
        raise ValueError(
            f"kl_type {name}: horizon=sequence is refused: for {self.estimator} the "
            "reward-to-go of the derivative adds noise and no expectation. The gradient "
            f"of whole answers has 'k2_as_loss,horizon=sequence'{also}"
        )

    @property
    def _is_exact_on_answers(self) -> bool:
        return self.definition.later is not None or self.definition.of_answer is not None

    def _over_answers(self) -> str:
        """The nearest form that is exact on whole answers, for a message."""
        name = f"{self.estimator if self._is_exact_on_answers else 'k2'}_as_loss"
        alpha = f",alpha={_number(self.alpha)}" if self.estimator == "alpha" else ""
        return f"{name}{alpha},horizon=sequence"

    def _check_bound_on_answers(self, name: str, bound: float) -> None:
        if self.estimator != "k2":
            raise ValueError(
                f"kl_type {name}: bound={_number(bound)} with horizon=sequence is refused: later "
                "tokens enter by their values, which a bound on the derivative does not touch. "
                f"Use 'k2_as_loss,horizon=sequence,bound={_number(bound)}', or horizon=token"
            )

    def _check_head(self, name: str, head: str, reference: str, baseline: str) -> None:
        reason = f"head={head} has the ratio and the clip of the policy loss. Leave it out"
        if self.ratio is not None:
            raise ValueError(f"kl_type option ratio={self.ratio} is refused: {reason}")
        self._refuse_weight_options(reason)
        if reference == "rollout":
            raise ValueError(
                f"kl_type {name}: reference=rollout with head={head} is refused: it needs "
                "ratio=rollout, and the policy loss's ratio is to old. "
                f"Use '{name},reference=rollout'"
            )
        if baseline != "none":
            raise ValueError(
                f"kl_type {name}: baseline={baseline} with head={head} is refused: under a clip "
                f"it is biased. Use '{self._over_answers()},baseline={baseline}'"
            )

    def _complete_ratio(self, name: str, horizon: str, reference: str, baseline: str) -> None:
        ratio = self.ratio or ("rollout" if reference == "rollout" else "old")
        _choice("ratio", ratio)
        if reference == "rollout" and ratio != "rollout":
            raise ValueError(
                f"kl_type {name}: ratio={ratio} with reference=rollout is refused: the answers "
                "come from the sampler, and only its own ratio makes this a gradient of "
                "KL(pi||rollout). Leave ratio out"
            )
        if baseline != "none" and horizon == "token":
            raise ValueError(
                f"kl_type {name}: baseline={baseline} with horizon=token is refused: an own "
                "token's coefficient is no return. "
                f"Use '{self._over_answers()},baseline={baseline}'"
            )
        self._fill(ratio=ratio)
        if ratio == "none":
            self._refuse_weight_options("with ratio=none there is no weight. Leave one of them out")
            return
        level = self.level or ("prefix" if horizon == "sequence" else "token")
        _choice("level", level)
        if horizon == "sequence" and level == "token":
            raise ValueError(
                f"kl_type {name}: level=token with horizon=sequence is refused: it is biased, on "
                "tokens later than this one. Use level=prefix (the default there) or sequence"
            )
        mode = self.mode or "truncate"
        _choice("mode", mode)
        cap = self.cap
        if cap is None:
            cap = 10.0 if baseline == "none" else math.inf
        if math.isnan(cap) or cap <= 0:
            raise ValueError(f"kl_type {name}: cap={cap!r} must be a positive number, or none")
        if mode == "mask" and cap < 1:
            raise ValueError(
                f"kl_type {name}: cap={_number(cap)} with mode=mask would drop every token of "
                "on-policy data, whose ratio is 1. Use a cap of at least 1, or mode=truncate"
            )
        if baseline != "none" and math.isfinite(cap):
            raise ValueError(
                f"kl_type {name}: cap={_number(cap)} with baseline={baseline} is refused: under a "
                "cap the baseline is biased. Use cap=none (the default there), or baseline=none"
            )
        self._fill(level=level, mode=mode, cap=float(cap))

    def _refuse_weight_options(self, reason: str) -> None:
        for option in ("level", "cap", "mode"):
            value = getattr(self, option)
            if value is not None:
                raise ValueError(f"kl_type option {option}={_number(value)} is refused: {reason}")

    def _fill(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isinf(value):
        return "none"
    text = repr(value)
    return text[:-2] if text.endswith(".0") else text


def parse(text: str | KLSpec) -> KLSpec:
    """The ``KLSpec`` that a ``kl_type`` string names: ``<estimator>_<placement>[,key=value...]``.

    Terms are joined by ``+``; ``none`` is no KL at all. A ``KLSpec`` is returned as it is.

    Raises:
        ValueError: an unknown name or option (the message lists what there is and the nearest
            match), or a combination that means nothing (with the reason and the valid form).
        TypeError: neither a string nor a ``KLSpec``.

    >>> str(parse("low_var_kl_as_loss, ratio=old, cap=5"))
    'k3_as_loss,cap=5'
    """
    if isinstance(text, KLSpec):
        return text
    if not isinstance(text, str):
        raise TypeError(f"kl_type must be a string or a KLSpec, got {type(text).__name__}")
    # Not the sign of an exponent, as in cap=1e+3.
    terms = [part.strip() for part in re.split(r"(?<![0-9][eE])\+", text)]
    if len(terms) > 1:
        if not all(terms):
            raise ValueError(f"kl_type {text!r} has an empty term beside '+'")
        return KLSpec(parts=tuple(_term(part) for part in terms))
    return _term(terms[0])


def _term(text: str) -> KLSpec:
    name, *options = (part.strip() for part in text.split(","))
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if key not in OPTIONS:
            raise ValueError(
                f"kl_type {text!r}: option {key!r} is unknown; known: {', '.join(OPTIONS)}."
                + _nearest(key, OPTIONS)
            )
        if not equals or not value:
            raise ValueError(f"kl_type {text!r}: option {key!r} needs a value, as in {key}=...")
        if key in values:
            raise ValueError(f"kl_type {text!r}: option {key!r} is given twice")
        values[key] = _limit(text, key, value) if key in _NUMBERS else value
    if name == "none":
        return KLSpec("none", **values)
    return KLSpec(*_name(name), **values)


def _limit(text: str, key: str, value: str) -> float:
    if value == "none" and key != "alpha":
        return math.inf
    try:
        return float(value)
    except ValueError:
        other = "" if key == "alpha" else " and not 'none'"
        raise ValueError(f"kl_type {text!r}: {key}={value!r} is no number{other}") from None


def _name(name: str) -> tuple[str, str]:
    for placement in PLACEMENTS:
        estimator = name.removesuffix(f"_{placement}")
        if estimator != name and ALIASES.get(estimator, estimator) in ESTIMATORS:
            return ALIASES.get(estimator, estimator), placement
    bare = ALIASES.get(name, name)
    if bare in ESTIMATORS:
        raise ValueError(
            f"kl_type {name!r} says no placement: write '{bare}_as_loss' or '{bare}_in_reward'"
        )
    known = (*_NAMES, "none")
    raise ValueError(
        f"kl_type {name!r} is unknown; known: {', '.join(known)}, and the aliases "
        f"{', '.join(_ALIAS_NAMES)}." + _nearest(name, (*known, *_ALIAS_NAMES))
    )


def check_kl_coef(spec: KLSpec, kl_coef: float | None) -> float:
    """The coefficient beta to use with ``spec``, or a ValueError that says what is wrong with it.

    ``none`` takes no coefficient (and gets 0); any other ``kl_type`` needs a finite, positive one.
    """
    if spec.estimator == "none":
        if kl_coef is not None:
            raise ValueError(f"kl_type 'none' takes no kl_coef, got {kl_coef!r}: leave it out")
        return 0.0
    if kl_coef is None:
        raise ValueError(f"kl_type {str(spec)!r} needs a kl_coef, a positive number")
    if isinstance(kl_coef, bool) or not isinstance(kl_coef, (int, float)):
        raise ValueError(f"kl_coef must be a number, got {kl_coef!r}")
    if kl_coef == 0:
        raise ValueError(
            f"kl_coef is 0, so kl_type {str(spec)!r} would do nothing: "
            "write kl_type 'none', or a positive kl_coef"
        )
    if not (math.isfinite(kl_coef) and kl_coef > 0):
        raise ValueError(f"kl_coef must be finite and positive, got {kl_coef!r}")
    return float(kl_coef)
