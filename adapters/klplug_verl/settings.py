"""From what a user wrote to what verl must be told, or to one clear error."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import klplug
from klplug.hosting import references, stored
from klplug.hosting.settings import SettingsError, overridden
from klplug_verl.keys import (
    CTRL_COEF,
    CTRL_HORIZON,
    CTRL_TARGET,
    CTRL_TYPE,
    DECIDED,
    LOSS_COEF,
    LOSS_TYPE,
    MINI_BATCH,
    MODEL,
    OTHERS,
    PENALTY,
    RECORDS,
    REF_MODEL,
    STILL,
    TEACHER,
    TEMPERATURE,
    TEMPLATE,
    TOKENIZER,
    TRUST,
    USE_LOSS,
    USE_REWARD,
    WORKERS_REFERENCE,
    WORKERS_SOURCE,
    WORKERS_TEACHER,
    WORKERS_UPDATE,
    Config,
    N,
)
from klplug_verl.notes import notes
from klplug_verl.plan import Plan, asked, divides_by_length
from klplug_verl.refusals import refusals


def derive(config: Any, written: Mapping[str, Any]) -> str | None:
    """Set verl's switches in ``config`` from klplug's keys; the lines that say what was set.

    Done twice on the way, with the same result: by the command's own process before anything is
    shipped, and by the trainer, which others may have started.

    Args:
        config: verl's config, defaults filled in; changed in place.
        written: dotted key to value, only what the user wrote on the command line.

    Returns:
        ``None`` where nothing asks for klplug; the config is then as it was.

    Raises:
        ValueError: names what is wrong, the value, and what is allowed.
    """
    own = Config(config, written)
    plan = asked(own)
    if plan is None:
        return None
    plan = dataclasses.replace(plan, divides_by_length=divides_by_length(own))
    spec = plan.spec
    for refusal in refusals(plan, own):
        raise SettingsError(refusal.words)
    if plan.ref_model is not None:
        _check(plan.ref_model, REF_MODEL, plan.over_vocabulary, own)
    if plan.teacher is not None:
        _check(plan.teacher, TEACHER, False, own)
    if plan.source is not None:
        # Each worker reads it, whatever folder it runs in.
        plan = dataclasses.replace(plan, source=os.path.abspath(plan.source))
        _check_source(plan, own)

    as_loss, in_reward = plan.as_loss, plan.in_reward
    settings: dict[str, Any] = {USE_LOSS: as_loss.measures, USE_REWARD: bool(in_reward.terms)}
    # The strings that travel. A process that klplug did not reach stops at them: verl's own
    # kl_penalty knows no such name.
    if settings[USE_LOSS]:
        settings |= {LOSS_TYPE: str(as_loss), LOSS_COEF: plan.kl_coef}
    if settings[USE_REWARD]:
        settings |= {PENALTY: str(in_reward), CTRL_COEF: plan.kl_coef}
    if "rollout_log_probs" in spec.requires:
        settings[RECORDS] = True
    controller = {
        CTRL_TYPE: plan.kl_ctrl,
        CTRL_TARGET: plan.kl_target,
        CTRL_HORIZON: plan.kl_horizon,
    }
    before = [f"{k}={value}" for k, value in overridden(settings | controller, DECIDED, own)]
    _update(config, settings)
    for_workers = {
        WORKERS_REFERENCE: plan.ref_model,
        WORKERS_UPDATE: plan.ref_update or (STILL if plan.needs_reference else None),
        WORKERS_TEACHER: plan.teacher,
        WORKERS_SOURCE: plan.source,
    }
    _update(config, {key: value for key, value in for_workers.items() if value is not None})
    kept = {
        "kl_type": str(spec),
        "kl_coef": plan.kl_coef if spec.terms else None,
        "kl_ctrl": plan.kl_ctrl,
        **{name: getattr(plan, name) for name in OTHERS},
    }
    _update(config, {"klplug": {key: value for key, value in kept.items() if value is not None}})
    text = ", ".join(f"{key}={value}" for key, value in settings.items())
    line = f"klplug {klplug.__version__}: {plan.words}; sets {text}"
    said = [note.words for note in notes(plan, own)]
    if before:
        said.append(f"kl_type decides, and overrides {', '.join(before)}")
    return "\nklplug: note: ".join([line, *said])


def _check(path: str, key: str, over_vocabulary: bool, settings: Config) -> None:
    """A model that the KL is to."""
    from verl.utils.fs import copy_to_local

    tokenizer = settings.get(TOKENIZER)
    references.check(
        copy_to_local(settings.get(MODEL)),
        copy_to_local(path),
        key,
        tokenizer=None if tokenizer is None else copy_to_local(tokenizer),
        # One that is set for the policy is set for the reference too.
        in_chat=settings.get(TEMPLATE) is None,
        over_vocabulary=over_vocabulary,
        trust_remote_code=bool(settings.get(TRUST)),
    )


def _check_source(plan: Plan, settings: Config) -> None:
    from verl.utils.fs import copy_to_local

    assert plan.source is not None
    tokenizer = settings.get(TOKENIZER)
    stored.check(
        plan.source,
        copy_to_local(settings.get(MODEL)),
        temperature=settings.get(TEMPERATURE),
        answers=settings.get(MINI_BATCH) * settings.get(N),
        tokenizer=None if tokenizer is None else copy_to_local(tokenizer),
        trust_remote_code=bool(settings.get(TRUST)),
    )


def _update(config: Any, settings: Mapping[str, Any]) -> None:
    from omegaconf import OmegaConf

    for key, value in settings.items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
