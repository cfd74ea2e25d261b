"""OpenRLHF: what its trainer makes of its flags, flat up to 0.10.1 and dotted after.

Sources, in OpenRLHF 0.11.2: ``models/utils.py`` (``compute_approx_kl``),
``trainer/ppo_utils/experience_maker.py`` (``compute_advantages_and_returns``),
``trainer/ray/ppo_actor.py`` (``training_step``), ``models/loss.py`` (``PolicyLoss``).
"""

from __future__ import annotations

import contextlib
import os
import re
import reprlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from klplug.audit import run as aspects
from klplug.audit.run import Advantage, Controller, Run, Scale, Term
from klplug.audit.settings import (
    Launch,
    Rejected,
    Setting,
    Settings,
    nobodys,
    scalar,
    unknown_settings,
)
from klplug.audit.shell import Word
from klplug.audit.tables import Table, before
from klplug.controllers import CONTROLS
from klplug.hosting.settings import Unknown
from klplug.spec import parse
from klplug_openrlhf import sources
from klplug_openrlhf.command import Parsed, full_name, is_alone, lacking, without_trainer
from klplug_openrlhf.host import HOST
from klplug_openrlhf.keys import (
    ASYNC,
    COEF,
    CONTROL,
    EPOCHS,
    ESTIMATOR,
    FLAT,
    GAMMA,
    IS_ENABLE,
    IS_LEVEL,
    KIND,
    KL_COEF,
    KL_CTRL,
    KL_TARGET,
    KL_TYPE,
    LOSS_AGG,
    NO_STD,
    PACKING,
    POLICY_LOSS,
    ROLLOUT_BATCH,
    STOCK_ESTIMATORS,
    TARGET,
    TRAIN_BATCH,
    UNBIASED,
    USE_LOSS,
    N,
)
from klplug_openrlhf.notes import DISCOUNTED_ESTIMATORS, WHITENED_ESTIMATORS
from klplug_openrlhf.plan import coefficient

ASPECTS = {
    USE_LOSS: aspects.KL,
    KIND: aspects.KL,
    UNBIASED: aspects.KL,
    PACKING: aspects.KL,
    KL_TYPE: aspects.KL,
    COEF: aspects.COEF,
    KL_COEF: aspects.COEF,
    TRAIN_BATCH: aspects.UPDATES,
    ROLLOUT_BATCH: aspects.UPDATES,
    EPOCHS: aspects.UPDATES,
    ESTIMATOR: aspects.ADVANTAGE,
    GAMMA: aspects.ADVANTAGE,
    NO_STD: aspects.ADVANTAGE,
    N: aspects.GROUP,
    POLICY_LOSS: aspects.POLICY_LOSS,
    LOSS_AGG: aspects.POLICY_LOSS,
    IS_LEVEL: aspects.CORRECTION,
    IS_ENABLE: aspects.CORRECTION,
    TARGET: aspects.CONTROLLER,
}


def settings(table: Table, launched: Parsed, version_from: str = "installed") -> Settings:
    """The flags under their dotted names, whichever the release writes."""
    dotted = {flat: name for name, flat in FLAT.items()}
    written: dict[str, Setting] = {}
    spelled: dict[str, tuple[Word, ...]] = {}
    foreign = launched.launch is not None and launched.launch.foreign
    missing = [] if foreign else lacking(table, launched)
    # A script that lies beside a package may be for another release of it.
    guessed = version_from in ("guessed", "beside")
    rejected = [] if guessed else unknown_settings("OpenRLHF", table, missing)
    rejected += [
        Rejected(setting, f"{reprlib.repr(setting.key)} is a word that belongs to no flag")
        for setting in launched.bare
    ]
    rejected += [
        Rejected(setting, f"OpenRLHF {table.version} has no trainer without Ray: 0.5 was the last")
        for setting in without_trainer(table, launched.launch)
    ]
    for name, values, word in launched.flags:
        full = full_name(table, name, launched.through_klplug)
        if full is None:
            continue
        unknown = tuple(reason for value in values for reason in value.unknown)
        key = dotted.get(full, full)
        if full in table.switches:
            setting = Setting(full, table.switches[full], word.line, True)
            if values and not unknown:
                rejected.append(Rejected(setting, f"--{full} takes no value"))
        elif not values and (variable := _variable_of(launched.launch, name)):
            why = f"{variable} is not set in the script"
            setting = Setting(full, None, word.line, True, (why,))
        elif not values:
            setting = Setting(full, None, word.line, True)
            rejected.append(Rejected(setting, f"--{full} needs a value"))
        else:
            one = len(values) == 1 or isinstance(table.defaults.get(full), (int, float, str))
            value = _value(key, values[0].text) if one else [v.text for v in values]
            setting = Setting(full, value, word.line, True, unknown)
            if one and len(values) > 1 and not unknown:
                rejected.append(Rejected(setting, f"--{full} takes one value"))
            allowed = table.choices.get(full)
            if allowed and not unknown and value not in allowed and not _kl_type(value):
                rejected.append(Rejected(setting, f"--{full} takes {', '.join(map(str, allowed))}"))
        written[key] = setting
        if launched.launch is not None:
            spelled[key] = (*spelled.get(key, ()), word, *values)
    if _K3 in table.defaults and _K3 in written:  # before 0.6: k1, or k3 by this flag
        written[KIND] = replace(written[_K3], value="k3")
    defaults = {dotted.get(name, name): value for name, value in table.defaults.items()}
    if KIND not in defaults:
        defaults[KIND] = "k1"
    if ESTIMATOR not in defaults:  # before 0.5
        defaults[ESTIMATOR] = "gae"
    if is_alone(launched.launch):
        defaults[ROLLOUT_BATCH] = _ALONE_ROLLOUT
    return Settings(
        replace(table, defaults=defaults),
        version_from,
        written,
        spelled,
        launched.launch,
        names={dotted[name]: name for name in table.defaults if name in dotted},
        prefix="--",
        rejected=() if foreign else tuple(rejected),
        nobodys=nobodys("OpenRLHF", missing, version_from),
        holes=launched.holes,
    )


def _variable_of(launch: Launch | None, flag: str) -> str | None:
    """The variable whose value a flag takes, where it is empty and so makes no word."""
    text = "" if launch is None else launch.around
    found = re.search(rf"--{re.escape(flag)}(?:\s|\\\n|=)+[\"']?(\$\{{?\w+\}}?)", text)
    return None if found is None else found[1]


# Of the trainer without Ray, whose parser has another default in the wheels of 0.4.6 and 0.5.9.
_ALONE_ROLLOUT = 512
_K3 = "use_kl_estimator_k3"
_FLOATS = (COEF, GAMMA, TARGET, KL_COEF, *CONTROL)


def _value(key: str, text: str) -> Any:
    """As argparse reads it, which knows some flags to be no whole numbers."""
    if key in _FLOATS:
        with contextlib.suppress(ValueError):
            return float(text)
    return scalar(text)


def _kl_type(value: Any) -> bool:
    try:
        parse(value)
    except (TypeError, ValueError):
        return False
    return True


def run(settings: Settings) -> Run:
    """What OpenRLHF does with these flags."""
    rejected = list(settings.rejected)
    through_klplug = _through_klplug(settings)
    terms = _terms(settings, through_klplug, rejected)
    gspo = settings.text(POLICY_LOSS) == "gspo"
    by_answer = gspo or settings.text(LOSS_AGG) == "seq-mean-token-mean"
    n = None if settings[N].unknown else max(1, int(settings.number(N, 1)))
    level = settings[IS_LEVEL] if settings[IS_LEVEL].value is not None else settings[IS_ENABLE]
    corrects = settings.text(IS_LEVEL) not in ("", "off") or settings.on(IS_ENABLE)
    rejected += settings.not_numbers((COEF, GAMMA), (N, ROLLOUT_BATCH, TRAIN_BATCH, EPOCHS))
    estimator = settings[ESTIMATOR]
    foreign = _is_foreign(settings)
    alone = n == 1 and not (estimator.unknown or settings[N].unknown or foreign)
    if alone and estimator.value in _NEED_GROUP:
        reason = f"{estimator.value} needs more than one answer per prompt"
        rejected.append(Rejected(settings[N], reason))
    refused = list(HOST.refused(settings)) if through_klplug else []
    noted = HOST.noted(settings, through_klplug)
    launch = settings.launch
    return Run(
        host="openrlhf",
        version=settings.table.version,
        version_from=settings.version_from,
        advantage=_advantage(settings, n),
        terms=tuple(terms),
        n=n,
        n_setting=settings[N],
        updates=_updates(settings),
        updates_settings=tuple(settings[key] for key in _making_more(settings)),
        # With a correction, GSPO's ratio is to the sampler; without, PPO's is to old.
        ratio="gspo" if gspo else "token",
        policy_loss=settings[POLICY_LOSS],
        policy_by_answer=by_answer,
        # A stock KL loss is always the token mean; klplug's is aggregated as the policy loss.
        kl_by_answer=by_answer and through_klplug,
        loss_agg=settings[POLICY_LOSS] if gspo else settings[LOSS_AGG],
        corrects_rollout=corrects,
        correction=level,
        stale=settings[ASYNC] if settings.on(ASYNC) else None,
        controller=_controller(settings, terms),
        idle=(),
        beside=_beside(settings),
        unread_package=settings.table.unread,
        notes=tuple(_notes(settings)),
        served=_served(settings),
        nearest=tuple(_nearest(settings, terms)),
        not_loaded=_not_loaded(settings, terms),
        no_effect=tuple(_no_effect(settings, terms)),
        nobodys=settings.nobodys,
        rejected=tuple(rejected),
        refused=tuple(Rejected(settings[r.key or KL_TYPE], r.words) for r in refused),
        noted=tuple((n.id, Rejected(settings[n.key or KL_TYPE], n.words)) for n in noted),
        unknown=_unknown(settings),
        cut=None if launch is None else launch.cut,
        broken=None if launch is None else launch.broken,
        line=None if launch is None else launch.line,
        sourced=() if launch is None else launch.sourced,
        unreached=() if launch is None else launch.unreached,
    )


def _is_foreign(settings: Settings) -> bool:
    """Whether a trainer of a fork runs it, of whose code this file does not speak."""
    return settings.launch is not None and settings.launch.foreign


def _notes(settings: Settings) -> Iterable[tuple[str, Setting]]:
    launch = settings.launch
    if launch is not None and launch.foreign:
        yield (
            f"{launch.trainer} is a trainer of its own. Its settings are read as OpenRLHF's. What "
            "its code changes is not seen.",
            Setting("", None, launch.words[launch.main].line),
        )


def _served(settings: Settings) -> bool:
    """Whether klplug has hooks for this trainer and release."""
    source = settings.table.source
    changed = source is not None and bool(source.changed)
    return not (changed or _is_foreign(settings) or before(settings.table.version, (0, 9)))


def _nearest(settings: Settings, terms: list[Term]) -> Iterable[tuple[str, str]]:
    """OpenRLHF's own flags that come near, for a release that klplug has no hooks for."""
    if not any(term.as_loss for term in terms):
        clamp = "" if before(settings.table.like, (0, 8)) else ", clamped at 10 nats per token"
        kind = KIND if settings.table.knows(settings.named(KIND)[2:]) else None
        if kind is not None:
            yield f"without klplug{clamp}", f"{settings.named(KIND)} k1"
    elif settings.table.knows(settings.named(KIND)[2:]):
        yield (
            "without klplug, and without a weight for reused samples",
            f"{settings.named(USE_LOSS)} {settings.named(KIND)} k2",
        )


def _beside(settings: Settings) -> str:
    source, launch = settings.table.source, settings.launch
    if source is None or launch is None:
        return ""
    return os.path.relpath(source.folder, launch.folder)


def _through_klplug(settings: Settings) -> bool:
    """Whether klplug's launcher starts the run, and not OpenRLHF's own."""
    if settings.launch is None:
        return settings[KL_TYPE].written
    return settings.launch.trainer == HOST.launcher


_NEED_GROUP = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")


def _updates(settings: Settings) -> float:
    """Whole optimizer steps per pass; a smaller rollout fills one step over several."""
    answers = settings.number(ROLLOUT_BATCH, 1) * settings.number(N, 1)
    steps = answers / max(settings.number(TRAIN_BATCH, 1), 1)
    return (int(steps) if steps >= 1 else steps) * max(1.0, settings.number(EPOCHS, 1))


def _making_more(settings: Settings) -> Iterable[str]:
    """The settings by which one rollout serves more than one update."""
    answers = settings.number(ROLLOUT_BATCH, 1) * settings.number(N, 1)
    if answers > settings.number(TRAIN_BATCH, 1):
        yield from (ROLLOUT_BATCH, N, TRAIN_BATCH)
    if settings.number(EPOCHS, 1) > 1:
        yield EPOCHS


def _advantage(settings: Settings, n: int | None) -> Advantage:
    """The group's mean and std come before a KL in the reward joins, whitening after."""
    name = settings.text(ESTIMATOR)
    mean = 0 if n == 1 else 1
    scale = {
        "group_norm": Scale(mean, -mean),
        "dr_grpo": Scale(mean),
        "reinforce_baseline": Scale(mean),
    }.get(name, Scale())
    whitens = name in _whitened(settings) and not settings.on(NO_STD)
    gamma = settings.number(GAMMA, 1.0)
    return Advantage(
        setting=settings[ESTIMATOR],
        before=scale,
        after=Scale(0, 0, -1 if whitens else 0),
        groups=name in _NEED_GROUP,
        discount=gamma if name in DISCOUNTED_ESTIMATORS else 1.0,
        discount_setting=settings[GAMMA],
        whitens=whitens,
    )


def _whitened(settings: Settings) -> tuple[str, ...]:
    """Estimators whose advantages this release brings to a standard deviation of 1."""
    with_rloo = before(settings.table.like, (0, 8))
    return (*WHITENED_ESTIMATORS, "rloo") if with_rloo else WHITENED_ESTIMATORS


def _terms(settings: Settings, through_klplug: bool, rejected: list[Rejected]) -> list[Term]:
    own, kind = settings[KL_TYPE], settings[KIND]
    if through_klplug and not own.written and str(kind.value) not in STOCK_ESTIMATORS:
        own = kind
    if through_klplug and not own.unknown:
        return _klplug_terms(settings, own)
    name = str(kind.value)
    if name not in STOCK_ESTIMATORS:
        said = kind.unknown or any(r.setting.key == kind.key for r in rejected)
        if not (said or _is_foreign(settings)):
            rejected.append(Rejected(kind, "the estimator is one of k1, k2, k3"))
        return []
    coef = settings.coefficient(COEF)
    if coef <= 0:
        return []  # the reference model is not even started
    as_loss, unbiased = settings.on(USE_LOSS), settings.on(UNBIASED)
    if as_loss and unbiased:
        (spec,) = parse("k2_as_loss").terms
    else:
        (spec,) = parse(HOST.stock["as_loss" if as_loss else "in_reward"][name]).terms
    return [
        Term(
            spec=spec,
            coef=coef,
            where=settings[USE_LOSS],
            kind=settings[UNBIASED] if as_loss and unbiased else kind,
            amount=settings[COEF],
            straight_through=as_loss and unbiased and name != "k2",
            clamped=not (as_loss and unbiased) and not before(settings.table.like, (0, 8)),
            without_baseline=not as_loss,
            dropped=_dropped(settings, as_loss),
        )
    ]


def _dropped(settings: Settings, as_loss: bool) -> str:
    """Why the KL never reaches the gradient; empty where it does.

    OpenRLHF 0.6 makes a new tensor of the packed answers' means, ``torch.tensor([...])``.
    """
    source = settings.table.source
    if not as_loss:
        never = source is not None and sources.NEVER in source.facts
        return "compute_reward of the package beside the script does not read it" if never else ""
    detached = (
        not before(settings.table.version, (0, 6)) and before(settings.table.version, (0, 7))
        if source is None
        else sources.DETACHED in source.facts
    )
    if not (detached and settings.on(PACKING)):
        return ""
    return "of packed samples this OpenRLHF adds the KL loss as a number, without a gradient"


def _klplug_terms(settings: Settings, own: Setting) -> list[Term]:
    try:
        spec = parse(str(own.value))
    except ValueError:
        return []  # klplug refuses it, in its own words
    amount = settings[KL_COEF]
    with contextlib.suppress(Unknown):
        # The flag's default is not a coefficient that anybody chose.
        if amount.value is None and coefficient(spec, settings) is not None:
            amount = settings[COEF]
    coef = settings.coefficient(amount.key)
    return [
        Term(term, term.factor * coef, own, own, amount, from_klplug=True) for term in spec.terms
    ]


def _controller(settings: Settings, terms: list[Term]) -> Controller | None:
    own = settings[KL_CTRL]
    if own.written and own.value != "fixed":
        if own.value in CONTROLS and not CONTROLS[own.value].driven:
            return None
        return Controller(own, settings[KL_TARGET], True, "k3, before the update", True, kept=True)
    target = settings[TARGET]
    if not target.written or not target.value:
        return None
    term = terms[0] if terms else None
    if term is None or term.from_klplug:
        return Controller(target, target, drives=False, fed="", right=False)
    name = settings.text(KIND)
    right = not term.as_loss and name in ("k1", "k3")
    fed = f"the mean of {name}" + (
        ", taken while the policy is being updated, on samples of the older one"
        if term.as_loss
        else ""
    )
    return Controller(target, target, drives=True, fed=fed, right=right)


def _not_loaded(settings: Settings, terms: list[Term]) -> Setting | None:
    if terms or settings.number(COEF) > 0 or settings[COEF].unknown:
        return None
    asked = any(settings[key].written for key in (USE_LOSS, KIND, TARGET, UNBIASED))
    return settings[COEF] if asked else None


def _no_effect(settings: Settings, terms: list[Term]) -> Iterable[tuple[Setting, str]]:
    if settings.on(UNBIASED) and not settings.on(USE_LOSS) and terms:
        yield (
            settings[UNBIASED],
            "the flag is read where the KL is a loss only; this one is in the reward",
        )
    target = settings[TARGET]
    if target.written and not target.unknown and not target.value:
        yield target, "a target of 0 means no controller at all: beta stays as it is"


def _unknown(settings: Settings) -> dict[str, tuple[tuple[Setting, str], ...]]:
    unknown: dict[str, list[tuple[Setting, str]]] = {}
    for key, aspect in ASPECTS.items():
        setting = settings[key]
        for reason in setting.unknown[:1]:
            unknown.setdefault(aspect, []).append((setting, reason))
            if key == N:  # answers fill the batches
                unknown.setdefault(aspects.UPDATES, []).append((setting, reason))
    for key, known, aspect in (
        (KIND, STOCK_ESTIMATORS, aspects.KL),
        (ESTIMATOR, (*_NEED_GROUP, "gae", "reinforce", "flash_reinforce"), aspects.ADVANTAGE),
    ):
        setting = settings[key]
        if _is_foreign(settings) and not setting.unknown and setting.value not in known:
            reason = f"{setting} is not one of OpenRLHF's own"
            unknown.setdefault(aspect, []).append((setting, reason))
    source = settings.table.source
    if source is not None and not settings.coefficient(COEF) <= 0:  # or not known
        for name, bears in source.changed:
            if bears == sources.OF_REWARD and settings.on(USE_LOSS):
                continue  # it is given zeros
            reason = f"{source.folder.name}/{name} is no release's"
            unknown.setdefault(aspects.KL, []).append((Setting("", None), reason))
    for setting, reason in settings.holes:
        for aspect in set(ASPECTS.values()):
            unknown.setdefault(aspect, []).append((setting, reason))
    return {aspect: tuple(reasons) for aspect, reasons in unknown.items()}
