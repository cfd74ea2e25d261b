"""What klplug says of a run on verl that starts: at its launch, and in its audit."""

from __future__ import annotations

from collections.abc import Iterator

from klplug.hosting import notes as hosting
from klplug.hosting.refusals import Refusal, refusals
from klplug.hosting.settings import Said, Settings, number
from klplug_verl.keys import (
    ACTOR,
    ADAPTERS,
    BYPASS,
    CTRL_HORIZON,
    CTRL_TYPE,
    EPOCHS,
    ESTIMATOR,
    GAMMA,
    KL_HORIZON,
    KL_TYPE,
    LOGPROBS_MODE,
    LORA,
    LOSS_AGG,
    LOSS_MODE,
    MINI_BATCH,
    RECORDS,
    REF,
    REJECTS,
    ROLLOUT_IS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TRAIN_BATCH,
    TRAINER_MODE,
    N,
)
from klplug_verl.plan import Plan, aggregation_divides, divides_by_length

DISCOUNTED_ESTIMATORS = ("gae", "reinforce_plus_plus")


def notes(plan: Plan | None, settings: Settings) -> Iterator[Refusal]:
    """What is served, and may not be what was expected; of verl's own KL where there is no plan."""
    return refusals(ROWS, plan, settings)


def cut(settings: Settings) -> hosting.Cut:
    """The setting by which the sampler's log-probs are not the policy's, and it in words.

    Trainer and sampler divide by the same temperature, but for log-probs that are taken before it.
    """
    mode = str(settings.get(LOGPROBS_MODE, "processed_logprobs"))
    if mode.endswith("_logits"):  # vLLM's numbers are logits then, and verl takes them as they are
        return LOGPROBS_MODE, f"{LOGPROBS_MODE}={mode}"
    if mode == "raw_logprobs":
        temperature = number(settings, TEMPERATURE, 1)
        if temperature != 1:
            return TEMPERATURE, f"{LOGPROBS_MODE}=raw_logprobs and {TEMPERATURE}={temperature:g}"
        return None
    return sampled(settings)


def sampled(settings: Settings) -> hosting.Cut:
    """The setting by which no sample has the policy's least likely tokens, and it in words."""
    top_p, top_k = number(settings, TOP_P, 1), number(settings, TOP_K, -1)
    if top_p < 1:
        return TOP_P, f"{TOP_P}={top_p:g}"
    if top_k > 0:
        return TOP_K, f"{TOP_K}={top_k:g}"
    return None


def bypass(settings: Settings) -> str:
    """The setting by which the policy's log-probs at the start of a step are the sampler's."""
    return f"{BYPASS}=True" if settings.get(BYPASS, False) else ""


def whitened(plan: Plan | None, settings: Settings) -> Said:
    return hosting.whitened(plan, settings, ESTIMATOR, ("gae",))


def discounted(plan: Plan | None, settings: Settings) -> Said:
    return hosting.discounted(plan, settings, GAMMA, ESTIMATOR, DISCOUNTED_ESTIMATORS)


def truncated_sampler(plan: Plan | None, settings: Settings) -> Said:
    return hosting.truncated_sampler(plan, cut(settings), sampled(settings), bypass(settings))


def divided_by_length(plan: Plan | None, settings: Settings) -> Said:
    """Of the aggregation alone: a loss mode that divides otherwise has its KL beside it."""
    dividing = f"{LOSS_AGG}={settings.get(LOSS_AGG)}" if aggregation_divides(settings) else ""
    return hosting.divided_by_length(plan, LOSS_AGG, dividing)


def averaged_apart(plan: Plan | None, settings: Settings) -> Said:
    """Of a loss mode that takes the mean of each answer, whatever the aggregation."""
    if plan is None or not plan.as_loss.terms:
        return
    if settings.get(LOSS_MODE) == "geo_mean":
        yield (
            LOSS_MODE,
            f"{LOSS_MODE}=geo_mean is the mean of one micro-batch, and verl adds these up. A KL "
            "loss is a mean over the whole mini-batch. So the more micro-batches, the less KL "
            "there is to the reward. k1_in_reward keeps its strength",
        )
    elif divides_by_length(settings) and not aggregation_divides(settings):
        yield (
            LOSS_MODE,
            f"{LOSS_MODE}={settings.get(LOSS_MODE)} is a mean over answers, and a KL loss follows "
            f"{LOSS_AGG}={settings.get(LOSS_AGG)}. So long answers carry more KL than reward. "
            f"{LOSS_AGG}=seq-mean-token-mean averages both alike",
        )


def one_update(plan: Plan | None, settings: Settings) -> Said:
    # A step of separate_async has several; by bypass_mode old is the sampler, and not the policy.
    if settings.get(TRAINER_MODE) == "separate_async" or bypass(settings):
        return
    prompts, mini = number(settings, TRAIN_BATCH), number(settings, MINI_BATCH)
    one = prompts <= mini and number(settings, EPOCHS, 1) == 1
    updates = f"{MINI_BATCH}={mini:g} with {TRAIN_BATCH}={prompts:g}"
    yield from hosting.one_update(plan, MINI_BATCH, updates if one else "")


def rejected_tokens(plan: Plan | None, settings: Settings) -> Said:
    """Of a KL as loss that looks at whole answers, where verl masks out tokens that were sampled.

    Its options by sequence mask whole answers, and beside its bypass the policy loss alone.
    """
    if plan is None or plan.source is not None or bypass(settings):
        return
    rejects = str(settings.get(REJECTS) or "")
    by_token = any(option.strip().startswith("token") for option in rejects.split(","))
    if not (by_token and settings.get(RECORDS, True)):
        return
    for term in plan.as_loss.terms:
        if term.horizon != "token" or term.level in ("prefix", "sequence"):
            yield (
                REJECTS,
                f"{REJECTS}={rejects} masks sampled tokens out of the answers. kl_type {term} "
                "looks at whole answers, and has neither their KL nor their ratio. So its gradient "
                "is that of no KL of whole answers. Options by sequence mask whole answers",
            )
            return


def stale_samples(plan: Plan | None, settings: Settings) -> Said:
    if plan is None or settings.get(TRAINER_MODE) not in ("colocate_async", "separate_async"):
        return
    bypassed = bool(bypass(settings))
    weighed = bypassed or bool(settings.get(ROLLOUT_IS) and settings.get(RECORDS, True))
    yield from hosting.stale_samples(plan, TRAINER_MODE, weighed, bypassed)


def lora_reference(plan: Plan | None, settings: Settings) -> Said:
    if plan is not None and not plan.needs_reference:
        return
    for key in ADAPTERS:
        if (path := settings.get(key)) is not None:
            yield (
                key,
                f"{key}={path}: verl's reference is the base model without this adapter. So the KL "
                "is not 0 at the first step, and pulls out again what the adapter learned. Merge "
                "it into the model to hold the policy to it",
            )


def reference_dtype(plan: Plan | None, settings: Settings) -> Said:
    if plan is not None and not plan.needs_reference:
        return
    if any(settings.get(key) for key in (*LORA, *ADAPTERS)):
        return  # the reference is the policy's own model without its adapter
    key = f"{REF}fsdp_config.mixed_precision.param_dtype"
    policy, reference = (dtype(settings, side) for side in (ACTOR, REF))
    if policy != reference:
        yield (
            key,
            f"The policy computes in {policy} and the reference in {reference}. Their log-probs "
            "differ where the weights are the same. So the KL is not 0 at the first step, and "
            "never falls below that. Set the same mixed_precision.param_dtype for both",
        )


def dtype(settings: Settings, side: str) -> str:
    """In which FSDP computes; verl's default is bf16."""
    name = settings.get(f"{side}fsdp_config.mixed_precision.param_dtype", "bf16")
    return {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}.get(str(name), str(name))


def short_horizon(plan: Plan | None, settings: Settings) -> Said:
    answers = int(number(settings, TRAIN_BATCH, 0)) * int(number(settings, N, 1))
    if plan is not None:
        for words in hosting.short_horizon(plan, answers):
            yield KL_HORIZON, words
        return
    horizon = number(settings, CTRL_HORIZON)
    if settings.get(CTRL_TYPE) == "adaptive" and horizon and 5 * horizon < answers:
        yield CTRL_HORIZON, hosting.negative_horizon(horizon, answers)


def extrapolation(plan: Plan | None, settings: Settings) -> Said:
    return hosting.extrapolation(plan, KL_TYPE)


ROWS = (
    whitened,
    discounted,
    extrapolation,
    divided_by_length,
    averaged_apart,
    one_update,
    rejected_tokens,
    truncated_sampler,
    stale_samples,
    lora_reference,
    reference_dtype,
    short_horizon,
)
