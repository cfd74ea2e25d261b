"""What klplug says of a run on OpenRLHF that starts: at its launch, and in its audit."""

from __future__ import annotations

from collections.abc import Iterator

from klplug.hosting import notes as hosting
from klplug.hosting.refusals import Refusal, refusals
from klplug.hosting.settings import Said, Settings, number
from klplug_openrlhf.keys import (
    ASYNC,
    CLIPS_REWARD,
    DUAL_CLIP,
    EPOCHS,
    ESTIMATOR,
    GAMMA,
    HORIZON,
    IS_ENABLE,
    IS_LEVEL,
    KL_HORIZON,
    KL_TYPE,
    LOSS_AGG,
    NO_STD,
    ROLLOUT_BATCH,
    TARGET,
    TOP_P,
    TRAIN_BATCH,
    N,
)
from klplug_openrlhf.plan import Plan, dividing_by_length

WHITENED_ESTIMATORS = ("gae", "reinforce", "reinforce_baseline")
DISCOUNTED_ESTIMATORS = ("gae", "reinforce")
"""The others set gamma to 1, and say so in the log."""


def notes(plan: Plan | None, settings: Settings) -> Iterator[Refusal]:
    """What is served, and may not be what was expected; of its own KL where there is no plan."""
    return refusals(ROWS, plan, settings)


def cut(settings: Settings) -> hosting.Cut:
    """The option by which the sampler's log-probs are not the policy's, and it in words.

    Trainer and sampler divide by the same temperature.
    """
    top_p = number(settings, TOP_P, 1)
    return (TOP_P, f"{settings.named(TOP_P)} {top_p:g}") if top_p < 1 else None


def whitened(plan: Plan | None, settings: Settings) -> Said:
    if not settings.get(NO_STD, False):
        yield from hosting.whitened(plan, settings, ESTIMATOR, WHITENED_ESTIMATORS)


def discounted(plan: Plan | None, settings: Settings) -> Said:
    return hosting.discounted(plan, settings, GAMMA, ESTIMATOR, DISCOUNTED_ESTIMATORS)


def divided_by_length(plan: Plan | None, settings: Settings) -> Said:
    return hosting.divided_by_length(plan, LOSS_AGG, ", ".join(dividing_by_length(settings)))


def dual_clip(plan: Plan | None, settings: Settings) -> Said:
    if plan is not None and plan.combined.terms and settings.get(DUAL_CLIP) is not None:
        clip = number(settings, DUAL_CLIP)
        yield (
            DUAL_CLIP,
            f"{settings.named(DUAL_CLIP)} {clip:g} clips the KL with the advantages that it is in",
        )


def unclipped_reward(plan: Plan | None, settings: Settings) -> Said:
    """OpenRLHF clips what its estimator made of the rewards."""
    if plan is not None and plan.spec.has_the_reward and settings.wrote(CLIPS_REWARD):
        yield (
            CLIPS_REWARD,
            f"{settings.named(CLIPS_REWARD)} acts on the way to the advantages, which "
            "reference=posterior sets to 0. So the reward in the posterior is not clipped",
        )


def one_update(plan: Plan | None, settings: Settings) -> Said:
    answers, size = _answers(settings), number(settings, TRAIN_BATCH)
    one = answers <= size and number(settings, EPOCHS, 1) == 1
    updates = f"{settings.named(TRAIN_BATCH)} {size:g} with {answers} answers to a rollout"
    return hosting.one_update(plan, TRAIN_BATCH, updates if one else "")


def truncated_sampler(plan: Plan | None, settings: Settings) -> Said:
    found = cut(settings)
    return hosting.truncated_sampler(plan, found, found)


def stale_samples(plan: Plan | None, settings: Settings) -> Said:
    if plan is None or not settings.get(ASYNC, False):
        return
    corrects = settings.get(IS_LEVEL, "off") != "off" or bool(settings.get(IS_ENABLE, False))
    yield from hosting.stale_samples(plan, ASYNC, corrects)


def short_horizon(plan: Plan | None, settings: Settings) -> Said:
    answers = _answers(settings)
    if plan is not None:
        for words in hosting.short_horizon(plan, answers):
            yield KL_HORIZON, words
        return
    horizon = number(settings, HORIZON)
    if settings.get(TARGET) and horizon and 5 * horizon < answers:
        yield HORIZON, hosting.negative_horizon(horizon, answers)


def _answers(settings: Settings) -> int:
    """Of a rollout."""
    return int(number(settings, ROLLOUT_BATCH, 0)) * int(number(settings, N, 1))


def extrapolation(plan: Plan | None, settings: Settings) -> Said:
    return hosting.extrapolation(plan, KL_TYPE)


ROWS = (
    whitened,
    discounted,
    extrapolation,
    divided_by_length,
    dual_clip,
    unclipped_reward,
    one_update,
    truncated_sampler,
    stale_samples,
    short_horizon,
)
