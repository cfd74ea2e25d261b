"""What the hooks do in a run, read from OpenRLHF's own ``args``."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import klplug
from klplug import KLSpec, parse
from klplug.controllers import SETTINGS as CONTROLLER_SETTINGS
from klplug.hosting.settings import Asked, Settings, SettingsError, Unknown
from klplug.spec import TermSpec, sum_of
from klplug_openrlhf.keys import (
    COEF,
    KIND,
    KL_COEF,
    KL_CTRL,
    KL_TYPE,
    LOSS_AGG,
    POLICY_LOSS,
    PRETRAIN,
    REF_MODEL,
    REF_UPDATE,
    SOURCE,
    STOCK_ESTIMATORS,
    TEACHER,
    Arguments,
    read,
)

ACTIVE = "klplug/active"


@dataclass(frozen=True)
class Recorder:
    """The only switch by which a release records the sampler's log-probs.

    It also corrects the policy loss by them, which ``attribute`` of ``PolicyLoss`` turns off again.
    """

    option: str
    on: str | bool
    off: str | bool
    attribute: str


RECORDERS = (
    Recorder("algo.advantage.is_correction_level", "token", "off", "is_correction_level"),
    Recorder("algo.advantage.is_correction_enable", True, False, "enable_vllm_is_correction"),
)


@dataclass(frozen=True)
class Plan(Asked):
    """What the hooks do in a run, read from OpenRLHF's own ``args``, which reach every process."""

    records_for_kl: bool = False

    @property
    def in_reward_plain(self) -> KLSpec:
        """What is in the reward without its baselines: terms that are one then are added up."""
        factors: dict[TermSpec, float] = defaultdict(float)
        for term in self.in_reward.terms:
            factors[replace(term.alone, baseline="none")] += term.factor
        return sum_of(replace(term, factor=f) for term, f in factors.items() if f)

    @property
    def combined(self) -> KLSpec:
        """The part of the loss that is inside the policy loss."""
        return sum_of(t for t in self.as_loss.terms if t.head == "combined")

    @property
    def in_policy_loss(self) -> KLSpec:
        """What changes the advantages of the policy loss: what is inside it, or has the reward."""
        return self.as_loss if self.spec.has_the_reward else self.combined

    @property
    def separate(self) -> KLSpec:
        """The part of the loss that is added to the policy loss."""
        return sum_of(t for t in self.as_loss.terms if t.head != "combined")

    @property
    def acts_on_experience(self) -> bool:
        """Whether a part of it happens where experience is made, before any training step."""
        with_baseline = any(term.baseline != "none" for term in self.as_loss.terms)
        sampler = self.is_active and not self.needs_reference
        carried = with_baseline or self.spec.has_the_reward or self.needs_teacher
        carried = carried or any(term.weight != "none" for term in self.as_loss.terms)
        return bool(self.in_reward.terms) or carried or sampler

    @classmethod
    def of(cls, args: Any) -> Plan | None:
        """The plan of a run, or ``None`` where nobody asked for klplug.

        A full ``kl_type`` as OpenRLHF's own estimator asks for it too, for code that drives the
        trainers itself.
        """
        kl_type = read(args, "klplug.kl_type")
        if kl_type is None:
            kl_type = read(args, "algo.kl.estimator")
            if kl_type in STOCK_ESTIMATORS:
                return None
        spec = parse(kl_type)
        coef = read(args, "klplug.kl_coef")
        if coef is None and spec.terms:
            coef = read(args, "algo.kl.init_coef")
        return cls(
            spec=spec,
            kl_coef=klplug.check_kl_coef(spec, coef),
            kl_ctrl=read(args, "klplug.kl_ctrl") or "fixed",
            **{name: read(args, f"klplug.{name}") for name in CONTROLLER_SETTINGS},
            records_for_kl=bool(read(args, "klplug.records_for_kl")),
            divides_by_length=bool(dividing_by_length(Arguments(args))),
            model=read(args, PRETRAIN),
            ref_model=read(args, REF_MODEL),
            ref_update=read(args, REF_UPDATE),
            source=read(args, SOURCE),
            teacher=read(args, TEACHER),
        )


def asked(settings: Settings) -> Plan:
    """What the user asked of klplug, by its own options or by a ``kl_type`` as the estimator.

    Raises:
        ValueError: names what is wrong, the value, and what is allowed.
    """
    kl_type = settings.get(KL_TYPE)
    if kl_type is None and settings.wrote(KIND) and settings.get(KIND) not in STOCK_ESTIMATORS:
        kl_type = settings.get(KIND)
    if kl_type is None:
        raise SettingsError(
            "--klplug.kl_type is missing, as in --klplug.kl_type k2_as_loss --klplug.kl_coef 1e-3. "
            f"Known: {', '.join(klplug.kl_types())}. For OpenRLHF's own KL run "
            "python -m openrlhf.cli.train_ppo_ray"
        )
    spec = parse(str(kl_type))
    try:
        coef = settings.get(KL_COEF)
        if coef is None:
            coef = coefficient(spec, settings)
        kl_coef = klplug.check_kl_coef(spec, coef)
    except Unknown:
        kl_coef = math.nan
    kl_ctrl = settings.get(KL_CTRL)
    plan = Plan(
        spec=spec,
        kl_coef=kl_coef,
        kl_ctrl="fixed" if kl_ctrl is None else kl_ctrl,
        **{name: settings.get(f"klplug.{name}") for name in CONTROLLER_SETTINGS},
        ref_model=settings.get(REF_MODEL),
        ref_update=settings.get(REF_UPDATE),
        source=settings.get(SOURCE),
        teacher=settings.get(TEACHER),
    )
    plan.controller()
    plan.moving()
    return plan


def coefficient(spec: KLSpec, settings: Settings) -> float | None:
    """OpenRLHF's own, where the command says one; a coefficient of 0 switches its KL off."""
    if not spec.terms or not settings.wrote(COEF):
        return None
    value: float | None = settings.get(COEF)
    return value or None


def dividing_by_length(settings: Settings) -> list[str]:
    """The settings, as written, by which the policy loss divides by the answer's length."""
    aggregation = settings.get(LOSS_AGG, "token-mean")
    loss = settings.get(POLICY_LOSS, "ppo")
    return [
        f"{settings.named(name)} {value}"
        for name, value, divides in (
            (LOSS_AGG, aggregation, aggregation != "token-mean"),
            (POLICY_LOSS, loss, loss == "gspo"),
        )
        if divides
    ]
