"""What klplug refuses on verl, each once: asked by a run before it starts, and by its audit.

A row yields the key that it is about, and one line. A row that needs a value which only a run could
tell says nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from klplug import parse
from klplug.hosting import refusals as hosting
from klplug.hosting.refusals import Refusal
from klplug.hosting.settings import Said, Settings, number
from klplug.samples import weights_of
from klplug_verl import trainers
from klplug_verl.keys import (
    ADAPTERS,
    BYPASS,
    CTRL_TYPE,
    DISTIL_POLICY,
    DISTILLS,
    DISTILLS_BESIDE,
    ESTIMATOR,
    KL_COEF,
    KL_CTRL,
    LEGACY,
    LORA,
    LOSS_AGG,
    LOSS_MODE,
    PLACES,
    RECORDS,
    REF,
    REF_MODEL,
    REF_UPDATE,
    RESAMPLES,
    SEQUENCE_PARALLEL,
    SOURCE,
    STRATEGY,
    TEACHER,
    TRAIN_BATCH,
    TRAINER_MODE,
    USE_V1,
    N,
    is_stock,
)
from klplug_verl.notes import bypass, cut
from klplug_verl.plan import Plan, aggregation_divides, coefficients, divides_by_length

REWARD_ESTIMATORS = (
    "grpo",
    "grpo_vectorized",
    "grpo_passk",
    "rloo",
    "rloo_vectorized",
    "opo",
    "remax",
    "gpg",
)
"""Advantage estimators whose result a KL can be joined to: one number per answer. The others whiten
over the batch, bootstrap, or weigh each token."""

WITHOUT_ADAPTERS = ("torchtitan", "automodel")
"""Engines whose ``disable_adapter`` does nothing."""


def refusals(plan: Plan, settings: Settings) -> Iterator[Refusal]:
    """Why verl can't be told what ``plan`` asks; none where it is served."""
    return hosting.refusals(ROWS, plan, settings)


# What contradicts: klplug's keys beside verl's own.


def another_kl_type(plan: Plan, settings: Settings) -> Said:
    if settings.below("klplug") is None:
        return
    for placement, _, key, _ in PLACES:
        if not settings.wrote(key):
            continue
        name = str(settings.get(key))
        try:
            agrees = is_stock(name) or parse(name) == plan.spec.placed(placement)
        except ValueError as error:
            yield key, f"{key}: {error}"
            continue
        if not agrees:
            yield (
                key,
                f"{key}={name} contradicts kl_type {plan.spec}: two formulations are named. Leave "
                "the key out",
            )


def two_coefficients(plan: Plan, settings: Settings) -> Said:
    if settings.below("klplug") is None:
        return
    own = settings.get(KL_COEF)
    for key, value in coefficients(plan.spec, settings):
        said = plan.kl_coef if own is None else own
        if value != said:
            yield (
                key,
                f"{key}={value} contradicts kl_type {plan.spec}: klplug.kl_coef is {said:g}. Leave "
                "one out",
            )


def moving_controller(plan: Plan, settings: Settings) -> Said:
    if settings.below("klplug") is None or not settings.wrote(CTRL_TYPE):
        return
    kind = settings.get(CTRL_TYPE)
    if kind not in (None, "fixed"):
        yield (
            CTRL_TYPE,
            f"{CTRL_TYPE}={kind} contradicts kl_type {plan.spec}: klplug has its own controller: "
            f"write +{KL_CTRL}={kind}, with +klplug.kl_target",
        )


# What verl can't do, or klplug does not reach.


def another_main(plan: Plan, settings: Settings) -> Said:
    if not settings.has("trainer") or not settings.has("actor_rollout_ref"):
        yield None, f"kl_type {plan.spec}: klplug serves verl.trainer.main_ppo, not this one"


def synchronous_trainer(plan: Plan, settings: Settings) -> Said:
    """verl 0.8's main_ppo_sync has a trainer of its own inside."""
    if settings.trainer.endswith(("main_ppo_sync", "main_ppo_sync.py")):
        yield (
            None,
            f"kl_type {plan.spec}: klplug does not reach the trainer inside of {settings.trainer}. "
            "Use verl.trainer.main_ppo",
        )


def another_trainer(plan: Plan, settings: Settings) -> Said:
    row = trainers.row(settings.trainer)
    asynchronous = row is not None and row.stale
    if asynchronous or any(settings.has(key) for key in ("async_training", "rollout")):
        yield (
            None,
            f"kl_type {plan.spec}: verl's fully asynchronous and one-step-off recipes have "
            "trainers of their own, which klplug does not reach. Use verl.trainer.main_ppo, "
            "with trainer.v1.trainer_mode=separate_async if need be",
        )


def own_fit(plan: Plan, settings: Settings) -> Said:
    row = trainers.row(settings.trainer)
    if row is not None and row.own_fit and trainers.stage_of(plan):
        yield None, trainers.out_of_reach(plan, settings.trainer)


def rewards_past_the_kl(plan: Plan, settings: Settings) -> Said:
    if plan.in_reward.terms and settings.get(ESTIMATOR) == "gdpo":
        yield (
            ESTIMATOR,
            f"kl_type {plan.spec} with {ESTIMATOR}=gdpo: it takes its rewards from "
            "algorithm.gdpo_reward_keys, past any KL in the tokens' rewards, and whitens them. Use "
            "k2_as_loss",
        )


def no_definite_strength(plan: Plan, settings: Settings) -> Said:
    joined_after = [t for t in plan.in_reward.terms if t.reward_norm == "none"]
    if not joined_after:
        return
    estimator = str(settings.get(ESTIMATOR))
    if estimator not in (*REWARD_ESTIMATORS, "gae", "gdpo"):
        # A baseline does not go with that order.
        before = dataclasses.replace(joined_after[0], reward_norm="group", baseline="none")
        yield (
            ESTIMATOR,
            f"kl_type {plan.spec} with {ESTIMATOR}={estimator}: it whitens "
            f"or weighs what it is given, so a KL has no definite strength there. Use one of "
            f"{', '.join(REWARD_ESTIMATORS)}, gae, or k2_as_loss, or verl's own order: {before}",
        )


def length_tilts(plan: Plan, settings: Settings) -> Said:
    joined_after = any(t.reward_norm == "none" for t in plan.in_reward.terms)
    if not joined_after or not divides_by_length(settings):
        return
    alone = settings.get(ESTIMATOR) == "gae"
    key, value = (ESTIMATOR, "gae") if alone else (N, int(number(settings, N, 1)))
    if alone or int(value) < 2:
        other = (
            (LOSS_AGG, "token-mean") if aggregation_divides(settings) else (LOSS_MODE, "vanilla")
        )
        yield (
            key,
            f"kl_type {plan.spec}: the policy loss divides by the answer's length, which would "
            f"tilt the optimum to long answers. With {key}={value} there is no group to take a "
            f"baseline from. Use {'='.join(other)}, {'a group estimator' if alone else 'n > 1'}, "
            "or k2_as_loss",
        )


def baseline_beside_values(plan: Plan, settings: Settings) -> Said:
    baseline = next((t.baseline for t in plan.in_reward.terms if t.baseline != "none"), None)
    if baseline is not None and settings.get(ESTIMATOR) == "gae":
        yield (
            ESTIMATOR,
            f"kl_type {plan.spec} with {ESTIMATOR}=gae: its value function is the baseline of "
            f"reward and KL. Leave baseline={baseline} out",
        )


def no_other_answers(plan: Plan, settings: Settings) -> Said:
    return hosting.no_other_answers(plan, settings, N, TRAIN_BATCH)


def weight_of_no_group(plan: Plan, settings: Settings) -> Said:
    return hosting.weight_of_no_group(plan, settings, N)


def posterior_of_no_group(plan: Plan, settings: Settings) -> Said:
    return hosting.posterior_of_no_group(plan, settings, N)


def posterior_beside_another_loss(plan: Plan, settings: Settings) -> Said:
    return hosting.posterior_beside_another_loss(plan, settings, LOSS_MODE, "vanilla")


def head_of_another_loss(plan: Plan, settings: Settings) -> Said:
    return hosting.head_of_another_loss(plan, settings, LOSS_MODE, "vanilla")


def no_entropies(plan: Plan, settings: Settings) -> Said:
    """verl measures them where it recomputes the log-probs."""
    if not settings.get(BYPASS, False):
        return
    for own in weights_of(plan.spec):
        if "entropy" in own.needs:
            yield (
                BYPASS,
                f"kl_type {plan.spec} with {BYPASS}=True: weight={own.written} needs the policy's "
                "entropies, which verl measures with the log-probs that this skips. Leave one out",
            )


def legacy_worker(plan: Plan, settings: Settings) -> Said:
    """verl 0.7 runs its own workers, and not the engine's, by default."""
    as_loss = plan.as_loss.terms
    if not as_loss or settings.get(LEGACY, "disable") == "disable":
        return
    strategy = str(settings.get(STRATEGY))
    unserved = [
        *([f"strategy={strategy}"] if strategy not in ("fsdp", "fsdp2") else ()),
        *([f"vocab={plan.vocab}"] if plan.over_vocabulary else ()),
        *(["head=combined"] if any(t.head == "combined" for t in as_loss) else ()),
        *([f"baseline={t.baseline}" for t in as_loss if t.baseline != "none"]),
        *([f"weight={t.weight}" for t in as_loss if t.weight != "none"]),
        *(
            [f"reference={as_loss[0].reference}"]
            if "ref_log_probs" not in plan.spec.requires
            else ()
        ),
        *(["reference=posterior"] if plan.spec.has_the_reward else ()),
    ]
    if unserved:
        yield (
            LEGACY,
            f"kl_type {plan.spec} with {unserved[0]} is not served on verl 0.7's own workers. Set "
            f"{LEGACY}=disable",
        )


def _with_an_adapter(said: str, settings: Settings, why: str) -> Said:
    for key in (*LORA, *ADAPTERS):
        if value := settings.get(key):
            yield key, f"{said} with {key}={value}: {why}. Leave one out"


def _on_own_workers(said: str, settings: Settings) -> Said:
    """Those of verl 0.7, which it has beside the engines."""
    if settings.get(LEGACY, "disable") != "disable":
        yield LEGACY, f"{said} is not served on verl 0.7's own workers. Set {LEGACY}=disable"


def _on_another_engine(said: str, settings: Settings, why: str) -> Said:
    strategy = str(settings.get(STRATEGY))
    if strategy not in ("fsdp", "fsdp2"):
        yield STRATEGY, f"{said} with {STRATEGY}={strategy}: {why}"


def stored_out_of_reach(plan: Plan, settings: Settings) -> Said:
    """Stored answers go through FSDP's engine, as one more micro-batch of the policy's own loss."""
    if plan.source is None:
        return
    said = f"{SOURCE}={plan.source}"
    yield from _on_own_workers(said, settings)
    why = "stored answers go through verl's FSDP engine alone. Use fsdp or fsdp2, or leave it out"
    yield from _on_another_engine(said, settings, why)
    if settings.get(DISTILLS, False):
        yield (
            DISTILLS,
            f"{said} with {DISTILLS}=True: verl's loss wants a teacher's log-probs of each answer, "
            "and stored ones have none. Leave one out",
        )


def policy_loss_thrown_away(plan: Plan, settings: Settings) -> Said:
    """In which a KL as loss is, the advantages that one in the reward joins, and the metrics."""
    if (
        plan.is_active
        and settings.get(DISTILLS, False)
        and not settings.get(DISTILLS_BESIDE, False)
        # By policy gradient verl computes it first, so monitor has its metrics.
        and (plan.spec.terms or not settings.get(DISTIL_POLICY, False))
    ):
        yield (
            DISTILLS_BESIDE,
            f"kl_type {plan.spec} with {DISTILLS_BESIDE}=False: verl throws the policy loss away "
            "there. Every KL in it or in its advantages goes with it. Set it to True, or leave "
            "the KL out",
        )


def resampled_rows(plan: Plan, settings: Settings) -> Said:
    """verl draws rows anew once it has their advantages; its v1 trainer puts these back beside the
    rows that there were."""
    if not (plan.is_active and settings.get(RESAMPLES, False) and settings.get(ESTIMATOR) == "gae"):
        return
    said = f"kl_type {plan.spec} with {RESAMPLES}=True"
    if settings.get(USE_V1, False):
        yield (
            RESAMPLES,
            f"{said}: verl draws the answers of a step anew. Its v1 trainer puts their advantages "
            f"beside the tokens of others. Leave it out, or set {USE_V1}=False",
        )
        return
    others = [
        *(f"baseline={t.baseline}" for t in plan.spec.terms if t.baseline != "none"),
        *(
            f"weight={own.written}"
            for own in weights_of(plan.spec)
            if {"entropy", "group_ids"} & {*own.needs}
        ),
        *(["reference=posterior"] if plan.spec.has_the_reward else []),
    ]
    if others:
        yield (
            RESAMPLES,
            f"{said}: verl draws the answers of a step anew, some of them twice. {others[0]} is of "
            "those that there were. Leave one out",
        )


def rollout_not_recorded(plan: Plan, settings: Settings) -> Said:
    if (
        "rollout_log_probs" in plan.spec.requires
        and settings.wrote(RECORDS)
        and settings.get(RECORDS) is False
    ):
        yield RECORDS, f"kl_type {plan.spec} needs rollout log-probs, and {RECORDS}=False"


def adapter_of_no_engine(plan: Plan, settings: Settings) -> Said:
    """With LoRA verl has no reference worker, and an engine without adapters has none to switch
    off: its reference is the policy of the moment."""
    strategy = settings.get(STRATEGY)
    if plan.needs_reference and strategy in WITHOUT_ADAPTERS:
        said = f"kl_type {plan.spec} on {STRATEGY}={strategy}"
        why = "that engine has no adapters. verl's reference is the policy itself there, and the KL"
        yield from _with_an_adapter(said, settings, f"{why} is always 0")


def reference_of_the_adapter(plan: Plan, settings: Settings) -> Said:
    """With LoRA verl has no reference worker: its reference is the policy without the adapter."""
    if plan.ref_model is None:
        return
    why = (
        "verl's reference is then the policy's own base without the adapter, and it loads no other"
    )
    yield from _with_an_adapter(f"{REF_MODEL}={plan.ref_model}", settings, why)


def teacher_out_of_reach(plan: Plan, settings: Settings) -> Said:
    """It is a second engine beside that of verl's reference worker."""
    if plan.teacher is None:
        return
    said = f"{TEACHER}={plan.teacher}"
    why = "verl has no reference worker then, and klplug loads a teacher beside its reference"
    yield from _with_an_adapter(said, settings, why)
    yield from _on_own_workers(said, settings)
    why = "klplug loads a teacher beside a reference of verl's FSDP engine alone. Use fsdp or fsdp2"
    yield from _on_another_engine(said, settings, why)


def reference_of_legacy_worker(plan: Plan, settings: Settings) -> Said:
    if plan.ref_model is not None:
        yield from _on_own_workers(f"{REF_MODEL}={plan.ref_model}", settings)


def reference_out_of_reach(plan: Plan, settings: Settings) -> Said:
    """A reference follows where it is an engine of FSDP in the policy's own process."""
    if plan.ref_update is None:
        return
    said = f"{REF_UPDATE}={plan.ref_update}"
    why = (
        "verl's reference is then the policy's own base without the adapter, and there is no other "
        "that could follow"
    )
    yield from _with_an_adapter(said, settings, why)
    yield from _on_own_workers(said, settings)
    why = "klplug moves a reference of verl's FSDP engine alone. Use fsdp or fsdp2, or leave it out"
    yield from _on_another_engine(said, settings, why)
    if settings.get(TRAINER_MODE) == "separate_async":
        yield (
            TRAINER_MODE,
            f"{said} with {TRAINER_MODE}=separate_async: it was not tried there. Use sync "
            "or colocate_async, or leave it out",
        )


def truncated_sampler(plan: Plan, settings: Settings) -> Said:
    return hosting.truncated_sampler(plan, cut(settings), bypass(settings))


def hidden_states_out_of_reach(plan: Plan, settings: Settings) -> Said:
    """Where the output layer is not called, or not with whole answers and its whole matrix."""
    if not plan.over_vocabulary:
        return
    why = (
        f"vocab={plan.vocab} is refused: klplug gets the hidden states of verl's FSDP engine "
        "alone. Use fsdp or fsdp2, or leave vocab out"
    )
    yield from _on_another_engine(f"kl_type {plan.spec}", settings, why)
    for key in SEQUENCE_PARALLEL:
        if key.startswith(REF) and not settings.wrote(key):
            continue  # it follows the policy's
        if (size := number(settings, key, 1)) > 1:
            yield (
                key,
                f"kl_type {plan.spec} with {key}={size:g}: vocab={plan.vocab} is refused where "
                "answers are cut over ranks. Set it to 1, or leave vocab out",
            )
    if settings.get(TRAINER_MODE) == "separate_async":
        yield (
            TRAINER_MODE,
            f"kl_type {plan.spec} with {TRAINER_MODE}=separate_async: vocab={plan.vocab} is "
            "refused: it was not tried there. klplug needs policy and reference in one worker. "
            "Use sync or colocate_async, or leave vocab out",
        )


ROWS = (
    hidden_states_out_of_reach,
    hosting.source_of_another_kind,
    stored_out_of_reach,
    another_kl_type,
    two_coefficients,
    moving_controller,
    another_main,
    synchronous_trainer,
    another_trainer,
    own_fit,
    rewards_past_the_kl,
    no_definite_strength,
    length_tilts,
    baseline_beside_values,
    head_of_another_loss,
    hosting.two_baselines,
    hosting.two_divergences_over_the_vocabulary,
    hosting.baseline_of_nothing,
    no_other_answers,
    weight_of_no_group,
    posterior_of_no_group,
    posterior_beside_another_loss,
    hosting.posterior_without_a_coefficient,
    no_entropies,
    legacy_worker,
    hosting.controller_of_nothing,
    hosting.path_of_nothing,
    hosting.reference_of_nothing,
    hosting.update_of_nothing,
    hosting.update_to_nothing,
    hosting.teacher_without_a_name,
    hosting.teacher_of_nothing,
    hosting.teacher_alone,
    teacher_out_of_reach,
    reference_out_of_reach,
    adapter_of_no_engine,
    reference_of_the_adapter,
    reference_of_legacy_worker,
    policy_loss_thrown_away,
    resampled_rows,
    rollout_not_recorded,
    truncated_sampler,
)
