"""What klplug refuses on OpenRLHF, each once: asked by a run before it starts, and by its audit.

A row yields the option that it is about, and one line. A row that needs a value which only a run
could tell says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from klplug import parse
from klplug.hosting import refusals as hosting
from klplug.hosting.refusals import Refusal
from klplug.hosting.settings import Said, Settings, number
from klplug.numerics import number_of
from klplug_openrlhf.keys import (
    COEF,
    ENGINES,
    ESTIMATOR,
    GAMMA,
    IN_4_BITS,
    KIND,
    KL_COEF,
    KL_CTRL,
    KL_TYPE,
    LORA,
    POLICY_LOSS,
    RECOMPUTES,
    REF_UPDATE,
    RING,
    ROLLOUT_BATCH,
    SOURCE,
    STOCK_ESTIMATORS,
    TARGET,
    TENSOR_PARALLEL,
    N,
)
from klplug_openrlhf.notes import cut as cut_sampler
from klplug_openrlhf.plan import RECORDERS, Plan, Recorder, coefficient, dividing_by_length

GROUP_ESTIMATORS = ("group_norm", "dr_grpo", "rloo")


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
    value = number_of(coefficient(plan.spec, settings))
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
            f"kl_type {plan.spec}: reward_norm=group is verl's own order. On OpenRLHF a KL joins "
            "the advantages after group normalisation. Leave the option out",
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


def no_other_answers(plan: Plan, settings: Settings) -> Said:
    return hosting.no_other_answers(plan, settings, N, ROLLOUT_BATCH)


def weight_of_no_group(plan: Plan, settings: Settings) -> Said:
    return hosting.weight_of_no_group(plan, settings, N)


def posterior_of_no_group(plan: Plan, settings: Settings) -> Said:
    return hosting.posterior_of_no_group(plan, settings, N)


def posterior_beside_another_loss(plan: Plan, settings: Settings) -> Said:
    return hosting.posterior_beside_another_loss(plan, settings, POLICY_LOSS, "ppo")


def head_of_another_loss(plan: Plan, settings: Settings) -> Said:
    return hosting.head_of_another_loss(plan, settings, POLICY_LOSS, "ppo")


def length_tilts(plan: Plan, settings: Settings) -> Said:
    if not plan.in_reward.terms:
        return
    dividing = ", ".join(dividing_by_length(settings))
    if dividing and (estimator := settings.get(ESTIMATOR)) not in GROUP_ESTIMATORS:
        yield (
            ESTIMATOR,
            f"kl_type {plan.spec} with {settings.named(ESTIMATOR)} {estimator}: the policy loss "
            f"divides by the answer's length ({dividing}). That would tilt the optimum to long "
            "answers. Whole answers are compared with the others of their group under "
            f"{', '.join(GROUP_ESTIMATORS)} alone. Leave the division out, or use one of these, or "
            "k2_as_loss",
        )


def baseline_over_lengths(plan: Plan, settings: Settings) -> Said:
    if not any(term.baseline == "batch" for term in plan.in_reward.terms):
        return
    dividing = ", ".join(dividing_by_length(settings))
    if dividing:
        yield (
            None,
            f"kl_type {plan.spec} with {dividing}: baseline=batch is refused, as whole answers are "
            "compared with the others of their group there already. Leave it out",
        )


def baseline_on_discounted_returns(plan: Plan, settings: Settings) -> Said:
    baseline = next((t.baseline for t in plan.in_reward.terms if t.baseline != "none"), None)
    if baseline is None:
        return
    estimator = settings.get(ESTIMATOR)
    discount = ""
    if estimator == "reinforce" and (gamma := number(settings, GAMMA, 1)) != 1:
        discount = f" and {settings.named(GAMMA)} {gamma:g}"
    if estimator == "gae" or discount:
        yield (
            ESTIMATOR,
            f"kl_type {plan.spec} with {settings.named(ESTIMATOR)} {estimator}{discount}: "
            f"baseline={baseline} is a baseline on undiscounted returns. Leave it out, or use "
            "another estimator",
        )


def hidden_states_in_pieces(plan: Plan, settings: Settings) -> Said:
    if not plan.over_vocabulary:
        return
    for key, cut in ((RING, "answers are"), (TENSOR_PARALLEL, "the vocabulary is")):
        if (size := number(settings, key, 1)) > 1:
            yield (
                key,
                f"kl_type {plan.spec} with {settings.named(key)} {size:g}: vocab={plan.vocab} is "
                f"refused where {cut} cut over ranks. Leave {settings.named(key)} out, or the "
                "option vocab",
            )


def weights_of_another_kind(plan: Plan, settings: Settings) -> Said:
    """The reference is a whole model, and takes the policy's parameters one for one."""
    if plan.ref_update is None:
        return
    for key, default, has in (
        (LORA, 0, "trains an adapter"),
        (IN_4_BITS, False, "has its weights in 4 bits"),
        (TENSOR_PARALLEL, 1, "cuts its matrices over ranks"),
    ):
        if (value := settings.get(key, default)) != default:
            yield (
                key,
                f"{settings.named(REF_UPDATE)} is {plan.ref_update}, and {settings.named(key)} "
                f"{value} {has}: the reference can't follow there. Leave one out",
            )


def stored_answers_in_a_ring(plan: Plan, settings: Settings) -> Said:
    """ring-flash-attn has the answers' lengths of one forward at a time, in a global."""
    if plan.source is None:
        return
    if (size := number(settings, RING, 1)) > 1 and settings.get(RECOMPUTES, False):
        yield (
            RECOMPUTES,
            f"{settings.named(SOURCE)} is {plan.source}, with {settings.named(RING)} {size:g} and "
            f"{settings.named(RECOMPUTES)}. The backward computes the layers of the policy's own "
            "answers again. Ring attention has the lengths of the stored ones by then. Leave one "
            "out",
        )


def truncated_sampler(plan: Plan, settings: Settings) -> Said:
    return hosting.truncated_sampler(plan, cut_sampler(settings))


ROWS = (
    another_kl_type,
    two_coefficients,
    moving_controller,
    verls_order,
    rollout_not_recorded,
    hosting.controller_of_nothing,
    hosting.path_of_nothing,
    hosting.reference_of_nothing,
    hosting.update_of_nothing,
    hosting.update_to_nothing,
    hosting.source_of_another_kind,
    hosting.teacher_without_a_name,
    hosting.teacher_of_nothing,
    hosting.teacher_alone,
    weights_of_another_kind,
    head_of_another_loss,
    length_tilts,
    baseline_over_lengths,
    baseline_on_discounted_returns,
    no_other_answers,
    weight_of_no_group,
    posterior_of_no_group,
    posterior_beside_another_loss,
    hosting.posterior_without_a_coefficient,
    hosting.two_baselines,
    hosting.two_divergences_over_the_vocabulary,
    hosting.baseline_of_nothing,
    hidden_states_in_pieces,
    stored_answers_in_a_ring,
    truncated_sampler,
)
