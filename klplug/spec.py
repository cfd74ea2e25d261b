"""``kl_type``: the one string that a user sets, and its parsed, validated form."""

from __future__ import annotations

import difflib
import functools
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from klplug.axes import AXES, CHOICES, OPTIONS, PLACEMENTS, Axis, size_of
from klplug.estimators import ALIASES, ESTIMATORS, Estimator, alpha_divergence
from klplug.numerics import LEAST, MOST, number_of
from klplug.refusals import Refused, refuse
from klplug.samples import Named, named

__all__ = [
    "CHOICES",
    "OPTIONS",
    "PLACEMENTS",
    "KLSpec",
    "MonitorSpec",
    "SumSpec",
    "TermSpec",
    "check_kl_coef",
    "parse",
    "sum_of",
]

_NAMES = tuple(f"{e}_{p}" for e in ESTIMATORS for p in PLACEMENTS)
_ALIAS_NAMES = tuple(f"{a}_{p}" for a in ALIASES for p in PLACEMENTS)

MONITOR = "monitor"
"""No force: the reference is loaded, and every metric is of the KL to it."""

EXACT = "exact_as_loss"
"""Another name of ``k2_as_loss,vocab=exact``."""

LEFT_OUT: Any = None
"""An axis that a term does not give: it takes its default."""


class KLSpec:
    """A parsed ``kl_type``, frozen: a sum of terms.

    ``none`` is the empty sum, and a single term is the sum of itself: a ``TermSpec``, which has the
    axes as attributes. ``str(spec)`` is canonical and ``parse(str(spec)) == spec``.
    """

    def __new__(cls, *_: Any, **__: Any) -> KLSpec:
        # KLSpec("k2", "as_loss") is a term, as pathlib.Path("a") is a path of this system.
        return super().__new__(TermSpec if cls is KLSpec else cls)

    @property
    def terms(self) -> tuple[TermSpec, ...]:
        """The terms: of a single one itself, of ``none`` and ``monitor`` none."""
        raise NotImplementedError

    @property
    def requires(self) -> tuple[str, ...]:
        """Names of what ``kl_term`` needs from a batch, beside ``log_probs`` and the mask."""
        needed = (
            name
            for term in self.terms
            for axis in _NEEDY
            for name in axis.needed(getattr(term, axis.name))
        )
        return tuple(dict.fromkeys(needed))

    @property
    def has_the_reward(self) -> bool:
        """Whether the reward acts through the KL, by ``reference=posterior``: then no policy loss
        does."""
        return any(term.reference == "posterior" for term in self.terms)

    @property
    def needs_ppo(self) -> bool:
        """Whether it is defined with PPO's policy loss alone: a head has that one's ratio and clip,
        and ``reference=posterior`` makes it 0."""
        return self.has_the_reward or any(
            term.head in ("combined", "clipped") for term in self.terms
        )

    @property
    def measures(self) -> bool:
        """Whether there is a KL to measure: with every ``kl_type`` but ``none``."""
        return bool(self.requires)

    def placed(self, placement: str) -> KLSpec:
        """The part of this formulation with this placement; ``none`` where there is none.

        ``monitor`` is measured where a loss is.
        """
        _check_choice("placement", placement, PLACEMENTS)
        return sum_of(term for term in self.terms if term.placement == placement)

    def __getattr__(self, name: str) -> Any:
        """What ``none`` and a sum had for an axis before they were told apart from a term."""
        if name not in _ATTRIBUTES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(
            f"kl_type {str(self)!r} has {len(self.terms)} terms and no {name} of its own: ask its "
            "terms, of which 'none' has none. This will be an error",
            DeprecationWarning,
            stacklevel=2,
        )
        return "none" if name == "estimator" and not self.terms else None


@dataclass(frozen=True)
class TermSpec(KLSpec):
    """One term of a ``kl_type``: a value on each axis, validated.

    What each axis means stands in its row of ``klplug.axes``. One that is left out takes its
    default, which depends on those before it; one that does not apply is ``None``. A number that is
    ``inf`` is no bound.

    Attributes:
        estimator: a name in ``ESTIMATORS``.
        placement: ``in_reward`` or ``as_loss``.
        factor: its coefficient in a sum, any number but 0. A negative one drives away from the
            term's reference: with another term it is extrapolation.

    Raises:
        ValueError: an unknown value, or a combination that means nothing.
    """

    estimator: str
    placement: str
    alpha: float | None = LEFT_OUT
    vocab: str = LEFT_OUT
    ratio: str | None = LEFT_OUT
    level: str | None = LEFT_OUT
    cap: float | None = LEFT_OUT
    mode: str | None = LEFT_OUT
    head: str = LEFT_OUT
    horizon: str = LEFT_OUT
    baseline: str = LEFT_OUT
    bound: float = LEFT_OUT
    weight: str = LEFT_OUT
    reference: str = LEFT_OUT
    reward_norm: str | None = LEFT_OUT
    factor: float = 1.0

    def __post_init__(self) -> None:
        self._check_name()
        self._check_factor()
        for name, axis in AXES.items():
            if (value := getattr(self, name)) is not None:
                self._fill(name, _checked(axis, value))
        written = self.name
        self._as_one_program()
        for name, axis in AXES.items():
            if getattr(self, name) is None:
                self._fill(name, axis.default(self))
        refuse(self, written)

    @property
    def name(self) -> str:
        """Estimator and placement, without options."""
        return f"{self.estimator}_{self.placement}"

    @property
    def terms(self) -> tuple[TermSpec, ...]:
        return (self,)

    @property
    def definition(self) -> Estimator:
        """The registry's row of the estimator."""
        return ESTIMATORS[self.estimator] if self.alpha is None else alpha_divergence(self.alpha)

    @property
    def needs_no_weight(self) -> bool:
        """Whether answers of any policy serve as they are: no sampled token stands in its KL."""
        return self.over_vocabulary and self.horizon == "token"

    @property
    def exact_on_answers(self) -> bool:
        """Whether the estimator's divergence has a form that is exact on whole answers."""
        return self.definition.later is not None or self.definition.of_answer is not None

    @property
    def exact_by_values(self) -> bool:
        """Whether that form adds up values of later tokens, which a vocabulary has too."""
        return self.definition.later is not None

    @property
    def by_answer_so_far(self) -> bool:
        """Whether that form has c of all tokens up to this one at once."""
        return self.definition.of_answer is not None

    @property
    def over_vocabulary(self) -> bool:
        """Whether the expectation over each token is taken, and not sampled."""
        return self.vocab != "sample"

    @property
    def top(self) -> int | None:
        """How many tokens have a category of their own; ``None`` where all or none have."""
        return size_of(self.vocab)[1]

    @property
    def weighting(self) -> Named | None:
        """What ``weight`` names."""
        return None if self.weight == "none" else named(self.weight)

    @property
    def alone(self) -> TermSpec:
        """The term without its factor."""
        return self if self.factor == 1 else replace(self, factor=1.0)

    def __str__(self) -> str:
        factor = "" if self.factor == 1 else f"{AXES['cap'].shown(self.factor)}*"
        written = [factor + self.name]
        for option in OPTIONS:
            axis, value = AXES[option], getattr(self, option)
            if value != axis.default(self):
                written.append(f"{option}={axis.shown(value)}")
        return ",".join(written)

    def _check_name(self) -> None:
        if self.estimator not in ESTIMATORS:
            known = (*ESTIMATORS, "none")
            raise Refused(
                f"estimator {self.estimator!r} is unknown."
                f"{_nearest(str(self.estimator), known)} Known: {', '.join(known)}",
                "unknown-name",
            )
        _check_choice("placement", self.placement, PLACEMENTS)

    def _check_factor(self) -> None:
        factor = number_of(self.factor)
        if factor is None:
            raise Refused(
                f"kl_type {self.name}: the coefficient {self.factor!r} is no number", "no-factor"
            )
        if not LEAST <= abs(factor) <= MOST:
            raise Refused(
                f"kl_type {self.name}: the coefficient {factor:g} must be finite and not 0 "
                "in float32. Leave the term out, or write another number",
                "no-factor",
            )
        self._fill("factor", factor)

    def _as_one_program(self) -> None:
        """k1 in the reward under the policy loss's own ratio is k2 as loss there, to the bit."""
        if (
            (self.estimator, self.placement) == ("k1", "in_reward")
            and self.head in ("combined", "clipped")
            and self.horizon in (None, "sequence")
            and self.reward_norm in (None, "none")
        ):
            self._fill("estimator", "k2")
            self._fill("placement", "as_loss")
            self._fill("horizon", "sequence")
            self._fill("reward_norm", None)

    def _fill(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class SumSpec(KLSpec):
    """``none``, or several terms at once: see ``sum_of``."""

    parts: tuple[TermSpec, ...]

    def __post_init__(self) -> None:
        if len({part.alone for part in self.parts}) < len(self.parts):
            raise Refused(
                f"kl_type {str(self)!r} has the same term twice: write it once, with the sum of "
                "the coefficients before it",
                "same-term-twice",
            )
        if self.has_the_reward and len(self.parts) > 1:
            raise Refused(
                f"kl_type {str(self)!r}: reference=posterior stands alone, for the KL to ref is in "
                "it already. Leave the other terms out",
                "posterior-in-a-sum",
            )

    @property
    def terms(self) -> tuple[TermSpec, ...]:
        return self.parts

    def __str__(self) -> str:
        return "+".join(map(str, self.parts)) or "none"


@dataclass(frozen=True)
class MonitorSpec(KLSpec):
    """``monitor``: the KL to the reference model is measured, and nothing acts."""

    @property
    def terms(self) -> tuple[TermSpec, ...]:
        return ()

    @property
    def requires(self) -> tuple[str, ...]:
        return AXES["reference"].needs["ref"]

    def placed(self, placement: str) -> KLSpec:
        _check_choice("placement", placement, PLACEMENTS)
        return self if placement == "as_loss" else sum_of(())

    def __str__(self) -> str:
        return MONITOR


_NEEDY = tuple(axis for axis in AXES.values() if axis.needs)
_ATTRIBUTES = ("estimator", "placement", *OPTIONS)


def sum_of(terms: Iterable[TermSpec]) -> KLSpec:
    """The sum of ``terms``: ``none`` without any, and of one that term itself.

    A sum has one order, whatever order it is given in: what has a negative coefficient comes last,
    for no command line takes a value that begins with a minus; then what is in the reward, then by
    name.

    Raises:
        ValueError: the same term twice.
    """
    terms = tuple(
        sorted(
            terms,
            key=lambda term: (term.factor < 0, PLACEMENTS.index(term.placement), str(term.alone)),
        )
    )
    return terms[0] if len(terms) == 1 else SumSpec(terms)


def parse(text: str | KLSpec) -> KLSpec:
    """The ``KLSpec`` that a ``kl_type`` string names: ``<estimator>_<placement>[,key=value...]``.

    Terms are joined by ``+``, each with a coefficient before ``*`` where it is not 1; ``none`` is
    no KL at all, and ``monitor`` one without force. A ``KLSpec`` is returned as it is.

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
    return _parsed(text)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> KLSpec:
    # Not the sign of a number's exponent, as in cap=1e+3, and yet one behind weight=mask:v1e. Read
    # from behind, for what a lookbehind looks for is of one length.
    behind = re.split(r"\+(?![eE][0-9._]*[0-9.](?!\w))", text[::-1])
    parts = [part[::-1].strip() for part in behind[::-1]]
    if len(parts) == 1:
        return _part(text.strip())
    if not all(parts):
        raise Refused(f"kl_type {text!r} has an empty term beside '+'", "empty-term")
    specs = [_part(part) for part in parts]
    for spec in specs:
        if not spec.terms:
            raise Refused(
                f"kl_type {str(spec)!r} can't be a term of a sum. Leave it out", "none-in-a-sum"
            )
    return sum_of(term for spec in specs for term in spec.terms)


def _part(text: str) -> KLSpec:
    """One term, or ``none``."""
    name, *options = (part.strip() for part in text.split(","))
    number, times, name = name.rpartition("*")
    name = name.strip()
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if key not in AXES:
            raise Refused(
                f"kl_type {text!r}: option {key!r} is unknown.{_nearest(key, OPTIONS)} "
                f"Known: {', '.join(OPTIONS)}",
                "unknown-option",
            )
        if not equals or not value:
            raise Refused(
                f"kl_type {text!r}: option {key!r} needs a value, as in {key}=...", "no-value"
            )
        if key in values:
            raise Refused(f"kl_type {text!r}: option {key!r} is given twice", "option-twice")
        values[key] = _number(text, AXES[key], value) if AXES[key].number else value
    if times:
        values["factor"] = _factor(text, number.strip())
        if not name:
            raise Refused(f"kl_type {text!r}: no name stands behind '*'", "unknown-name")
    if name == "exact_in_reward":
        values["vocab"] = "exact"
        return TermSpec("k2", "in_reward", **values)  # which is refused with its reason
    if name == EXACT:
        if values.setdefault("vocab", "exact") != "exact":
            raise Refused(
                f"kl_type {text!r}: {EXACT} is 'k2_as_loss,vocab=exact'. Leave vocab out",
                "unknown-value",
            )
        return TermSpec("k2", "as_loss", **values)
    if name not in ("none", MONITOR):
        return TermSpec(*_estimator_and_placement(name), **values)
    if values:
        given = ", ".join(option for option in OPTIONS if option in values) or "a coefficient"
        raise Refused(f"kl_type {name!r} takes no options, got {given}", "options-of-none")
    return sum_of(()) if name == "none" else MonitorSpec()


def _number(text: str, axis: Axis, value: str) -> float:
    if value in axis.choices:
        return math.inf
    try:
        return float(value)
    except ValueError:
        other = f" and not {axis.choices[0]!r}" if axis.choices else ""
        raise Refused(
            f"kl_type {text!r}: {axis.name}={value!r} is no number{other}", "no-number"
        ) from None


def _factor(text: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise Refused(
            f"kl_type {text!r}: {number!r} before '*' is no number, as in 0.5*k2_as_loss. Terms "
            "are joined by '+', one with a negative coefficient too: +-0.5*k2_as_loss",
            "no-factor",
        ) from None


def _estimator_and_placement(name: str) -> tuple[str, str]:
    if name in ("full", "full_as_loss", "full_in_reward"):
        raise Refused(
            f"kl_type {name!r} is unknown: the KL over the whole vocabulary is {EXACT!r}, that of "
            "whole answers 'k2_as_loss,horizon=sequence'",
            "unknown-name",
        )
    for placement in PLACEMENTS:
        estimator = name.removesuffix(f"_{placement}")
        if estimator != name and ALIASES.get(estimator, estimator) in ESTIMATORS:
            return ALIASES.get(estimator, estimator), placement
    bare = ALIASES.get(name, name)
    if bare in ESTIMATORS:
        raise Refused(
            f"kl_type {name!r} says no placement: write '{bare}_as_loss' or '{bare}_in_reward'",
            "no-placement",
        )
    if name.startswith(tuple("-.0123456789")):
        raise Refused(
            f"kl_type {name!r} is unknown. A coefficient is a number before '*', as in "
            "0.5*k2_as_loss or -1*k2_as_loss",
            "unknown-name",
        )
    aliases = (*_ALIAS_NAMES, EXACT)
    # Nobody is led to one that does nothing who did not write its estimator.
    meant = [
        known
        for known in (*_NAMES, *aliases, "none", MONITOR)
        if not _does_nothing(known) or name.startswith(known.partition("_")[0])
    ]
    raise Refused(
        f"kl_type {name!r} is unknown.{_nearest(name, meant)} Known: {', '.join(_NAMES)}, none, "
        f"{MONITOR}, and the aliases {', '.join(aliases)}",
        "unknown-name",
    )


def _does_nothing(name: str) -> bool:
    """Whether the expected gradient that a name stands for is zero."""
    for placement in PLACEMENTS:
        estimator = name.removesuffix(f"_{placement}")
        if row := ESTIMATORS.get(ALIASES.get(estimator, estimator)):
            return row.role(placement).target == "zero"
    return False


def _checked(axis: Axis, value: Any) -> str | float:
    """``value``, if it is one that ``axis`` takes."""
    if axis.named and isinstance(value, str) and value not in axis.choices:
        return named(value).written
    if axis.sized and isinstance(value, str) and value.partition(":")[0] in axis.sized:
        return _sized(axis, value)
    if not axis.number:
        _check_choice(axis.name, value, axis.words)
        return str(value)
    if (number := number_of(value)) is None:
        raise Refused(f"kl_type option {axis.name}={value!r} is no number", "no-number")
    return number


def _sized(axis: Axis, value: str) -> str:
    """``topk:064`` as ``topk:64``."""
    word, _, number = value.partition(":")
    number = number.lstrip("0")
    # Of so many digits none is a vocabulary's, and of more than 4300 Python makes no number.
    if not (number.isascii() and number.isdigit() and len(number) <= 15):
        raise Refused(
            f"kl_type option {axis.name}={value} needs a whole number of at least 1, and of "
            f"15 digits at most, as in {axis.name}={word}:64",
            "no-size",
        )
    return f"{word}:{int(number)}"


def _check_choice(option: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise Refused(
            f"kl_type option {option}={value!r} is unknown.{_nearest(str(value), allowed)} "
            f"Allowed: {', '.join(allowed)}",
            "unknown-value",
        )


def _nearest(word: str, known: Iterable[str]) -> str:
    """The name nearest to ``word`` as a question; the first of those equally near."""
    likeness = {name: difflib.SequenceMatcher(None, word, name).ratio() for name in known}
    best = max(likeness, key=lambda name: likeness[name])
    return f" Did you mean {best!r}?" if likeness[best] >= 0.5 else ""


def check_kl_coef(spec: KLSpec, kl_coef: float | None) -> float:
    """The coefficient beta to use with ``spec``, or a ValueError that says what is wrong with it.

    ``none`` and ``monitor`` take none (and get 0); any other ``kl_type`` needs a finite, positive
    one.
    """
    if not spec.terms:
        if kl_coef is not None:
            raise ValueError(
                f"kl_type {str(spec)!r} takes no kl_coef, got {kl_coef!r}: leave it out"
            )
        return 0.0
    if kl_coef is None:
        raise ValueError(f"kl_type {str(spec)!r} needs a kl_coef, a positive number")
    number = number_of(kl_coef)
    if number is None:
        raise ValueError(f"kl_coef must be a number, got {kl_coef!r}")
    if number == 0:
        raise ValueError(
            f"kl_coef is 0, so kl_type {str(spec)!r} would do nothing. Write kl_type 'none', or "
            "'monitor' for its metrics alone, or a positive kl_coef"
        )
    if not LEAST <= number <= MOST:
        raise ValueError(f"kl_coef must be finite and positive in float32, got {number!r}")
    return number
