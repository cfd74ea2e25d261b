"""OpenRLHF: its flags, flat up to 0.10.1 and dotted after, and what its trainer makes of them.

Sources, in OpenRLHF 0.11.2: ``models/utils.py`` (``compute_approx_kl``),
``trainer/ppo_utils/experience_maker.py`` (``compute_advantages_and_returns``),
``trainer/ray/ppo_actor.py`` (``training_step``), ``models/loss.py`` (``PolicyLoss``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from klplug.audit import setup as aspects
from klplug.audit.settings import (
    Rejected,
    Setting,
    Settings,
    refused_coefficient,
    scalar,
    unknown_settings,
)
from klplug.audit.setup import Advantage, Controller, Scale, Setup, Term
from klplug.audit.shell import Word
from klplug.audit.tables import Table, flattened
from klplug.spec import TermSpec, parse

# What the audit reads: the dotted name, and the flat one that it had.
FLAGS = {
    "algo.kl.init_coef": "init_kl_coef",
    "algo.kl.estimator": "kl_estimator",
    "algo.kl.use_loss": "use_kl_loss",
    "algo.kl.target": "kl_target",
    "algo.kl.horizon": "kl_horizon",
    "algo.kl.unbiased_gradient": "unbiased_kl_gradient",
    "algo.advantage.estimator": "advantage_estimator",
    "algo.advantage.gamma": "gamma",
    "algo.advantage.no_std_norm": "no_advantage_std_norm",
    "algo.advantage.is_correction_level": "vllm_is_correction_level",
    "algo.advantage.is_correction_enable": "enable_vllm_is_correction",
    "actor.policy_loss_type": "policy_loss_type",
    "actor.loss_agg_mode": "loss_agg_mode",
    "rollout.batch_size": "rollout_batch_size",
    "rollout.n_samples_per_prompt": "n_samples_per_prompt",
    "train.batch_size": "train_batch_size",
    "train.max_epochs": "max_epochs",
    "train.async_enable": "async_train",
}
USE_LOSS, KIND, COEF = "algo.kl.use_loss", "algo.kl.estimator", "algo.kl.init_coef"
TARGET, UNBIASED = "algo.kl.target", "algo.kl.unbiased_gradient"
ESTIMATOR, GAMMA = "algo.advantage.estimator", "algo.advantage.gamma"
NO_STD = "algo.advantage.no_std_norm"
IS_LEVEL, IS_ENABLE = "algo.advantage.is_correction_level", "algo.advantage.is_correction_enable"
POLICY_LOSS, LOSS_AGG = "actor.policy_loss_type", "actor.loss_agg_mode"
ROLLOUT_BATCH, N = "rollout.batch_size", "rollout.n_samples_per_prompt"
TRAIN_BATCH, EPOCHS = "train.batch_size", "train.max_epochs"
ASYNC = "train.async_enable"
KL_TYPE, KL_COEF = "klplug.kl_type", "klplug.kl_coef"
KL_CTRL, KL_TARGET, KL_HORIZON = "klplug.kl_ctrl", "klplug.kl_target", "klplug.kl_horizon"
OWN = (KL_TYPE, KL_COEF, KL_CTRL, KL_TARGET, KL_HORIZON)

ASPECTS = {
    USE_LOSS: aspects.KL,
    KIND: aspects.KL,
    UNBIASED: aspects.KL,
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


@dataclass(frozen=True)
class Launch:
    """The flags of one command, under the names they were written by."""

    flags: tuple[tuple[str, tuple[Word, ...], Word], ...]
    holes: tuple[tuple[Setting, str], ...]
    through_klplug: bool
    bare: tuple[Setting, ...] = ()  # words that belong to no flag


def launch(args: Iterable[Word], through_klplug: bool) -> Launch:
    flags: list[tuple[str, list[Word], Word]] = []
    holes, bare = [], []
    for word in args:
        if match := re.match(r"--([\w.-]+)(?:=(.*))?$", word.text, re.DOTALL):
            values = [] if match[2] is None else [_part(word, match[2])]
            flags.append((match[1], values, word))
        elif word.unknown and re.fullmatch(r"\$\{?[\w@*\[\]]+\}?|\$\(.*\)|`.*`", word.text):
            if flags and not flags[-1][1]:
                flags[-1][1].append(word)
            else:
                holes.append((Setting(word.text, None, word.line, True), word.unknown[0]))
        elif flags:
            flags[-1][1].append(word)
        else:
            bare.append(Setting(word.text, None, word.line, True))
    return Launch(
        tuple((name, tuple(values), word) for name, values, word in flags),
        tuple(holes),
        through_klplug,
        tuple(bare),
    )


def _part(word: Word, text: str) -> Word:
    return Word(text, word.line, word.unknown)


def from_yaml(content: Mapping[str, Any], lines: Mapping[str, int]) -> Launch:
    """Flags kept in a file, nested or flat."""
    flags: list[tuple[str, tuple[Word, ...], Word]] = []
    for key, value in flattened(dict(content)).items():
        values = value if isinstance(value, list) else [value]
        word = Word(f"--{key}", lines.get(key))
        if value is True:
            flags.append((key, (), word))
        elif value is not False and value is not None:
            flags.append((key, tuple(Word(str(v), lines.get(key)) for v in values), word))
    return Launch(tuple(flags), (), any(key == KL_TYPE for key, _, _ in flags))


def unknown_keys(table: Table, launched: Launch) -> list[Setting]:
    """Flags that argparse would refuse: unknown, or an ambiguous abbreviation."""
    return [
        Setting(name, " ".join(v.text for v in values) or True, word.line, True)
        for name, values, word in launched.flags
        if _full_name(table, name, launched.through_klplug) is None
    ]


def _full_name(table: Table, name: str, through_klplug: bool) -> str | None:
    if through_klplug and name in OWN:
        return name
    if name in table.defaults:
        return name
    near = [known for known in table.defaults if known.startswith(name)]
    return near[0] if len(near) == 1 else None


def read(
    table: Table, launched: Launch, version_from: str = "installed"
) -> tuple[Settings, list[Rejected]]:
    """The flags under their dotted names, whichever the release writes."""
    dotted = {flat: name for name, flat in FLAGS.items()}
    written: dict[str, Setting] = {}
    misses = unknown_keys(table, launched)
    rejected = unknown_settings("OpenRLHF", table, misses, version_from) if misses else []
    rejected += [Rejected(setting, "a word that belongs to no flag") for setting in launched.bare]
    for name, values, word in launched.flags:
        full = _full_name(table, name, launched.through_klplug)
        if full is None:
            continue
        unknown = tuple(reason for value in values for reason in value.unknown)
        key = dotted.get(full, full)
        if full in table.switches:
            setting = Setting(full, table.switches[full], word.line, True)
            if values and not unknown:
                rejected.append(Rejected(setting, f"--{full} takes no value"))
        elif not values:
            setting = Setting(full, None, word.line, True)
            rejected.append(Rejected(setting, f"--{full} needs a value"))
        else:
            value = scalar(values[0].text) if len(values) == 1 else [v.text for v in values]
            setting = Setting(full, value, word.line, True, unknown)
            allowed = table.choices.get(full)
            if allowed and not unknown and value not in allowed and not _kl_type(value):
                rejected.append(Rejected(setting, f"--{full} takes {', '.join(map(str, allowed))}"))
        written[key] = setting
    defaults = {dotted.get(name, name): value for name, value in table.defaults.items()}
    renamed = Table(
        table.host, table.version, table.installed, defaults, table.choices, table.switches
    )
    return Settings(renamed, written), rejected


def _kl_type(value: Any) -> bool:
    try:
        parse(value)
    except (TypeError, ValueError):
        return False
    return True


def setup(table: Table, launched: Launch, version_from: str) -> Setup:
    """What OpenRLHF does with these flags."""
    settings, rejected = read(table, launched, version_from)
    terms = _terms(settings, launched, rejected)
    gspo = settings.text(POLICY_LOSS) == "gspo"
    by_answer = gspo or settings.text(LOSS_AGG) == "seq-mean-token-mean"
    n = None if settings[N].unknown else max(1, int(settings.number(N, 1)))
    level = settings[IS_LEVEL] if settings[IS_LEVEL].value is not None else settings[IS_ENABLE]
    corrects = settings.text(IS_LEVEL) not in ("", "off") or settings.on(IS_ENABLE)
    rejected += settings.not_numbers((COEF, GAMMA), (N, ROLLOUT_BATCH, TRAIN_BATCH, EPOCHS))
    estimator = settings[ESTIMATOR]
    if not (estimator.unknown or settings[N].unknown) and estimator.value in _NEED_GROUP and n == 1:
        reason = f"{estimator.value} needs more than one answer per prompt"
        rejected.append(Rejected(settings[N], reason))
    stock_klplug = any(term.from_klplug for term in terms)
    return Setup(
        host="openrlhf",
        version=table.version,
        version_from=version_from,
        advantage=_advantage(settings, n),
        terms=tuple(terms),
        n=n,
        n_setting=settings[N],
        updates=_updates(settings),
        updates_settings=tuple(settings[k] for k in (ROLLOUT_BATCH, N, TRAIN_BATCH, EPOCHS)),
        # With a correction, GSPO's ratio is to the sampler; without, PPO's is to old.
        ratio="gspo" if gspo else "token",
        policy_loss=settings[POLICY_LOSS],
        policy_by_answer=by_answer,
        # A stock KL loss is always the token mean; klplug's is aggregated as the policy loss.
        kl_by_answer=by_answer and stock_klplug,
        loss_agg=settings[POLICY_LOSS] if gspo else settings[LOSS_AGG],
        corrects_rollout=corrects,
        correction=level,
        stale=settings[ASYNC] if settings.on(ASYNC) else None,
        controller=_controller(settings, terms),
        idle=(),
        not_loaded=_not_loaded(settings, terms),
        no_effect=tuple(_no_effect(settings, terms)),
        rejected=tuple(rejected),
        unknown=_unknown(settings, launched),
    )


_NEED_GROUP = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")


def _updates(settings: Settings) -> float:
    """Whole optimizer steps per pass; a smaller rollout fills one step over several."""
    answers = settings.number(ROLLOUT_BATCH, 1) * settings.number(N, 1)
    steps = answers / max(settings.number(TRAIN_BATCH, 1), 1)
    return (int(steps) if steps >= 1 else steps) * max(1.0, settings.number(EPOCHS, 1))


def _advantage(settings: Settings, n: int | None) -> Advantage:
    """The group's mean and std come before a KL in the reward joins, whitening after."""
    name = settings.text(ESTIMATOR)
    mean = 0 if n == 1 else 1
    before = {
        "group_norm": Scale(mean, -mean),
        "dr_grpo": Scale(mean),
        "reinforce_baseline": Scale(mean),
    }.get(name, Scale())
    whitens = name in ("gae", "reinforce", "reinforce_baseline") and not settings.on(NO_STD)
    gamma = settings.number(GAMMA, 1.0)
    return Advantage(
        setting=settings[ESTIMATOR],
        before=before,
        after=Scale(0, 0, -1 if whitens else 0),
        groups=name in _NEED_GROUP,
        # The others set gamma to 1, and say so in the log.
        discount=gamma if name in ("gae", "reinforce") else 1.0,
        discount_setting=settings[GAMMA],
        whitens=whitens,
    )


def _terms(settings: Settings, launched: Launch, rejected: list[Rejected]) -> list[Term]:
    own, kind = settings[KL_TYPE], settings[KIND]
    if launched.through_klplug and not own.written and str(kind.value) not in ("k1", "k2", "k3"):
        own = kind
    if launched.through_klplug and not own.unknown:
        return _klplug_terms(settings, own, rejected)
    name = str(kind.value)
    if name not in ("k1", "k2", "k3"):
        if not kind.unknown and not any(r.setting.key == kind.key for r in rejected):
            rejected.append(Rejected(kind, "the estimator is one of k1, k2, k3"))
        return []
    coef = settings.coefficient(COEF)
    if coef <= 0:
        return []  # the reference model is not even started
    as_loss, unbiased = settings.on(USE_LOSS), settings.on(UNBIASED)
    if as_loss and unbiased:
        spec = TermSpec("k2", "as_loss")
    elif as_loss:
        spec = TermSpec(name, "as_loss", ratio="none")
    else:
        spec = TermSpec(name, "in_reward")
    return [
        Term(
            spec=spec,
            coef=coef,
            where=settings[USE_LOSS],
            kind=settings[UNBIASED] if as_loss and unbiased else kind,
            amount=settings[COEF],
            straight_through=as_loss and unbiased and name != "k2",
            clamped=not (as_loss and unbiased),
        )
    ]


def _klplug_terms(settings: Settings, own: Setting, rejected: list[Rejected]) -> list[Term]:
    if own.value is None:
        rejected.append(Rejected(Setting(KL_TYPE, None), "--klplug.kl_type is missing"))
        return []
    try:
        spec = parse(str(own.value))
    except ValueError as error:
        rejected.append(Rejected(own, str(error)))
        return []
    # The flag's default is not a coefficient that anybody chose.
    amount = settings[COEF if settings[COEF].written and not settings[KL_COEF].written else KL_COEF]
    rejected += refused_coefficient(spec, own, amount)
    if settings.on(USE_LOSS) and not spec.placed("as_loss").terms:
        reason = f"klplug refuses it beside kl_type {spec}, which puts no KL in the loss"
        rejected.append(Rejected(settings[USE_LOSS], reason))
    if not spec.terms:
        return []
    coef = settings.coefficient(amount.key)
    return [Term(term, coef, own, own, amount, from_klplug=True) for term in spec.terms]


def _controller(settings: Settings, terms: list[Term]) -> Controller | None:
    own = settings[KL_CTRL]
    if own.written and own.value != "fixed":
        return Controller(own, settings[KL_TARGET], True, "k3, before the update", True)
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


def _unknown(settings: Settings, launched: Launch) -> dict[str, tuple[tuple[Setting, str], ...]]:
    unknown: dict[str, list[tuple[Setting, str]]] = {}
    for key, aspect in ASPECTS.items():
        setting = settings[key]
        for reason in setting.unknown[:1]:
            unknown.setdefault(aspect, []).append((setting, reason))
            if key == N:  # answers fill the batches
                unknown.setdefault(aspects.UPDATES, []).append((setting, reason))
    for setting, reason in launched.holes:
        for aspect in set(ASPECTS.values()):
            unknown.setdefault(aspect, []).append((setting, reason))
    return {aspect: tuple(reasons) for aspect, reasons in unknown.items()}
