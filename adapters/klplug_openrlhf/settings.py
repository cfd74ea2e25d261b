"""From what a user wrote to what OpenRLHF must be told, or to one clear error."""

from __future__ import annotations

import os
from argparse import Namespace

import klplug
from klplug.hosting import references, stored
from klplug.hosting.settings import SettingsError, overridden
from klplug_openrlhf.keys import (
    CHAT,
    COEF,
    DECIDED,
    KIND,
    KL_COEF,
    KL_TYPE,
    PRETRAIN,
    REF_MODEL,
    SOURCE,
    TEACHER,
    TEMPERATURE,
    TRAIN_BATCH,
    USE_LOSS,
    Arguments,
    spelled,
)
from klplug_openrlhf.notes import notes as said_of
from klplug_openrlhf.plan import asked
from klplug_openrlhf.refusals import recorder, refusals


def derive(args: Namespace, written: Namespace) -> str:
    """Set OpenRLHF's switches on ``args`` from klplug's keys; the lines that say what was set.

    Args:
        args: the parsed command line, dotted names, defaults filled in; changed in place.
        written: the same, holding only what the user wrote.

    Raises:
        ValueError: names what is wrong, the value, and what is allowed.
    """
    own = Arguments(args, written)
    plan = asked(own)
    spec = plan.spec
    for refusal in refusals(plan, own):
        raise SettingsError(refusal.words)
    named = ((REF_MODEL, plan.ref_model, plan.over_vocabulary), (TEACHER, plan.teacher, False))
    for key, path, over_vocabulary in named:
        if path is not None:
            references.check(
                own.get(PRETRAIN),
                path,
                key,
                in_chat=bool(own.get(CHAT)),
                over_vocabulary=over_vocabulary,
                trust_remote_code=True,  # as OpenRLHF itself loads every model
            )

    if plan.source is not None:
        stored.check(
            plan.source,
            own.get(PRETRAIN),
            temperature=own.get(TEMPERATURE),
            answers=own.get(TRAIN_BATCH),
            trust_remote_code=True,
        )

    active = plan.is_active
    records = recorder(own)
    records_for_kl = (
        "rollout_log_probs" in spec.requires
        and records is not None
        and own.get(records.option) == records.off
    )
    settings = {
        USE_LOSS: active,  # also keeps the reference's log-probs up to the update
        # Above 0 it loads a reference model; what acts is the controller's, and monitor's is 0.
        COEF: (plan.kl_coef or 1.0) if plan.needs_reference else 0.0,
        KL_TYPE: str(spec),
        KL_COEF: plan.kl_coef if spec.terms else None,
        "klplug.records_for_kl": records_for_kl,
        # Each actor reads it, whatever folder it runs in.
        SOURCE: None if plan.source is None else os.path.abspath(plan.source),
    }
    if active:
        # A process that klplug did not reach stops here: no stock estimator has such a name.
        settings[KIND] = str(spec)
    if records is not None and records_for_kl:
        settings[records.option] = records.on
    before = [_flag(own.named(key), value) for key, value in overridden(settings, DECIDED, own)]
    notes = [note.words for note in said_of(plan, own)]
    settings = {spelled(args, name) or name: value for name, value in settings.items()}
    vars(args).update(settings)
    shown = {k: v for k, v in settings.items() if not k.startswith("klplug.")}
    text = ", ".join(f"--{k}={v}" for k, v in shown.items())
    line = f"klplug {klplug.__version__}: {plan.words}; sets {text}"
    if before:
        notes.append(f"kl_type decides, and overrides {', '.join(before)}")
    return "\nklplug: note: ".join([line, *notes])


def _flag(name: str, value: object) -> str:
    return name if value is True else f"{name} {value}"
