"""What klplug does in a run, read from verl's own settings."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

import klplug
from klplug import KLSpec, parse
from klplug.controllers import SETTINGS as CONTROLLER_SETTINGS
from klplug.hosting.references import SETTINGS as REFERENCE_SETTINGS
from klplug.hosting.settings import Asked, Settings, SettingsError, Unknown
from klplug.hosting.stored import SETTINGS as SOURCE_SETTINGS
from klplug.spec import TermSpec
from klplug_verl.keys import (
    CTRL_HORIZON,
    CTRL_TARGET,
    CTRL_TYPE,
    ESTIMATOR,
    KEYS,
    KL_COEF,
    KL_CTRL,
    KL_TYPE,
    LOSS_AGG,
    LOSS_MODE,
    LOSS_TYPE,
    MODEL,
    OTHERS,
    PLACES,
    STOCK,
    TRAINER_MODE,
    Config,
    is_stock,
    read,
)

# They take the token mean of each answer themselves, whatever the aggregation.
MEAN_OF_ANSWER_LOSSES = ("sapo", "geo_mean")


@dataclass(frozen=True)
class Plan(Asked):
    """What the trainer does in a run, read from the ``klplug`` node of its resolved config.

    Attributes:
        bootstraps: advantages are those of a value function (``gae``), which learns the KL with the
            reward: both are in the tokens' rewards before it.
    """

    bootstraps: bool = False

    def before_advantages(self, term: TermSpec) -> bool:
        """Whether a term in the reward joins the tokens' rewards, and not the advantages."""
        return self.bootstraps or term.reward_norm == "group"

    @classmethod
    def of(cls, config: Any) -> Plan | None:
        """The plan of a run, or ``None`` where nobody asked for klplug."""
        own = read(config, "klplug")
        if own is None:
            return None
        spec = parse(own["kl_type"])
        return cls(
            spec=spec,
            kl_coef=klplug.check_kl_coef(spec, own.get("kl_coef")),
            kl_ctrl=own.get("kl_ctrl") or "fixed",
            **{name: own.get(name) for name in OTHERS},
            divides_by_length=divides_by_length(Config(config)),
            model=read(config, MODEL),
            bootstraps=read(config, ESTIMATOR) == "gae",
        )


def aggregation_divides(settings: Settings) -> bool:
    """Whether losses are divided by the answer's length where they are added up."""
    return bool(settings.get(LOSS_AGG) == "seq-mean-token-mean")


def divides_by_length(settings: Settings) -> bool:
    mode = settings.get(LOSS_MODE)
    return (
        aggregation_divides(settings)
        or mode in MEAN_OF_ANSWER_LOSSES
        # Before 0.9, which has this setting, it takes no aggregation.
        or (mode == "gspo" and not settings.has(TRAINER_MODE))
    )


def asked(settings: Settings) -> Plan | None:
    """What the user asked of klplug, by its own keys or by a ``kl_type`` in verl's; or ``None``.

    Raises:
        ValueError: names what is wrong, the value, and what is allowed.
    """
    own = settings.below("klplug")
    wanted = _by_verls_keys(settings) if own is None else _by_own_keys(own, settings)
    if wanted is None:
        return None
    spec = parse(wanted["kl_type"])
    try:
        coef = settings.get(wanted["kl_coef"])
        if coef is None:
            coef = next((value for _, value in coefficients(spec, settings)), None)
        kl_coef = klplug.check_kl_coef(spec, coef)
    except Unknown:
        kl_coef = math.nan
    others: dict[str, Any] = {name: wanted.get(name) for name in OTHERS}
    kl_ctrl = wanted.get("kl_ctrl")
    plan = Plan(
        spec=spec,
        kl_coef=kl_coef,
        kl_ctrl="fixed" if kl_ctrl is None else kl_ctrl,
        **others,
    )
    plan.controller()
    plan.moving()
    return plan


def coefficients(spec: KLSpec, settings: Settings) -> list[tuple[str, Any]]:
    """Verl's own coefficients of the placements that ``spec`` has, where the command says them.

    One of 0 belongs to a KL that is switched off.
    """
    placements = {term.placement for term in spec.terms}
    return [
        (key, value)
        for placement, _, _, key in PLACES
        if placement in placements and settings.wrote(key) and (value := settings.get(key))
    ]


def _by_verls_keys(settings: Settings) -> dict[str, Any] | None:
    """A full ``kl_type`` where verl has the name of an estimator, with verl's own controller.

    As what klplug's own keys would say; ``kl_coef`` is the key that holds it.
    """
    if not settings.has(LOSS_TYPE) or not settings.has("algorithm"):
        return None
    given = []
    for placement, _, key, coef in PLACES:
        name = str(settings.get(key))
        if is_stock(name):
            continue
        spec = _named(key, name)
        if not spec.terms or spec.placed(placement) != spec:
            raise SettingsError(
                f"{key}={spec}: this key takes kl_types that end in _{placement}. "
                f"Write +klplug.kl_type={quoted(spec)}, which goes where it belongs"
            )
        given.append((placement, key, coef, spec))
    if not given:
        return None
    if len(given) == 2:
        both = "+".join(str(spec) for _, _, _, spec in reversed(given))
        said = " and ".join(f"{key}={spec}" for _, key, _, spec in given)
        raise SettingsError(
            f"{said}: two KL terms at once are to be said in one place, as in "
            f"+klplug.kl_type={quoted(both)}. Else leave one out"
        )
    ((placement, _, coef, spec),) = given
    wanted: dict[str, Any] = {"kl_type": str(spec), "kl_coef": coef}
    if placement == "in_reward":
        adaptive = settings.get(CTRL_TYPE) == "adaptive"
        wanted |= {
            "kl_ctrl": settings.get(CTRL_TYPE),
            "kl_target": settings.get(CTRL_TARGET) if adaptive else None,
            "kl_horizon": settings.get(CTRL_HORIZON) if adaptive else None,
        }
    return wanted


def _named(key: str, name: str) -> KLSpec:
    try:
        return parse(name)
    except ValueError as error:
        raise SettingsError(f"{key}: {error} verl's own: {', '.join(STOCK)}") from None


def _by_own_keys(own: Any, settings: Settings) -> dict[str, Any]:
    if not hasattr(own, "keys"):
        raise SettingsError(
            f"klplug={own!r}: write its keys one by one, as in +klplug.kl_type=k2_as_loss"
        )
    for key in own:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingsError(
                f"klplug.{key} is unknown; known: {', '.join(f'klplug.{k}' for k in KEYS)}.{hint}"
            )
    kl_type = settings.get(KL_TYPE)
    if kl_type is None:
        raise SettingsError(
            "klplug.kl_type is missing, as in +klplug.kl_type=k2_as_loss +klplug.kl_coef=1e-3. "
            f"Known: {', '.join(klplug.kl_types())}"
        )
    if not isinstance(kl_type, str):
        raise SettingsError(f"klplug.kl_type={kl_type!r} is not a string")
    strings = {
        name: settings.get(f"klplug.{name}") for name in (*REFERENCE_SETTINGS, *SOURCE_SETTINGS)
    }
    for name, value in strings.items():
        if value is not None and not isinstance(value, str):
            raise SettingsError(f"klplug.{name}={value!r} is not a string")
    return {
        "kl_type": kl_type,
        "kl_coef": KL_COEF,
        "kl_ctrl": settings.get(KL_CTRL),
        **{name: settings.get(f"klplug.{name}") for name in CONTROLLER_SETTINGS},
        **strings,
    }


def quoted(spec: KLSpec | str) -> str:
    text = str(spec)
    return f'"{text}"' if set(text) & set(",=") else text
