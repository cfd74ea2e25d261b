"""Where OpenRLHF computes a KL, and what klplug does there instead.

Two processes matter. The trainer (a CPU actor) makes experience, joins an in-reward KL to the
advantages and owns the controller. The policy actors compute the KL loss of each micro-batch.
``args`` travel to both inside OpenRLHF's own strategy object.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from klplug import Tally, kl_term
from klplug.baselines import leave_one_out_mean
from klplug.host import MeasuredController, announce
from klplug.patching import Hook, Patch
from klplug_openrlhf.settings import STOCK_ESTIMATORS, Plan

Call = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

ACTIVE = "klplug/active"


def _bound(original: Call, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    return inspect.signature(original).bind(*args, **kwargs).arguments


# ── Policy actors: the KL of one micro-batch ────────────────────────────────────────────────────


@dataclass
class Step:
    """The micro-batch being trained on, for the functions that OpenRLHF calls inside its step."""

    plan: Plan
    mask: Tensor
    rollout_log_probs: Tensor | None
    token_level: bool
    kl: Tensor | None = None
    tally: Tally | None = field(default=None)


_STEP: ContextVar[Step | None] = ContextVar("klplug_step", default=None)


def init_actor_trainer(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> None:
    original(*args, **kwargs)
    plan = Plan.of(trainer.args)
    trainer.klplug_tallies = []
    if plan is None:
        return
    announce("a policy actor", plan.spec, plan.kl_coef)
    if plan.records_for_kl:
        trainer.actor_loss_fn.is_correction_level = "off"


def training_step(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    plan = Plan.of(trainer.args)
    if plan is None:
        return original(*args, **kwargs)
    experience = _bound(original, args, kwargs)["experience"]
    if plan.spec.placed("in_reward").estimator != "none" and ACTIVE not in experience.info:
        raise RuntimeError(
            f"kl_type {plan.spec} has a KL in the reward, but klplug was not active in the "
            "process that made this experience, so no KL was joined to it"
        )
    step = Step(
        plan=plan,
        mask=experience.action_mask,
        rollout_log_probs=experience.rollout_log_probs,
        token_level=trainer.actor_loss_fn.token_level_loss,
    )
    token = _STEP.set(step)
    try:
        status = original(*args, **kwargs)
    finally:
        _STEP.reset(token)
    if step.tally is None and plan.spec.estimator != "none":
        raise RuntimeError(
            f"kl_type {plan.spec} is set, but OpenRLHF's training step computed no KL: "
            "is --algo.kl.use_loss on, and --algo.kl.init_coef above 0?"
        )
    report = {ACTIVE: 1.0} if step.tally is None else step.tally.metrics()
    status["metrics"].update(report)
    # Weight None: OpenRLHF takes no mean of them; ppo_train below puts the exact ones in place.
    status["weights"].update(dict.fromkeys(report))
    if step.tally is not None:
        trainer.klplug_tallies.append(step.tally)
    return status


def compute_approx_kl(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    given = _bound(original, args, kwargs)
    kl_type = given.get("kl_estimator", "k1")
    if kl_type in STOCK_ESTIMATORS:
        return original(*args, **kwargs)
    step = _STEP.get()
    if step is None:
        raise RuntimeError(
            f"kl_type {kl_type!r} was asked of OpenRLHF's compute_approx_kl outside of its "
            "ActorPPOTrainer.training_step, where klplug has no mask and no old log-probs"
        )
    kl = torch.zeros_like(given["log_probs"], dtype=torch.float32)
    for placement in ("in_reward", "as_loss"):
        part = step.plan.spec.placed(placement)
        if part.estimator == "none":
            continue
        term = kl_term(
            part,
            given["log_probs"],
            given["log_probs_base"],
            step.mask,
            old_log_probs=given.get("log_probs_old"),
            rollout_log_probs=step.rollout_log_probs,
        )
        # What is in the reward acts through the advantages; here it is only reported.
        kl = kl + (term.loss if placement == "as_loss" else term.value)
        step.tally = term.tally
    step.kl = kl
    return kl


def aggregate_loss(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    step = _STEP.get()
    given = _bound(original, args, kwargs)
    if step is None or step.kl is None or given["loss"] is not step.kl:
        return original(*args, **kwargs)
    # OpenRLHF takes the token mean of its KL whatever the policy loss does.
    given["token_level_loss"] = step.token_level
    return original(**given)


def ppo_train_actor(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    trainer.klplug_tallies = []
    status = original(*args, **kwargs)
    if trainer.klplug_tallies:
        tally = _over_ranks(Tally.merged(trainer.klplug_tallies), trainer.strategy)
        status.update({name: float(value) for name, value in tally.metrics().items()})
    trainer.klplug_tallies = []
    return status


def _over_ranks(tally: Tally, strategy: Any) -> Tally:
    sums = strategy.all_reduce(torch.stack(list(tally.sums.values())), op="sum")
    maxima = strategy.all_reduce(torch.stack(list(tally.maxima.values())), op="max")
    return Tally(
        dict(zip(tally.sums, sums, strict=True)), dict(zip(tally.maxima, maxima, strict=True))
    )


# ── The trainer: experience, advantages, controller, checkpoints ────────────────────────────────


def init_trainer(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> None:
    original(*args, **kwargs)
    plan = Plan.of(trainer.args)
    if plan is None:
        return
    announce("the trainer", plan.spec, plan.kl_coef)
    trainer.kl_ctl = MeasuredController(plan.controller())
    trainer.experience_maker.kl_ctl = trainer.kl_ctl


def make_experience(original: Call, maker: Any, args: Args, kwargs: Kwargs) -> Any:
    experiences = original(*args, **kwargs)
    plan = Plan.of(maker.args)
    if plan is None:
        return experiences
    in_reward = plan.spec.placed("in_reward")
    tallies = []
    for experience in experiences:
        experience.info[ACTIVE] = torch.ones(experience.action_mask.shape[0])
        if plan.spec.estimator == "none":
            continue
        policy, reference = experience.action_log_probs, experience.base_action_log_probs
        mask = experience.action_mask
        # Samples of the policy itself: the plain means of k1 and k3 are unbiased here.
        tallies.append(kl_term("k1_in_reward", policy, reference, mask).tally)
        if in_reward.estimator != "none":
            experience.kl = kl_term(in_reward, policy, reference, mask).coefficient
    if tallies and isinstance(maker.kl_ctl, MeasuredController):
        maker.kl_ctl.measured = float(Tally.merged(tallies).metrics()["klplug/k3"])
    return experiences


def compute_advantages_and_returns(original: Call, maker: Any, args: Args, kwargs: Kwargs) -> Any:
    plan = Plan.of(maker.args)
    if (
        plan is None
        or not plan.divides_by_length
        or plan.spec.placed("in_reward").estimator == "none"
    ):
        return original(*args, **kwargs)
    # Where tokens weigh 1/length, a reward-to-go tilts the optimum to long answers. One number
    # per answer, compared with its group's others, keeps pi* = ref exp(r/beta)/Z as fixed point.
    experiences = _bound(original, args, kwargs)["experiences"]
    answers = [(e.kl * e.action_mask).sum(-1) for e in experiences]
    for experience in experiences:
        experience.kl = torch.zeros_like(experience.kl)
    experiences = original(*args, **kwargs)
    excess = over_groups(answers, experiences, maker.args.rollout.n_samples_per_prompt)
    beta = maker.kl_ctl.value
    for experience, kl, own in zip(experiences, answers, excess, strict=True):
        penalty = beta * own.unsqueeze(-1) * experience.action_mask
        experience.advantages = experience.advantages - penalty
        experience.returns = experience.returns - penalty
        experience.info["return"] = experience.info["return"] - beta * kl
    return experiences


def over_groups(answers: list[Tensor], experiences: list[Any], group: int) -> list[Tensor]:
    """Each answer's KL less the mean of its group's others, in the order of ``experiences``."""
    index = torch.tensor([i for e in experiences for i in e.index])
    flat = torch.cat(answers)
    ordered = torch.empty_like(flat)
    ordered[index] = flat
    groups = ordered.reshape(-1, group)
    excess = (groups - leave_one_out_mean(groups)).reshape(-1)[index]
    return list(torch.split(excess, [len(e.index) for e in experiences]))


def ppo_train_trainer(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    status = original(*args, **kwargs)
    if isinstance(trainer.kl_ctl, MeasuredController):
        status["klplug/kl_coef"] = trainer.kl_ctl.value
        if trainer.kl_ctl.measured is not None:
            status["klplug/kl_before_update"] = trainer.kl_ctl.measured
    return status


def save(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    plan = Plan.of(trainer.args)
    if plan is None:
        return original(*args, **kwargs)
    given = _bound(original, args, kwargs)
    given["client_states"] = {
        **(given.get("client_states") or {}),
        "klplug": trainer.kl_ctl.saved(plan.spec),
    }
    return original(**given)


def init_checkpoint_states(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    states = original(*args, **kwargs)
    plan = Plan.of(trainer.args)
    if plan is None or not states.get("global_step"):
        return states
    trainer.kl_ctl.resume(states.get("klplug"), plan.spec, plan.kl_ctrl, "OpenRLHF")
    return states


_ACTOR = "openrlhf.trainer.ray.ppo_actor"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
_TRAINER = "openrlhf.trainer.ppo_trainer"

PATCH = Patch(
    host="openrlhf",
    tested="0.11.2",
    hooks=(
        Hook(
            "openrlhf.models.utils",
            "compute_approx_kl",
            ("log_probs", "log_probs_base", "log_probs_old", "kl_estimator"),
            compute_approx_kl,
            supplies=("log_probs", "ref_log_probs", "old_log_probs"),
        ),
        Hook(
            "openrlhf.models.loss",
            "aggregate_loss",
            ("loss", "loss_mask", "token_level_loss"),
            aggregate_loss,
        ),
        Hook(_ACTOR, "ActorPPOTrainer.__init__", ("strategy",), init_actor_trainer),
        Hook(
            _ACTOR,
            "ActorPPOTrainer.training_step",
            ("experience", "kl_ctl", "step", "loss_batch_info"),
            training_step,
            supplies=("response_mask", "rollout_log_probs"),
        ),
        Hook(_ACTOR, "ActorPPOTrainer.ppo_train", ("kl_ctl",), ppo_train_actor),
        Hook(
            _MAKER,
            "RemoteExperienceMaker.make_experience",
            ("samples_list",),
            make_experience,
            supplies=("log_probs", "ref_log_probs", "response_mask"),
        ),
        Hook(
            _MAKER,
            "RemoteExperienceMaker.compute_advantages_and_returns",
            ("experiences",),
            compute_advantages_and_returns,
        ),
        Hook(_TRAINER, "BasePPOTrainer.__init__", ("strategy",), init_trainer),
        Hook(_TRAINER, "BasePPOTrainer.ppo_train", ("global_steps",), ppo_train_trainer),
        Hook(
            _TRAINER,
            "BasePPOTrainer.save_logs_and_checkpoints",
            ("global_step", "logs_dict", "client_states"),
            save,
        ),
        Hook(
            _TRAINER,
            "BasePPOTrainer.save_best_checkpoint",
            ("eval_metrics", "global_step", "client_states"),
            save,
        ),
        Hook(_TRAINER, "BasePPOTrainer.init_checkpoint_states", (), init_checkpoint_states),
    ),
)


def apply_to(module: ModuleType) -> None:
    """Post-import hook of ``klplug_openrlhf.worker``."""
    PATCH.apply_to(module)
