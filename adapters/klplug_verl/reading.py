"""verl: what its trainer makes of the settings that a command or a config file has.

Sources, in verl 0.9.1: ``trainer/ppo/core_algos.py`` (``kl_penalty``, the advantage estimators),
``trainer/ppo/ray_trainer.py`` (``apply_kl_penalty``), ``workers/utils/losses.py`` (``ppo_loss``).
"""

from __future__ import annotations

import functools
import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from klplug.audit import run as aspects
from klplug.audit.run import Advantage, Controller, Run, Scale, Term
from klplug.audit.settings import (
    Rejected,
    Setting,
    Settings,
    nobodys,
    scalar,
    unknown_settings,
)
from klplug.audit.tables import Table, before
from klplug.controllers import CONTROLS
from klplug.hosting.settings import Unknown
from klplug_verl import sources, trainers
from klplug_verl.command import Parsed, appended, lacking
from klplug_verl.configs import ENGINES
from klplug_verl.edit import without_klplug
from klplug_verl.host import HOST
from klplug_verl.keys import (
    ACTOR,
    ACTOR_FILE,
    BYPASS,
    CTRL_COEF,
    CTRL_HORIZON,
    CTRL_TARGET,
    CTRL_TYPE,
    DISTIL_COEF,
    DISTIL_MODE,
    DISTIL_POLICY,
    DISTILLS,
    DISTILLS_BESIDE,
    DYNAMIC,
    ENGINE,
    EPOCHS,
    ESTIMATOR,
    FETCHED,
    GAMMA,
    KL_COEF,
    KL_CTRL,
    KL_TARGET,
    KL_TYPE,
    LOSS_AGG,
    LOSS_COEF,
    LOSS_MODE,
    LOSS_TYPE,
    MINI_BATCH,
    NORM_BY_STD,
    PENALTY,
    RECORDS,
    ROLLOUT_IS,
    STOCK,
    STRATEGY,
    TRAIN_BATCH,
    TRAINER_MODE,
    USE_LOSS,
    USE_REWARD,
    N,
)
from klplug_verl.notes import DISCOUNTED_ESTIMATORS
from klplug_verl.plan import asked
from klplug_verl.terms import (
    is_verls,
    reward_switch,
    terms_of,
    terms_of_teacher,
    theirs,
    whole_kl_type,
)
from klplug_verl.trainers import Trainer

ASPECTS = {
    USE_LOSS: aspects.KL,
    LOSS_TYPE: aspects.KL,
    USE_REWARD: aspects.KL,
    PENALTY: aspects.KL,
    KL_TYPE: aspects.KL,
    LOSS_COEF: aspects.COEF,
    CTRL_COEF: aspects.COEF,
    KL_COEF: aspects.COEF,
    TRAIN_BATCH: aspects.UPDATES,
    MINI_BATCH: aspects.UPDATES,
    EPOCHS: aspects.UPDATES,
    FETCHED: aspects.UPDATES,
    ESTIMATOR: aspects.ADVANTAGE,
    NORM_BY_STD: aspects.ADVANTAGE,
    GAMMA: aspects.ADVANTAGE,
    N: aspects.GROUP,
    LOSS_AGG: aspects.POLICY_LOSS,
    LOSS_MODE: aspects.POLICY_LOSS,
    ROLLOUT_IS: aspects.CORRECTION,
    BYPASS: aspects.CORRECTION,
    RECORDS: aspects.CORRECTION,
    DISTILLS: aspects.KL,
    DISTIL_MODE: aspects.KL,
    DISTIL_POLICY: aspects.KL,
    DISTILLS_BESIDE: aspects.KL,
    DISTIL_COEF: aspects.COEF,
    CTRL_TYPE: aspects.CONTROLLER,
    CTRL_TARGET: aspects.CONTROLLER,
}

_KL_KEYS = (LOSS_TYPE, LOSS_COEF, PENALTY, CTRL_COEF, CTRL_TYPE, CTRL_TARGET, CTRL_HORIZON)
N_AGENT = "actor_rollout_ref.rollout.n_agent"
_COUNTS = (TRAIN_BATCH, MINI_BATCH, EPOCHS)


def settings(table: Table, launched: Parsed, version_from: str) -> Settings:
    """The settings of a run, and what verl or Hydra would not take of them."""
    missing = lacking(table, launched)
    # A script that lies beside a package may be older than it, or for another config of it.
    guessed = version_from in ("guessed", "beside")
    rejected = [] if guessed else unknown_settings("verl", table, missing)
    if version_from in ("installed", "given"):
        rejected += [
            Rejected(s, f"Hydra adds nothing that is there: {s.key} takes no '+'")
            for s in appended(table, launched)
            if s.key in ASPECTS
        ]
    cut = None if launched.launch is None else launched.launch.cut
    rejected += [
        Rejected(
            s,
            f"{reprlib.repr(s.key)} is not a key=value override"
            if s.value is None
            else f"in {s.key} Hydra takes a comma for several values, unless the value is quoted",
        )
        for s in launched.bare
        # What a broken continuation leaves on its line has its own finding.
        if cut is None or s.line != cut.line
    ]
    if launched.launch is not None and not launched.launch.foreign:
        rejected += [
            Rejected(s, "Hydra takes its overrides in one row, and a flag stands before this one")
            for s in launched.parted[:1]
        ]
    written = dict(launched.written)
    if N_AGENT in written and not (
        N in written and written[N].value != 1
    ):  # of verl 0.1, in Search-R1
        written[N] = replace(written[N_AGENT], key=N_AGENT)
    for gone in launched.removed:
        # The code has a default of its own then.
        written |= {
            key: Setting(key, None, gone.line, True, (f"{gone.key} takes it out",))
            for key in ASPECTS
            if f"{key}.".startswith(f"{gone.key[1:]}.")
        }
    if STRATEGY not in written:
        written |= _strategy(written)
    return _resolved(
        Settings(
            table,
            version_from,
            written,
            launched.spelled,
            launched.launch,
            launched.behind,
            rejected=tuple(rejected),
            nobodys=nobodys("verl", missing, version_from),
            unread=tuple(s for s in launched.unread if any(_may_set(s, key) for key in ASPECTS)),
            holes=launched.holes,
        )
    )


def _strategy(written: Mapping[str, Setting]) -> dict[str, Setting]:
    """That which the file of the actor sets, chosen itself or by the engine."""
    if (chosen := written.get(ACTOR_FILE)) is not None:
        if chosen.value in ENGINES:
            return {STRATEGY: replace(chosen, key=STRATEGY, value=ENGINES[chosen.value])}
        return {STRATEGY: replace(chosen, key=STRATEGY, unknown=(f"{chosen} is not read",))}
    if (chosen := written.get(ENGINE)) is not None:
        value = ENGINES.get(f"{chosen.value}_actor", chosen.value)
        return {STRATEGY: replace(chosen, key=STRATEGY, value=value)}
    return {}


def _may_set(config: Setting, key: str) -> bool:
    """Whether a config that is not read may set a key: one chosen by ``group@package`` its own."""
    package = config.key.partition("@")[2].replace("_global_", "")
    return not package or key.startswith(f"{package}.")


def run(settings: Settings) -> Run:
    """What verl does with these settings."""
    advantage = _advantage(settings)
    by_answer = settings.text(LOSS_AGG) == "seq-mean-token-mean"
    mode = settings.text(LOSS_MODE) or "vanilla"
    policy_by_answer = (
        by_answer
        or mode in _ALWAYS_BY_ANSWER
        or (mode == "gspo" and before(settings.table.version, (0, 9)))
    )
    terms, rejected = terms_of(settings)
    terms += terms_of_teacher(settings)
    rejected += [*_bad_values(settings), *settings.rejected]
    refused = [
        Rejected(settings[r.key or _asked_by(settings)], r.words)
        for r in (HOST.refused(settings) if _asks_klplug(settings, terms) else ())
    ]
    noted = HOST.noted(settings, any(term.from_klplug for term in terms))
    launch = settings.launch
    other = None if launch is None else trainers.row(launch.trainer)
    if other is not None and launch is not None and launch.foreign and not other.known:
        other = None
    idle, never = _idle(settings, terms)
    n = None if settings[N].unknown else max(1, int(settings.number(N, 1)))
    return Run(
        host="verl",
        version=settings.table.version,
        version_from=settings.version_from,
        advantage=advantage,
        terms=tuple(terms),
        n=n,
        n_setting=settings[N],
        updates=_updates(settings),
        updates_settings=tuple(settings[key] for key in _making_more(settings)),
        ratio={"gspo": "gspo", "gpg": "none"}.get(mode, "token"),
        policy_loss=settings[LOSS_MODE],
        policy_by_answer=policy_by_answer,
        kl_by_answer=by_answer,
        loss_agg=settings[LOSS_AGG],
        # rollout_rs drops samples by the mask, which the KL loss shares.
        corrects_rollout=bool(settings[ROLLOUT_IS].value) and settings.on(RECORDS),
        correction=settings[ROLLOUT_IS],
        rollout_is_old=settings.on(BYPASS),
        stale=_stale(settings, other),
        controller=_controller(settings, terms),
        idle=tuple(idle),
        not_enabled=tuple(never),
        no_effect=tuple(_no_effect(settings, terms)),
        nobodys=settings.nobodys,
        not_hooked=_not_hooked(settings, terms),
        rejected=tuple(rejected),
        refused=tuple(refused),
        noted=tuple((n.id, Rejected(settings[n.key or KL_TYPE], n.words)) for n in noted),
        notes=tuple(_notes(settings, other)),
        beside=_beside(settings),
        unread_package=settings.table.unread,
        served=_served(settings, other),
        nearest=tuple(_nearest(settings, terms)),
        unread=settings.unread,
        unknown=_unknown(settings, other),
        cut=None if launch is None else launch.cut,
        broken=None if launch is None else launch.broken,
        line=None if launch is None else launch.line,
        sourced=() if launch is None else launch.sourced,
        unreached=() if launch is None else launch.unreached,
    )


def _served(settings: Settings, other: Trainer | None) -> bool:
    """Whether klplug has hooks for this trainer and release."""
    launch, table = settings.launch, settings.table
    if (other is not None and not other.served) or (launch is not None and launch.foreign):
        return False
    changed = table.source is not None and bool(table.source.changed)
    return not (changed or before(table.version, (0, 7)) or settings.on(DISTILLS))


def _asks_klplug(settings: Settings, terms: list[Term]) -> bool:
    """Whether klplug would see this run, to refuse it: not a fork's that asks nothing of it."""
    row, launch = trainers.row(settings.trainer), settings.launch
    recipes = row is not None and row.served and launch is not None and not launch.foreign
    return (
        is_verls(settings)
        or recipes
        or settings[KL_TYPE].written
        or any(term.from_klplug for term in terms)
    )


def _asked_by(settings: Settings) -> str:
    """The key that holds the kl_type."""
    return next((key for key in (KL_TYPE, LOSS_TYPE, PENALTY) if settings.wrote(key)), KL_TYPE)


_ALWAYS_BY_ANSWER = ("sapo", "geo_mean")
_LOSS_MODES = (
    *("vanilla", "gspo", "gpg", "clip_cov", "kl_cov", "dppo_tv", "dppo_kl", "dro", "cispo"),
    *("bypass_mode", *_ALWAYS_BY_ANSWER),
)


def _not_hooked(settings: Settings, terms: list[Term]) -> tuple[str, Setting] | None:
    """A kl_type in a release without plugins, which needs a variable that stands elsewhere."""
    version, launch = settings.table.version, settings.launch
    if launch is None or launch.sourced or not before(version, (0, 9)):
        return None
    environment = f"VERL_USE_EXTERNAL_MODULES={os.environ.get('VERL_USE_EXTERNAL_MODULES')}"
    if loads_klplug(launch.around) or loads_klplug(environment):
        return None
    words = (
        f"verl {version} knows no plugins, and nothing here sets "
        "VERL_USE_EXTERNAL_MODULES=klplug_verl in the environment: without it klplug does not run."
    )
    return next(((words, term.kind) for term in terms if term.from_klplug), None)


def loads_klplug(text: str) -> bool:
    """Whether a script, or a command line, sets the variable; one that it expands may do so.

    As an override (``...env_vars.VERL_USE_EXTERNAL_MODULES=``) it is of Ray's workers alone.
    """
    return bool(_LOADS.search(text))


_LOADS = re.compile(r"(?m)^[^#\n]*(?<![\w.])VERL_USE_EXTERNAL_MODULES\b.*(?:\bklplug_verl\b|\$)")


_REFERS = re.compile(r"\\?\$\{(?:oc\.select:)?([\w.]+)(?:,\s*(.*))?\}")


def _resolved(settings: Settings) -> Settings:
    """Values that refer to another key, ``${data.train_batch_size}``, followed to it."""
    written = {key: _followed(settings, setting) for key, setting in settings.written.items()}
    return replace(settings, written=written)


def _followed(settings: Settings, setting: Setting) -> Setting:
    for _ in range(_FOLLOWED):
        match = _REFERS.fullmatch(str(setting.value))
        if match is None:
            break
        if settings.has(match[1]):
            target = settings[match[1]]
            setting = replace(setting, value=target.value, unknown=target.unknown)
        elif match[2] is not None:
            return replace(setting, value=scalar(match[2]))
        else:
            break
    if setting.key in ASPECTS and "${" in str(setting.value) and not setting.unknown:
        return replace(setting, unknown=(f"{setting} refers to what is not here",))
    return setting


_FOLLOWED = 8  # how many references in a row


def _fetches(settings: Settings) -> bool:
    launch = settings.launch
    other = None if launch is None else trainers.row(launch.trainer)
    return other is not None and other.fetches


def _updates(settings: Settings) -> float:
    if _fetches(settings):
        return settings.number(FETCHED, 1) * max(1.0, settings.number(EPOCHS, 1))
    batch, mini = settings.number(TRAIN_BATCH, 1), settings.number(MINI_BATCH, 1)
    return math.ceil(batch / max(mini, 1)) * max(1.0, settings.number(EPOCHS, 1))


def _making_more(settings: Settings) -> Iterable[str]:
    """The settings by which one rollout serves more than one update."""
    if _fetches(settings):
        if settings.number(FETCHED, 1) > 1:
            yield FETCHED
    elif settings.number(TRAIN_BATCH, 1) > settings.number(MINI_BATCH, 1):
        yield from (TRAIN_BATCH, MINI_BATCH)
    if settings.number(EPOCHS, 1) > 1:
        yield EPOCHS


def _advantage(settings: Settings) -> Advantage:
    """A KL in the reward joins before any of this, so every factor is on both."""
    name = settings.text(ESTIMATOR)
    alone = not settings[N].unknown and settings.number(N, 1) < 2
    mean = 0 if alone else 1
    # Before 0.3.1 there is no such switch.
    by_std = settings.on(NORM_BY_STD) or not settings.has(NORM_BY_STD)
    std = 0 if alone or not by_std else -1
    gamma = settings.number(GAMMA, 1.0)
    after = {
        "grpo": Scale(mean, std),
        "grpo_vectorized": Scale(mean, std),
        "gdpo": Scale(mean, std, -1),
        "grpo_passk": Scale(0, std),
        "opo": Scale(mean),
        "gpg": Scale(mean, alpha=1),
        "reinforce_plus_plus_baseline": Scale(mean, 0, -1),
        "reinforce_plus_plus": Scale(0, 0, -1),
        "gae": Scale(0, 0, -1),
    }.get(name, Scale())
    return Advantage(
        setting=settings[ESTIMATOR],
        after=after,
        groups=name in _GROUPS,
        takes_one=True,
        discount=gamma if name in DISCOUNTED_ESTIMATORS else 1.0,
        discount_setting=settings[GAMMA],
        whitens=bool(after.batch),
        best_only=name == "grpo_passk",
    )


_WITHOUT_GROUP = ("gae", "reinforce_plus_plus", "remax")
_GROUPS = (
    *("grpo", "grpo_vectorized", "gdpo", "grpo_passk", "opo", "gpg", "rloo", "rloo_vectorized"),
    *("reinforce_plus_plus_baseline", "optimal_token_baseline", "tir_optimal_token_baseline"),
)


def _bad_values(settings: Settings) -> list[Rejected]:
    rejected = []
    modes = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
    modes.append("seq-mean-token-sum-norm")
    agg = settings[LOSS_AGG]
    if agg.value is not None and not agg.unknown and agg.value not in modes:
        rejected.append(Rejected(agg, f"loss_agg_mode takes {', '.join(modes)}"))
    fetches = _fetches(settings)
    counts = (MINI_BATCH, EPOCHS, N) if fetches else (*_COUNTS, N)
    if is_verls(settings):  # another may count its batches itself
        rejected += settings.not_numbers((LOSS_COEF, CTRL_COEF, GAMMA), counts)
    if settings.on(BYPASS) and not (settings.on(RECORDS) or settings[RECORDS].unknown):
        why = f"bypass_mode takes the sampler's log-probs, and {settings[RECORDS]} keeps none"
        rejected.append(Rejected(settings[BYPASS], why))
    ctrl = settings[CTRL_TYPE]
    if not ctrl.unknown and ctrl.value not in ("fixed", "adaptive"):
        rejected.append(Rejected(ctrl, "kl_ctrl.type takes fixed, adaptive"))
    batch, mini, dynamic = (settings[key] for key in (TRAIN_BATCH, MINI_BATCH, DYNAMIC))
    if (
        _compares_batches(settings)
        and not (batch.unknown or mini.unknown or dynamic.unknown or settings.on(DYNAMIC))
        and settings.number(TRAIN_BATCH, 1) < settings.number(MINI_BATCH, 1)
    ):
        why = f"{mini} must not exceed data.train_batch_size={batch.value}"
        rejected.append(Rejected(mini, why))
    return rejected


def _compares_batches(settings: Settings) -> bool:
    """Whether the trainer refuses a mini-batch larger than the batch.

    verl's own does from 0.3 on. A release that is guessed may be an older one, which makes one
    update of what there is; other trainers count batches in their own way.
    """
    known = settings.version_from != "guessed"
    return known and is_verls(settings) and not before(settings.table.version, (0, 3))


def _notes(settings: Settings, other: Trainer | None) -> Iterable[tuple[str, Setting]]:
    launch = settings.launch
    if settings.on(DISTILLS):
        yield (
            "The loss is distillation's: its KL is to the teacher, which ref stands for here.",
            settings[DISTILLS],
        )
    if launch is not None and launch.foreign:
        yield (
            f"{launch.trainer} is a trainer of its own. Its settings are read as verl's. What its "
            "code changes is not seen.",
            Setting("", None, launch.words[launch.main].line),
        )
    if launch is not None and other is not None and other.note:
        yield other.note, Setting("", None, launch.words[launch.main].line)
    unknown = other is not None and other.served and other.own_fit is None
    if launch is not None and unknown and (stage := _stage(settings)):
        yield (
            f"Whether {launch.trainer} has a fit of its own is not known. klplug would not start "
            f"one: {stage}.",
            Setting("", None, launch.words[launch.main].line),
        )


def _stage(settings: Settings) -> str:
    """What of klplug's, asked for or nearest to what is, needs verl's own steps."""
    try:
        plan = asked(settings)
    except (Unknown, ValueError):
        return ""
    if plan is not None:
        return trainers.stage_of(plan)
    return "a KL in the reward" if reward_switch(settings)[1] else ""


def _beside(settings: Settings) -> str:
    source, launch = settings.table.source, settings.launch
    if source is None or launch is None:
        return ""
    return os.path.relpath(source.folder, launch.folder)


def _nearest(settings: Settings, terms: list[Term]) -> Iterable[tuple[str, str]]:
    """verl's own settings that come near, for a trainer that klplug has no hooks for."""
    if settings.on(DISTILLS):
        if not settings.on(DISTIL_POLICY):
            yield "without klplug, and without a weight for reused samples", f"{DISTIL_MODE}=k2"
        return
    yield from without_klplug("k2_as_loss", _coef_as_written(terms), settings)


def _coef_as_written(terms: list[Term]) -> str:
    return f"{terms[0].coef:g}" if terms and math.isfinite(terms[0].coef) else "BETA"


def _stale(settings: Settings, other: Trainer | None) -> Setting | None:
    launch = settings.launch
    if other is not None and other.stale and launch is not None:
        return Setting("", None, launch.words[launch.main].line)
    mode = settings[TRAINER_MODE]
    return mode if mode.value in ("colocate_async", "separate_async") else None


def _controller(settings: Settings, terms: list[Term]) -> Controller | None:
    own = settings[KL_CTRL]
    if own.written and own.value not in (None, "fixed"):
        if own.value in CONTROLS and not CONTROLS[own.value].driven:
            return None
        return Controller(own, settings[KL_TARGET], True, "k3, before the update", True, kept=True)
    setting = settings[CTRL_TYPE]
    if setting.value != "adaptive":
        return None
    reward = next((t for t in terms if not t.as_loss and not t.from_klplug), None)
    estimator = None if reward is None else reward.estimator
    return Controller(
        setting,
        settings[CTRL_TARGET],
        only=": verl's acts on a KL in the reward only, and kl_loss_coef stays as it is",
        drives=reward is not None,
        fed=f"the mean of {estimator}",
        right=estimator in ("k1", "k3"),
    )


def _idle(settings: Settings, terms: list[Term]) -> tuple[list[Setting], list[Setting]]:
    """Written settings of a KL that is not on: (off for a reason, never switched on)."""
    off: list[Setting] = []
    never: list[Setting] = []
    if any(term.from_klplug for term in terms):
        return off, never
    on = {key for term in terms for key in (term.kind.key, term.amount.key)}
    if any(not term.as_loss for term in terms):
        on |= {CTRL_TYPE, CTRL_TARGET, CTRL_HORIZON}
    for key in _KL_KEYS:
        setting = settings[key]
        zero = key in (LOSS_COEF, CTRL_COEF) and settings.number(key) == 0
        if setting.written and not setting.unknown and key not in on and not zero:
            switch = settings[USE_LOSS if key.startswith(ACTOR) else USE_REWARD]
            (off if terms or switch.written else never).append(setting)
    return [s for s in off if s.value != "fixed"], [s for s in never if s.value != "fixed"]


def _no_effect(settings: Settings, terms: list[Term]) -> Iterable[tuple[Setting, str]]:
    for term in terms:
        if not term.as_loss and str(term.kind.value).endswith("+"):
            yield (
                term.kind,
                "'+' changes the gradient of a loss. A value in the reward has none of its own, so "
                "this is the estimator without '+'",
            )


def _unknown(
    settings: Settings, other: Trainer | None
) -> dict[str, tuple[tuple[Setting, str], ...]]:
    unknown: dict[str, list[tuple[Setting, str]]] = {}
    for key, aspect in ASPECTS.items():
        setting = settings[key]
        for reason in setting.unknown[:1]:
            unknown.setdefault(aspect, []).append((setting, reason))
    for key, known, aspect in (
        (ESTIMATOR, (*_GROUPS, *_WITHOUT_GROUP), aspects.ADVANTAGE),
        (LOSS_MODE, _LOSS_MODES, aspects.POLICY_LOSS),
    ):
        setting = settings[key]
        if setting.written and not setting.unknown and setting.value not in known:
            reason = f"{setting} is not one of verl's own"
            unknown.setdefault(aspect, []).append((setting, reason))
    for switch, kind in ((USE_REWARD, PENALTY), (USE_LOSS, LOSS_TYPE)):
        setting = settings[kind]
        named = whole_kl_type(settings.text(kind)) or settings.text(kind).removesuffix("+") in STOCK
        named = named or theirs(settings.text(kind), settings) is not None
        if not named and not setting.unknown and settings.on(switch) and not is_verls(settings):
            reason = f"{setting} is not one of verl's own"
            unknown.setdefault(aspects.KL, []).append((setting, reason))
    for key in () if is_verls(settings) else _COUNTS:
        setting = settings[key]
        # 0 is what asynchronous trainers have, which draw no batch.
        left = setting.value is None or (setting.value == 0 and not _fetches(settings))
        if left and key in settings.written and not setting.unknown:
            reason = f"{setting}: the trainer itself decides it"
            unknown.setdefault(aspects.UPDATES, []).append((setting, reason))
    amount = settings[CTRL_COEF]
    if other is not None and other.estimators and settings.on(USE_REWARD) and amount.value != 0:
        reason = f"its trainer takes the KL in the reward from {settings[LOSS_TYPE]}"
        unknown.setdefault(aspects.KL, []).append((settings[LOSS_TYPE], reason))
    if other is not None and other.own_loss and settings.launch is not None:
        setting = Setting("", None, settings.launch.line)
        reason = f"{settings.launch.trainer} has a loss of its own"
        for aspect in (aspects.KL, aspects.ADVANTAGE, aspects.POLICY_LOSS):
            unknown.setdefault(aspect, []).append((setting, reason))
    for config in settings.unread:
        for key in filter(functools.partial(_may_set, config), _left_to_config(settings)):
            reason = f"{config} is not read, and may set {key}"
            unknown.setdefault(ASPECTS[key], []).append((config, reason))
    for setting, reason in _changed(settings):
        unknown.setdefault(aspects.KL, []).append((setting, reason))
    for setting, reason in settings.holes:
        for aspect in set(ASPECTS.values()):
            unknown.setdefault(aspect, []).append((setting, reason))
    return {aspect: tuple(reasons) for aspect, reasons in unknown.items()}


def _changed(settings: Settings) -> Iterable[tuple[Setting, str]]:
    """What bears on this run, of the code of the package beside it that is no release's."""
    source = settings.table.source
    if source is None:
        return
    own, reward, loss = source.folder.name, reward_switch(settings)[1], settings.on(USE_LOSS)
    asked = [settings.text(kind) for on, kind in ((reward, PENALTY), (loss, LOSS_TYPE)) if on]
    for name, bears in source.changed:
        if bears == sources.ANY_KL:
            other = [kind for kind in asked if kind.removesuffix("+") not in source.kept]
            if other and not source.like:
                yield Setting("", None), f"{own}/{name} is no release's, for {', '.join(other)}"
        elif (
            bears == sources.ALWAYS
            or (bears == sources.OF_REWARD and reward)
            or (bears == sources.OF_LOSS and loss)
        ):
            yield Setting("", None), f"{own}/{name} is no release's"
    for key, name in source.unless:
        setting = settings[key]
        if setting.written and setting.value != settings.table.defaults.get(key):
            yield setting, f"{own}/{name} is no release's where {setting}"


def _left_to_config(settings: Settings) -> Iterable[str]:
    """Keys that decide, and that the command itself leaves to its config file."""
    off = {
        key
        for switch, *keys in (
            (USE_LOSS, LOSS_TYPE, LOSS_COEF),
            (USE_REWARD, PENALTY, CTRL_COEF, CTRL_TYPE, CTRL_TARGET),
        )
        if settings[switch].written and not settings.on(switch)
        for key in keys
    }
    for key in ASPECTS:
        # What the release has no such setting for, it does not read.
        if key not in settings.written and key not in off and settings.table.knows(key):
            yield key
