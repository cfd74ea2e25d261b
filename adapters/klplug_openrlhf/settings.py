"""From what a user wrote to what OpenRLHF must be told, or to one clear error."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import klplug
from klplug.hosting.settings import Settings, SettingsError, overridden
from klplug_openrlhf.keys import (
    COEF,
    DECIDED,
    DUAL_CLIP,
    ESTIMATOR,
    KIND,
    KL_COEF,
    KL_TYPE,
    USE_LOSS,
    Arguments,
    spelled,
)
from klplug_openrlhf.plan import Plan, asked, dividing_by_length
from klplug_openrlhf.refusals import recorder, refusals

WHITENED_ESTIMATORS = ("gae", "reinforce", "reinforce_baseline")


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

    active = plan.is_active
    records = recorder(own)
    records_for_kl = (
        "rollout_log_probs" in spec.requires
        and records is not None
        and own.get(records.option) == records.off
    )
    settings = {
        USE_LOSS: active,  # also keeps the reference's log-probs up to the update
        # Above 0 it loads a reference model.
        COEF: plan.kl_coef if plan.needs_reference else 0.0,
        KL_TYPE: str(spec),
        KL_COEF: plan.kl_coef if active else None,
        "klplug.records_for_kl": records_for_kl,
    }
    if active:
        # A process that klplug did not reach stops here: no stock estimator has such a name.
        settings[KIND] = str(spec)
    if records is not None and records_for_kl:
        settings[records.option] = records.on
    before = [_flag(own.named(key), value) for key, value in overridden(settings, DECIDED, own)]
    notes = list(_notes(plan, own))
    settings = {spelled(args, name) or name: value for name, value in settings.items()}
    vars(args).update(settings)
    shown = {k: v for k, v in settings.items() if not k.startswith("klplug.")}
    text = ", ".join(f"--{k}={v}" for k, v in shown.items())
    coef_text = f" kl_coef={plan.kl_coef:g}" if active else ""
    line = f"klplug {klplug.__version__}: kl_type={spec}{coef_text}; sets {text}"
    if before:
        notes.append(f"kl_type decides, and overrides {', '.join(before)}")
    return "\nklplug: note: ".join([line, *notes])


def _flag(name: str, value: object) -> str:
    return name if value is True else f"{name} {value}"


def _notes(plan: Plan, settings: Settings) -> Iterator[str]:
    """What is served, and may not be what was expected."""
    estimator = settings.get(ESTIMATOR)
    if plan.in_reward.terms and estimator in WHITENED_ESTIMATORS:
        yield (
            f"{estimator} whitens advantages after the KL has joined them, so its "
            "strength is kl_coef over their standard deviation in each batch"
        )
    dividing = ", ".join(dividing_by_length(settings))
    if dividing and any(term.horizon == "sequence" for term in plan.as_loss.terms):
        yield (
            f"{dividing} divides by the answer's length, and the gradient of whole answers is "
            "exact for sums over tokens only: it is tilted to long answers"
        )
    clip = settings.get(DUAL_CLIP)
    if plan.combined.terms and clip is not None:
        yield f"{settings.named(DUAL_CLIP)} {clip:g} clips the KL with the advantages that it is in"
