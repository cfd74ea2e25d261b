"""verl: the KL terms of a run, as its release computes them."""

from __future__ import annotations

import contextlib
import re

from klplug.audit.run import Term
from klplug.audit.settings import Rejected, Setting, Settings
from klplug.audit.tables import Table, before
from klplug.hosting.settings import Unknown
from klplug.spec import KLSpec, TermSpec, parse
from klplug_verl import sources, trainers
from klplug_verl.host import HOST
from klplug_verl.keys import (
    CTRL_COEF,
    DISTIL_COEF,
    DISTIL_MODE,
    DISTIL_POLICY,
    DISTILLS,
    DISTILLS_BESIDE,
    ESTIMATOR,
    GDPO_KEYS,
    KL_COEF,
    KL_TYPE,
    LOSS_COEF,
    LOSS_TYPE,
    PENALTY,
    USE_LOSS,
    USE_REWARD,
)
from klplug_verl.plan import coefficients
from klplug_verl.trainers import ITERATIVE

_STOCK = HOST.stock


def terms_of(settings: Settings) -> tuple[list[Term], list[Rejected]]:
    rejected: list[Rejected] = []
    own = settings[KL_TYPE]
    if own.written and not own.unknown:
        return _klplug_terms(settings, own, rejected)
    terms = []
    # A kl_type in one of verl's own keys decides over the other place too.
    is_klplugs = any(whole_kl_type(settings.text(key)) is not None for key in (PENALTY, LOSS_TYPE))
    for switch, on, kind, amount, placement in (
        (*reward_switch(settings), PENALTY, CTRL_COEF, "in_reward"),
        (USE_LOSS, settings.on(USE_LOSS), LOSS_TYPE, LOSS_COEF, "as_loss"),
    ):
        name = settings.text(kind)
        full = whole_kl_type(name)
        if full is None and (is_klplugs or not on):
            continue
        spec, straight, clamped = _stock(name, placement, settings.table)
        if spec is None and placement == "as_loss":
            spec = theirs(name, settings)
        if full is not None and [term.placement for term in full.terms] == [placement]:
            (spec,) = full.terms
        if spec is None and is_verls(settings):
            rejected.append(Rejected(settings[kind], _why_no_estimator(name, settings.table)))
        alone = settings.on(DISTILLS) and not settings.on(DISTILLS_BESIDE)
        dropped = "distillation without task rewards throws the policy loss away" if alone else ""
        if placement == "in_reward":
            dropped = dropped or _dropped(settings)
        elif sources.NO_LOSS in _facts(settings):
            dropped = dropped or "the actor of the verl beside the script has no KL loss"
        terms.append(
            Term(
                spec=spec,
                coef=settings.coefficient(amount),
                where=settings[switch],
                kind=settings[kind],
                amount=settings[amount],
                straight_through=straight,
                clamped=clamped,
                dropped=dropped,
                joins_after=full is not None
                and spec is not None
                and spec.reward_norm == "none"
                and settings[ESTIMATOR].value != "gae",
                from_klplug=full is not None,
                subtracted=placement == "as_loss" and sources.SUBTRACTED in _facts(settings),
            )
        )
    return terms, rejected


def _facts(settings: Settings) -> tuple[str, ...]:
    source = settings.table.source
    return () if source is None else source.facts


def reward_switch(settings: Settings) -> tuple[str, bool]:
    """What turns the KL in the reward on, and whether it does."""
    facts = _facts(settings)
    if sources.ALWAYS_REWARD in facts:
        return CTRL_COEF, True
    if sources.NEVER in facts:
        return USE_REWARD, settings.on(USE_REWARD)
    if sources.SWITCHED in facts or (
        sources.UNLESS_LOSS not in facts and USE_REWARD in settings.table.defaults
    ):
        return USE_REWARD, settings.on(USE_REWARD)
    # Before 0.3.1 verl has it in the reward, unless it has it in the loss.
    return USE_LOSS, not settings.on(USE_LOSS)


def terms_of_teacher(settings: Settings) -> list[Term]:
    """Distillation's KL to the teacher: backpropagated, or each token's advantage."""
    if not settings.on(DISTILLS):
        return []
    mode = settings[DISTIL_MODE]
    estimator = HOST.stock["as_loss"].get(str(mode.value), "").partition("_")[0]
    by_policy, clamped = settings.on(DISTIL_POLICY), estimator == "k3"
    if mode.value == "forward_kl_topk" and not by_policy:
        name, clamped = "forward_as_loss,ratio=none", False
    elif not estimator:
        return []
    elif not by_policy:
        name = f"{estimator}_as_loss,ratio=none"
    elif estimator == "k1":
        # Each token's own log-ratio as its advantage: the gradient of k2, with PPO's ratio.
        name = "k2_as_loss"
    else:
        name = f"{estimator}_in_reward"
    (spec,) = parse(name).terms
    beside = settings.on(DISTILLS_BESIDE)
    return [
        Term(
            spec=spec,
            coef=settings.coefficient(DISTIL_COEF) if beside else 1.0,
            where=settings[DISTILLS],
            kind=mode,
            amount=settings[DISTIL_COEF],
            clamped=clamped,
            joins_after=by_policy,
        )
    ]


def _dropped(settings: Settings) -> str:
    """Why a KL in the reward never reaches the advantages."""
    launch = settings.launch
    other = None if launch is None or launch.foreign else trainers.row(launch.trainer)
    if other is not None and other.drops:
        return other.drops
    if sources.NEVER in _facts(settings):
        return "the trainer of the verl beside the script never calls apply_kl_penalty"
    if settings.text(ESTIMATOR) == "gdpo" and settings[GDPO_KEYS].value:
        return (
            "gdpo makes advantages of the rewards under gdpo_reward_keys, and not of the reward "
            "that the KL is subtracted from"
        )
    return ""


def whole_kl_type(name: str) -> KLSpec | None:
    """A whole kl_type in one of verl's own keys, which turns klplug on."""
    if name.removesuffix("+") in _STOCK["in_reward"]:
        return None
    try:
        return parse(name)
    except ValueError:
        return None


def _klplug_terms(
    settings: Settings, own: Setting, rejected: list[Rejected]
) -> tuple[list[Term], list[Rejected]]:
    try:
        spec = parse(str(own.value))
    except ValueError:
        return [], rejected  # klplug refuses it, in its own words
    amount = settings[KL_COEF]
    with contextlib.suppress(Unknown):
        if amount.value is None and (said := coefficients(spec, settings)):
            amount = settings[said[0][0]]
    coef = settings.coefficient(amount.key)
    terms = [
        Term(
            spec=term,
            coef=term.factor * coef,
            where=own,
            kind=own,
            amount=amount,
            joins_after=term.reward_norm == "none" and settings[ESTIMATOR].value != "gae",
            from_klplug=True,
        )
        for term in spec.terms
    ]
    return terms, rejected


def _stock(name: str, placement: str, table: Table) -> tuple[TermSpec | None, bool, bool]:
    """verl's ``kl_penalty``: (the same gradient, straight-through, clamped)."""
    base, plus = name.removesuffix("+"), name.endswith("+")
    if base not in _names(table) or (plus and before(table.like, (0, 8))):
        return None, False, False
    straight = plus and placement == "as_loss"
    # A value in the reward has no gradient of its own: '+' changes nothing there.
    (spec,) = parse(_STOCK[placement][name if straight else base]).terms
    return spec, straight, spec.estimator == "k3" and not straight


def theirs(name: str, settings: Settings) -> TermSpec | None:
    """An estimator of a fork's, of the code that was read and as it was read."""
    row, source = trainers.row(settings.trainer), settings.table.source
    known = row is not None and source is not None and name in source.kept
    if not (known and settings.on(ITERATIVE)):
        return None
    assert row is not None
    kl_type = row.estimators.get(name)
    return None if kl_type is None else parse(kl_type).terms[0]


def _names(table: Table) -> tuple[str, ...]:
    """The estimators that ``kl_penalty`` knows; k1, k2 and k3 are names since 0.4."""
    names = tuple(_STOCK["in_reward"])
    old = before(table.like, (0, 4))
    return tuple(name for name in names if not (old and re.fullmatch("k[123]", name)))


def _why_no_estimator(name: str, table: Table) -> str:
    if name.endswith("+") and name[:-1] in _names(table) and not before(table.like, (0, 6)):
        return (
            f"verl {table.version} documents the suffix '+' and does not take it off. kl_penalty "
            "raises NotImplementedError at the first step (0.8.0 mended it)"
        )
    if name == "full":
        return "verl's kl_penalty raises NotImplementedError for 'full' at the first step"
    return (
        f"verl's kl_penalty knows {', '.join(_names(table))}; for another name it raises "
        "NotImplementedError at the first step"
    )


def is_verls(settings: Settings) -> bool:
    """Whether ``main_ppo`` itself runs it, of whose code this file speaks."""
    launch = settings.launch
    return launch is None or not (launch.foreign or trainers.row(launch.trainer))
