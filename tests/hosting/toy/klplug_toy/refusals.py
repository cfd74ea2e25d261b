"""What klplug refuses on the toy trainer."""

from __future__ import annotations

from collections.abc import Iterator

from klplug.hosting import refusals as hosting
from klplug.hosting.refusals import Refusal
from klplug.hosting.settings import Asked, Said, Settings


def refusals(plan: Asked, settings: Settings) -> Iterator[Refusal]:
    return hosting.refusals((no_reward, no_group), plan, settings)


def no_reward(plan: Asked, settings: Settings) -> Said:
    if plan.spec.placed("in_reward").terms:
        yield None, f"kl_type {plan.spec}: Toy RL takes a KL in its loss only. Use k2_as_loss"


def no_group(plan: Asked, settings: Settings) -> Said:
    if any(term.baseline != "none" for term in plan.spec.terms):
        samples = settings.get("samples")
        if samples < 2:
            yield "samples", f"kl_type {plan.spec} with {settings.named('samples')} {samples}"
