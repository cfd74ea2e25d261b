"""What klplug refuses on OpenRLHF, each once: asked by a run before it starts, and by its audit.

A row yields the option that it is about, and one line. A row that needs a value which only a run
could tell says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from klplug import parse
from klplug.hosting import settings as hosting
from klplug.hosting.settings import Refusal, Settings
from klplug.spec import TermSpec
from klplug_openrlhf.keys import (
    COEF,
    ENGINES,
    ESTIMATOR,
    GAMMA,
    KIND,
    KL_COEF,
    KL_CTRL,
    KL_TYPE,
    POLICY_LOSS,
    STOCK_ESTIMATORS,
    TARGET,
    N,
)
from klplug_openrlhf.plan import RECORDERS, Plan, Recorder, coefficient, dividing_by_length

GROUP_ESTIMATORS = ("group_norm", "dr_grpo", "rloo")

Said = Iterator[tuple[str | None, str]]


def refusals(plan: Plan, settings: Settings) -> Iterator[Refusal]:
    """Why OpenRLHF can't be told what ``plan`` asks; none where it is served."""
    return hosting.refusals(ROWS, plan, settings)


def recorder(settings: Settings) -> Recorder | None:
    """The switch by which this release records the sampler's log-probs."""
    return next((r for r in RECORDERS if settings.has(r.option)), None)


# What contradicts: klplug's options beside OpenRLHF's own.


def another_kl_type(plan: Plan, settings: Settings) -> Said:
    if not settings.wrote(KIND) or settings.get(KL_TYPE) is None:
        return
    name = str(settings.get(KIND))
    try:
        agrees = name in STOCK_ESTIMATORS or parse(name) == plan.spec
    except ValueError as error:
        yield KIND, f"{settings.named(KIND)}: {error}"
        return
    if not agrees:
        yield (
            KIND,
            f"{settings.named(KIND)} {name} contradicts --{KL_TYPE} {plan.spec}: two formulations "
            "are named. Leave the flag out",
        )


def two_coefficients(plan: Plan, settings: Settings) -> Said:
    if settings.get(KL_COEF) is None:
        return
    value = coefficient(plan.spec, settings)
    if value is not None and value != plan.kl_coef:
        yield (
            COEF,
            f"{settings.named(COEF)} {value:g} contradicts --{KL_TYPE} {plan.spec}: --{KL_COEF} is "
            f"{plan.kl_coef:g}. Leave one out",
        )


def moving_controller(plan: Plan, settings: Settings) -> Said:
    if settings.wrote(TARGET) and (value := settings.get(TARGET)):
        yield (
            TARGET,
            f"{settings.named(TARGET)} {value} contradicts --{KL_TYPE} {plan.spec}: klplug has its "
            f"own controller: write --{KL_CTRL} adaptive --klplug.kl_target",
        )


# What OpenRLHF can't do.


def verls_order(plan: Plan, settings: Settings) -> Said:
    if any(term.reward_norm == "group" for term in plan.spec.terms):
        yield (
            None,
            f"kl_type {plan.spec}: reward_norm=group is verl's own order, and OpenRLHF has none "
            "like it: its KL joins the advantages after group normalisation. Leave the option out",
        )


def rollout_not_recorded(plan: Plan, settings: Settings) -> Said:
    if "rollout_log_probs" not in plan.spec.requires:
        return
    instead = "ratio=old" if plan.needs_reference else "reference=ref"
    if recorder(settings) is None:
        yield (
            None,
            f"kl_type {plan.spec} needs rollout log-probs, which this OpenRLHF does not record: "
            f"use {instead}",
        )
    if not settings.get(ENGINES):
        yield (
            ENGINES,
            f"kl_type {plan.spec} needs rollout log-probs, which OpenRLHF records with vLLM only: "
            f"set {settings.named(ENGINES)}, or use {instead}",
        )


def controller_of_nothing(plan: Plan, settings: Settings) -> Said:
    if plan.spec.terms and not plan.needs_reference and plan.kl_ctrl != "fixed":
        yield (
            KL_CTRL,
            f"kl_type {plan.spec} with --{KL_CTRL} {plan.kl_ctrl}: the controller holds a KL that "
            "is measured at the start of a step, where the policy is the sampler itself. Use fixed",
        )


def head_of_another_loss(plan: Plan, settings: Settings) -> Said:
    as_loss = (term for term in plan.spec.terms if term.placement == "as_loss")
    head = next((term.head for term in as_loss if term.head != "separate"), None)
    if head is None:
        return
    loss = settings.get(POLICY_LOSS, "ppo")
    if loss != "ppo":
        yield (
            POLICY_LOSS,
            f"kl_type {plan.spec} with {settings.named(POLICY_LOSS)} {loss}: head={head} has the "
            f"ratio and clip of PPO's policy loss, one per token, and {loss} has others. Use ppo, "
            "or head=separate",
        )


def length_tilts(plan: Plan, settings: Settings) -> Said:
    if not _in_reward(plan):
        return
    dividing = ", ".join(dividing_by_length(settings))
    if dividing and (estimator := settings.get(ESTIMATOR)) not in GROUP_ESTIMATORS:
        yield (
            ESTIMATOR,
            f"kl_type {plan.spec} with {settings.named(ESTIMATOR)} {estimator} and a policy loss "
            f"that divides by the answer's length ({dividing}) would tilt the optimum to long "
            "answers, and there is no group to take a baseline from. Leave that out, or use one of "
            f"{', '.join(GROUP_ESTIMATORS)}, or k2_as_loss",
        )


def baseline_over_lengths(plan: Plan, settings: Settings) -> Said:
    if not any(term.baseline == "batch" for term in _in_reward(plan)):
        return
    dividing = ", ".join(dividing_by_length(settings))
    if dividing:
        yield (
            None,
            f"kl_type {plan.spec} with {dividing}: baseline=batch is refused, as whole answers are "
            "compared with the others of their group there already. Leave it out",
        )


def baseline_on_discounted_returns(plan: Plan, settings: Settings) -> Said:
    baseline = next((t.baseline for t in _in_reward(plan) if t.baseline != "none"), None)
    if baseline is None:
        return
    estimator = settings.get(ESTIMATOR)
    discount = ""
    if estimator == "reinforce" and (gamma := settings.get(GAMMA)) != 1:
        discount = f" and {settings.named(GAMMA)} {gamma:g}"
    if estimator == "gae" or discount:
        yield (
            ESTIMATOR,
            f"kl_type {plan.spec} with {settings.named(ESTIMATOR)} {estimator}{discount}: "
            f"baseline={baseline} is a baseline on undiscounted returns. Leave it out, or use "
            "another estimator",
        )


def no_other_answers(plan: Plan, settings: Settings) -> Said:
    if any(term.baseline == "group" for term in plan.spec.terms) and (size := settings.get(N)) < 2:
        yield (
            N,
            f"kl_type {plan.spec} with {settings.named(N)} {size}: baseline=group compares "
            "an answer with the others to its prompt. Sample at least 2, or use baseline=batch",
        )


def two_baselines(plan: Plan, settings: Settings) -> Said:
    if sum(term.placement == "as_loss" for term in _compared(plan)) > 1:
        yield (
            None,
            f"kl_type {plan.spec}: OpenRLHF's samples carry one baseline. Leave it out of all "
            "terms but one",
        )


def baseline_of_nothing(plan: Plan, settings: Settings) -> Said:
    if any(term.reference == "rollout" for term in _compared(plan)):
        yield (
            None,
            f"kl_type {plan.spec}: baseline with reference=rollout is refused: it is measured at "
            "the start of a step, where the policy is the sampler itself. Leave it out",
        )


def _in_reward(plan: Plan) -> list[TermSpec]:
    return [term for term in plan.spec.terms if term.placement == "in_reward"]


def _compared(plan: Plan) -> list[TermSpec]:
    return [term for term in plan.spec.terms if term.baseline != "none"]


ROWS = (
    hosting.no_hidden_states,
    another_kl_type,
    two_coefficients,
    moving_controller,
    verls_order,
    rollout_not_recorded,
    controller_of_nothing,
    head_of_another_loss,
    length_tilts,
    baseline_over_lengths,
    baseline_on_discounted_returns,
    no_other_answers,
    two_baselines,
    baseline_of_nothing,
)
