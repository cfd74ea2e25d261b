"""In the trainer, a CPU actor: experience, advantages, controller, checkpoints."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from klplug import Tally, kl_return_baseline, kl_term
from klplug.baselines import others_mean
from klplug.hosting.controller import MeasuredController
from klplug.hosting.hidden import BYTES, exact_term
from klplug.hosting.host import announce
from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug.watch import Watch
from klplug_openrlhf import hidden, moving, samples, teacher
from klplug_openrlhf.keys import read
from klplug_openrlhf.plan import ACTIVE, Plan


def init(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> None:
    original(*args, **kwargs)
    plan = Plan.of(trainer.args)
    if plan is None:
        return
    announce("the trainer", plan.spec, plan.kl_coef)
    if (term := exact_term(plan.spec)) is not None:
        print(hidden.foretell(term, trainer.args), flush=True)
    trainer.klplug_watch = Watch()
    trainer.klplug_models = plan.models()
    trainer.kl_ctl = MeasuredController(plan.controller())
    trainer.experience_maker.kl_ctl = trainer.kl_ctl


def make_experience(original: Call, maker: Any, args: Args, kwargs: Kwargs) -> Any:
    plan = Plan.of(maker.args)
    if plan is None:
        return original(*args, **kwargs)
    term = exact_term(plan.spec)
    if term is not None:
        hidden.check_memory(term, bound(original, args, kwargs)["samples_list"], maker.args)
    experiences = original(*args, **kwargs)
    if term is not None:
        hidden.attach(term, maker, experiences)
    samples.attach(plan, maker, experiences)
    teacher.attach(plan, maker, experiences)
    for experience in experiences:
        experience.info[ACTIVE] = torch.ones(experience.action_mask.shape[0])
        if plan.is_active and not plan.needs_reference:
            # OpenRLHF reports a difference from it, whatever klplug compares with.
            experience.base_action_log_probs = (
                experience.rollout_log_probs
                if "rollout_log_probs" in plan.spec.requires
                else experience.action_log_probs
            )
    if not plan.needs_reference:
        return experiences
    # Samples of the policy itself: the estimates are unbiased here.
    tallies = [kl_term("k1_in_reward", *_tensors(e)).tally for e in experiences]
    if isinstance(maker.kl_ctl, MeasuredController):
        measured = float(Tally.merged(tallies).metrics()["klplug/kl"])
        maker.kl_ctl.measure(measured, from_reference=plan.ref_model is None)
        # OpenRLHF counts those of a full batch, whatever a filter or the data's end left of it.
        maker.kl_ctl.answers = sum(int(e.action_mask.any(-1).sum()) for e in experiences)
    if not plan.in_reward.terms:
        return experiences
    groups = _groups(experiences, read(maker.args, "rollout.n_samples_per_prompt"))
    weights = samples.of_rollout(plan.in_reward, experiences, groups)
    if plan.in_reward != plan.in_reward_plain and not plan.divides_by_length:
        taught = [own for e in experiences if (own := teacher.of(e)) is not None]
        coefficients = over_rollout(
            lambda *tensors, group_ids: (
                kl_term(
                    plan.in_reward,
                    *tensors,
                    group_ids=group_ids,
                    sample_weights=weights,
                    teacher_log_probs=samples.joined(taught) if taught else None,
                ).coefficient
            ),
            experiences,
            maker.args,
        )
    else:
        coefficients = [
            kl_term(
                plan.in_reward_plain,
                *_tensors(e),
                sample_weights=own,
                teacher_log_probs=teacher.of(e),
            ).coefficient
            for e, own in zip(experiences, samples.by_experience(weights, experiences), strict=True)
        ]
    for experience, coefficient in zip(experiences, coefficients, strict=True):
        experience.kl = coefficient
    return experiences


def _tensors(experience: Any, reference: str = "ref") -> tuple[Tensor, Tensor, Tensor]:
    base = experience.base_action_log_probs
    return (
        experience.action_log_probs,
        experience.info[teacher.INFO] if reference == "teacher" else base,
        experience.action_mask,
    )


def over_rollout(
    function: Callable[..., Tensor], experiences: list[Any], args: Any, reference: str = "ref"
) -> list[Tensor]:
    """A (B, T) function of policy, reference, mask and ``group_ids``, of all answers at once.

    The result by experience. Micro-batches differ in width, and cut groups.
    """
    by_tensor = zip(*(_tensors(e, reference) for e in experiences), strict=True)
    ids = _groups(experiences, read(args, "rollout.n_samples_per_prompt"))
    whole = function(*(samples.joined(list(tensors)) for tensors in by_tensor), group_ids=ids)
    return samples.cut(whole, experiences)


def compute_advantages_and_returns(original: Call, maker: Any, args: Args, kwargs: Kwargs) -> Any:
    plan = Plan.of(maker.args)
    if plan is None:
        return original(*args, **kwargs)
    if plan.divides_by_length and plan.in_reward.terms:
        experiences = bound(original, args, kwargs)["experiences"]
        experiences = _whole_answers(original, maker, experiences)
    else:
        experiences = original(*args, **kwargs)
    carry_baseline(plan, experiences, maker.args)
    groups = _groups(experiences, read(maker.args, "rollout.n_samples_per_prompt"))
    samples.carry(plan, experiences, groups, maker.kl_ctl.value)
    return experiences


def _whole_answers(original: Call, maker: Any, experiences: list[Any]) -> list[Any]:
    # Where tokens weigh 1/length, a reward-to-go tilts the optimum to long answers. One number
    # per answer, compared with its group's others, keeps pi* = ref exp(r/beta)/Z as fixed point.
    answers = [(e.kl * e.action_mask).sum(-1) for e in experiences]
    for experience in experiences:
        experience.kl = torch.zeros_like(experience.kl)
    experiences = original(experiences)
    excess = over_groups(answers, experiences, read(maker.args, "rollout.n_samples_per_prompt"))
    beta = maker.kl_ctl.value
    for experience, kl, own in zip(experiences, answers, excess, strict=True):
        penalty = beta * own.unsqueeze(-1) * experience.action_mask
        experience.advantages = experience.advantages - penalty
        experience.returns = experience.returns - penalty
        experience.info["return"] = experience.info["return"] - beta * kl
    return experiences


def over_groups(answers: list[Tensor], experiences: list[Any], group: int) -> list[Tensor]:
    """Each answer's KL less the mean of its group's others, in the order of ``experiences``."""
    kl = torch.cat(answers).unsqueeze(-1)
    present = torch.cat([e.action_mask.any(-1) for e in experiences])
    excess = (kl - others_mean(kl, _groups(experiences, group), present)).squeeze(-1)
    return list(torch.split(excess, [len(e.index) for e in experiences]))


def _groups(experiences: list[Any], size: int) -> list[int]:
    """The prompt of each answer, in the order of ``experiences``."""
    return [i // size for e in experiences for i in e.index]


def carry_baseline(plan: Plan, experiences: list[Any], args: Any) -> None:
    """The baseline of a KL loss travels with the samples: their micro-batches cut groups.

    In OpenRLHF's own field for a KL per token, which is empty from here on.
    """
    for part in plan.as_loss.terms:
        if part.baseline == "none":
            continue
        baselines = over_rollout(
            functools.partial(kl_return_baseline, part),
            experiences,
            args,
            part.reference,
        )
        for experience, baseline in zip(experiences, baselines, strict=True):
            experience.kl = baseline


def ppo_train(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    status = original(*args, **kwargs)
    plan = Plan.of(trainer.args)
    if plan is not None and plan.ref_update is not None:
        moving.follow(trainer, plan, bound(original, args, kwargs)["global_steps"] + 1)
    if isinstance(trainer.kl_ctl, MeasuredController):
        trainer.klplug_watch.tell(status)
        status["klplug/kl_coef"] = trainer.kl_ctl.value
        if trainer.kl_ctl.measured is not None:
            status["klplug/kl_before_update"] = trainer.kl_ctl.measured
        if hasattr(trainer.experience_maker, "klplug_bytes"):
            status[BYTES] = float(trainer.experience_maker.klplug_bytes)
    return status


def save(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    plan = Plan.of(trainer.args)
    if plan is None:
        return original(*args, **kwargs)
    # Without defaults: Ray shows a parameter on an actor's methods that they do not take.
    call = inspect.signature(original).bind(*args, **kwargs)
    call.arguments["client_states"] = {
        **(call.arguments.get("client_states") or {}),
        "klplug": trainer.kl_ctl.saved(plan.spec, trainer.klplug_models),
    }
    with moving.saving(trainer):
        return original(*call.args, **call.kwargs)


def init_checkpoint_states(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    """The first that a trainer does when all models are loaded."""
    plan = Plan.of(trainer.args)
    if plan is not None:
        moving.check(trainer, plan)
    states = original(*args, **kwargs)
    if plan is None or not states.get("global_step"):
        return states
    saved = states.get("klplug")
    trainer.kl_ctl.resume(saved, plan.spec, trainer.klplug_models, plan.kl_ctrl, "OpenRLHF")
    moving.resume(trainer, saved or {})
    return states
