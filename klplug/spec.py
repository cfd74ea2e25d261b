"""``kl_type``: the one string that a user sets, and its parsed, validated form."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from klplug.estimators import ALIASES, ESTIMATORS

PLACEMENTS = ("in_reward", "as_loss")
RATIOS = ("old", "none", "rollout")
LEVELS = ("token", "prefix", "sequence")
MODES = ("truncate", "mask")
HORIZONS = ("token", "sequence")
REWARD_NORMS = ("none", "group")

# Written options, in canonical order.
OPTIONS = ("ratio", "level", "cap", "mode", "horizon", "bound", "reward_norm")

_NAMES = tuple(f"{e}_{p}" for e in ESTIMATORS for p in PLACEMENTS)
_ALIAS_NAMES = tuple(f"{a}_{p}" for a in ALIASES for p in PLACEMENTS)


def _nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def _choice(option: str, value: Any, allowed: tuple[str, ...]) -> None:
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
        estimator: ``k1``, ``k2``, ``k3``, ``abs``, or ``none``; ``None`` for a sum.
        placement: ``in_reward`` or ``as_loss``; ``None`` for ``none`` and for a sum.
        ratio: the policy that the samples are corrected for: ``old``, ``rollout`` or ``none``.
        level: ``token``, ``prefix`` or ``sequence``: the product that makes up the ratio.
        cap: bound of the ratio; ``inf`` for none.
        mode: ``truncate`` (min(ratio, cap)) or ``mask`` (0 above the cap).
        horizon: ``token`` (own token, LOC) or ``sequence`` (whole answer, FULL).
        bound: bound of each token's |c|, before ratio and horizon; ``inf`` for none.
        reward_norm: in_reward only. ``none`` (joined after group normalisation: its force is
            kl_coef) or ``group`` (joined before, as verl does it: kl_coef over the group's std).
        parts: the terms of a sum, empty for a single one; see ``terms``.
    """

    estimator: str | None = None
    placement: str | None = None
    ratio: str | None = None
    level: str | None = None
    cap: float | None = None
    mode: str | None = None
    horizon: str | None = None
    bound: float | None = None
    reward_norm: str | None = None
    parts: tuple[KLSpec, ...] = ()

    def __post_init__(self) -> None:
        if self.parts:
            self._check_sum()
        elif self.estimator == "none":
            self._check_none()
        else:
            self._check_name()
            self._complete()

    @property
    def terms(self) -> tuple[KLSpec, ...]:
        """The terms of a sum; a single formulation is its own only term."""
        return self.parts or (self,)

    @property
    def requires(self) -> tuple[str, ...]:
        """Names of the tensors that ``kl_term`` needs beside ``log_probs`` and the mask."""
        needed: list[str] = []
        for term in self.terms:
            if term.estimator != "none":
                needed.append("ref_log_probs")
            if term.ratio in ("old", "rollout"):
                needed.append(f"{term.ratio}_log_probs")
        return tuple(dict.fromkeys(needed))

    def placed(self, placement: str) -> KLSpec:
        """The part of this formulation with this placement; ``none`` where there is none."""
        _choice("placement", placement, PLACEMENTS)
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
        # The level's default follows the horizon and the ratio, so ask for it with both written.
        default = KLSpec(self.estimator, self.placement, ratio=self.ratio, horizon=self.horizon)
        plain = KLSpec(self.estimator, self.placement)
        written = [name]
        for option in OPTIONS:
            value = getattr(self, option)
            reference = plain if option in ("ratio", "horizon") else default
            if value is not None and value != getattr(reference, option):
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
                raise ValueError(f"kl_type {str(term)!r} can't be a term of a sum")
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
        _choice("placement", self.placement, PLACEMENTS)

    def _complete(self) -> None:
        """Fill the axes left out, and refuse what means nothing, with the nearest valid form."""
        name = f"{self.estimator}_{self.placement}"
        if self.placement == "in_reward":
            self._complete_in_reward(name)
        else:
            self._complete_as_loss(name)
        bound = math.inf if self.bound is None else self.bound
        if math.isnan(bound) or bound <= 0:
            raise ValueError(f"kl_type {name}: bound={bound!r} must be a positive number, or none")
        self._fill(bound=float(bound))

    def _complete_in_reward(self, name: str) -> None:
        if self.horizon not in (None, "sequence"):
            _choice("horizon", self.horizon, HORIZONS)
            raise ValueError(
                f"kl_type {name}: horizon=token is refused: a reward is credited to every token "
                "before it. The own-token form is 'k2_as_loss'"
            )
        if self.ratio not in (None, "none"):
            _choice("ratio", self.ratio, RATIOS)
            raise ValueError(
                f"kl_type {name}: ratio={self.ratio} is refused: a reward is frozen at the start "
                "of the step, and the host's policy loss has the ratio. A weight of its own has "
                "'k2_as_loss,horizon=sequence'"
            )
        self._refuse_weight_options(f"{name} has no ratio of its own")
        reward_norm = self.reward_norm or "none"
        _choice("reward_norm", reward_norm, REWARD_NORMS)
        self._fill(ratio="none", horizon="sequence", reward_norm=reward_norm)

    def _complete_as_loss(self, name: str) -> None:
        if self.reward_norm is not None:
            raise ValueError(
                f"kl_type {name}: reward_norm={self.reward_norm} is refused: a KL in the loss "
                f"meets no reward. It is for '{self.estimator}_in_reward'"
            )
        horizon = self.horizon or "token"
        _choice("horizon", horizon, HORIZONS)
        if horizon == "sequence" and self.estimator != "k2":
            raise ValueError(
                f"kl_type {name}: horizon=sequence is refused: for {self.estimator} the "
                "reward-to-go of the derivative adds noise and no expectation. The gradient "
                "of whole answers has 'k2_as_loss,horizon=sequence'"
            )
        ratio = self.ratio or "old"
        _choice("ratio", ratio, RATIOS)
        self._fill(ratio=ratio, horizon=horizon)
        if ratio == "none":
            self._refuse_weight_options("with ratio=none there is no weight")
            return
        level = self.level or ("prefix" if horizon == "sequence" else "token")
        _choice("level", level, LEVELS)
        if horizon == "sequence" and level == "token":
            raise ValueError(
                f"kl_type {name}: level=token with horizon=sequence is refused: it is biased, on "
                "tokens later than this one. Use level=prefix (the default there) or sequence"
            )
        mode = self.mode or "truncate"
        _choice("mode", mode, MODES)
        cap = 10.0 if self.cap is None else self.cap
        if math.isnan(cap) or cap <= 0:
            raise ValueError(f"kl_type {name}: cap={cap!r} must be a positive number, or none")
        if mode == "mask" and cap < 1:
            raise ValueError(
                f"kl_type {name}: cap={_number(cap)} with mode=mask would drop every token of "
                "on-policy data, whose ratio is 1. Use a cap of at least 1, or mode=truncate"
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
        values[key] = _limit(text, key, value) if key in ("cap", "bound") else value
    if name == "none":
        return KLSpec("none", **values)
    return KLSpec(*_name(name), **values)


def _limit(text: str, key: str, value: str) -> float:
    if value == "none":
        return math.inf
    try:
        return float(value)
    except ValueError:
        raise ValueError(
            f"kl_type {text!r}: {key}={value!r} is neither a number nor 'none'"
        ) from None


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
