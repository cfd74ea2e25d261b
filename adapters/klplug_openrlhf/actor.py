"""In the policy actors: the KL of one micro-batch, inside OpenRLHF's training step."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from klplug import KLSpec, KLStep, KLTerm, Tally, kl_term, stored_metrics
from klplug.hosting.hidden import output_layer
from klplug.hosting.host import announce
from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug.hosting.stored import Stored
from klplug.spec import sum_of
from klplug_openrlhf import hidden, samples, stored, teacher
from klplug_openrlhf.keys import STOCK_ESTIMATORS, write
from klplug_openrlhf.plan import ACTIVE, RECORDERS, Plan


@dataclass
class Step:
    """The micro-batch being trained on, for the functions that OpenRLHF calls inside its step."""

    plan: Plan
    trainer: Any
    experience: Any
    kl_coef: float
    carried: dict[str, Tensor] = field(default_factory=dict)
    hidden: hidden.Micro | None = None
    stored: stored.Micro | None = None
    kl: Tensor | None = None
    tally: Tally | None = None
    joined: bool = False
    aggregated: bool = False

    @property
    def loss_fn(self) -> Any:
        return self.trainer.actor_loss_fn

    def term(self, spec: KLSpec, log_probs: Tensor) -> KLTerm:
        given = self.experience
        return kl_term(
            spec,
            log_probs,
            # Without a reference model the sampler's stand in its place.
            given.base_action_log_probs if self.plan.needs_reference else None,
            given.action_mask,
            old_log_probs=given.action_log_probs,
            rollout_log_probs=given.rollout_log_probs,
            advantages=given.advantages,
            kl_coef=self.kl_coef,
            clip_range=(self.loss_fn.clip_eps_low, self.loss_fn.clip_eps_high),
            return_baseline=given.kl,  # see trainer.carry_baseline
            exact_kl=None if self.hidden is None else self.hidden.kl(spec, log_probs),
            sample_weights=self.carried,
            posterior_log_probs=self.carried.get(samples.POSTERIOR),
            teacher_log_probs=self.carried.get(teacher.LOG_PROBS),
        )


_STEP: ContextVar[Step | None] = ContextVar("klplug_step", default=None)


def init(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> None:
    original(*args, **kwargs)
    plan = Plan.of(trainer.args)
    trainer.klplug_tallies = []
    if plan is None:
        return
    announce("a policy actor", plan.spec, plan.kl_coef)
    if plan.over_vocabulary:
        output_layer(hidden.inside(trainer.actor))  # without one it stops before any answer
    if plan.source is not None:
        trainer.klplug_stored = Stored.read(plan.source)
    if plan.is_active and not plan.needs_reference:
        # It is 0 so that no reference model is loaded; here it is what turns the KL loss on.
        write(trainer.args, "algo.kl.init_coef", plan.kl_coef)
    if plan.records_for_kl:
        loss_fn = trainer.actor_loss_fn
        recorder = next(r for r in RECORDERS if hasattr(loss_fn, r.attribute))
        setattr(loss_fn, recorder.attribute, recorder.off)


def training_step(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    plan = Plan.of(trainer.args)
    if plan is None:
        return original(*args, **kwargs)
    given = bound(original, args, kwargs)
    experience = given["experience"]
    if plan.acts_on_experience and ACTIVE not in experience.info:
        raise RuntimeError(
            f"kl_type {plan.spec} acts where experience is made, but klplug was not active in the "
            "process that made this one"
        )
    carried = samples.taken(plan, experience)
    step = Step(plan, trainer, experience, given["kl_ctl"], carried)
    token = _STEP.set(step)
    try:
        with hidden.micro(plan, trainer, experience) as step.hidden:
            status = original(*args, **kwargs)
    finally:
        _STEP.reset(token)
    _check(step)
    report = {ACTIVE: 1.0} if step.tally is None else _metrics(plan, step.tally)
    status["metrics"].update(report)
    # Weight None: OpenRLHF takes no mean of them; ppo_train below puts the exact ones in place.
    status["weights"].update(dict.fromkeys(report))
    if step.tally is not None:
        trainer.klplug_tallies.append(step.tally)
    return status


def _metrics(plan: Plan, tally: Tally) -> dict[str, Any]:
    return dict(tally.metrics() if plan.source is None else stored_metrics(tally))


def _check(step: Step) -> None:
    """Everything that the formulation is made of has happened, and not half of it."""
    spec = step.plan.spec
    if not step.plan.is_active:
        return
    if step.kl is None:
        raise RuntimeError(
            f"kl_type {spec} is set, but OpenRLHF's training step computed no KL. Is its KL loss "
            "on, and its coefficient above 0?"
        )
    if not step.aggregated:
        raise RuntimeError(
            f"OpenRLHF's training step aggregated the KL of {spec} by a function that klplug does "
            "not know. So it may not be as the policy loss is"
        )
    if step.plan.in_policy_loss.terms and not step.joined:
        raise RuntimeError(
            f"kl_type {spec} belongs inside the policy loss, but OpenRLHF's training step took "
            "that from somewhere else than openrlhf.models.loss.PolicyLoss"
        )


def policy_loss(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    """OpenRLHF's own, of advantages that have the KL in them (``klplug.policy_loss``)."""
    step = _STEP.get()
    if step is None or not step.plan.in_policy_loss.terms:
        return original(*args, **kwargs)
    given = bound(original, args, kwargs)
    inside = KLStep(step.term(step.plan.in_policy_loss, given["log_probs"]))
    given["advantages"] = inside.advantages(given["advantages"], step.kl_coef)
    step.joined = True
    return original(**given)


def compute_approx_kl(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    given = bound(original, args, kwargs)
    kl_type = given["kl_estimator"]
    if kl_type in STOCK_ESTIMATORS:
        return original(*args, **kwargs)
    step = _STEP.get()
    if step is None:
        raise RuntimeError(
            f"kl_type {kl_type!r} was asked of OpenRLHF's compute_approx_kl outside of its "
            "ActorPPOTrainer.training_step, where klplug has no mask and no old log-probs"
        )
    if step.plan.source is not None:
        own = step.trainer.klplug_stored
        step.stored = stored.micro(step.plan.spec, own, step.trainer, step.experience)
        step.kl, step.tally = step.stored.kl.loss, step.stored.kl.tally
        return step.kl
    # What is in the reward has acted through the advantages; here it is only reported.
    spec = sum_of((*step.plan.in_reward_plain.terms, *step.plan.as_loss.terms))
    kl = KLStep(step.term(spec, given["log_probs"]))
    step.kl, step.tally = kl.reported, kl.tally
    return step.kl


def aggregate_loss(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    step = _STEP.get()
    given = bound(original, args, kwargs)
    if step is None or step.kl is None or given["loss"] is not step.kl:
        return original(*args, **kwargs)
    step.aggregated = True
    if step.stored is not None:
        return step.stored.aggregated(step.kl, step.loss_fn.token_level_loss, given)
    # OpenRLHF takes the token mean of its KL whatever the policy loss does.
    given["token_level_loss"] = step.loss_fn.token_level_loss
    return original(**given)


def masked_mean(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    """What OpenRLHF aggregated by before it had ``aggregate_loss``."""
    step = _STEP.get()
    given = bound(original, args, kwargs)
    if step is None or step.kl is None or given["tensor"] is not step.kl:
        return original(*args, **kwargs)
    step.aggregated = True
    if step.stored is not None:
        return step.stored.aggregated(step.kl, step.loss_fn.token_level_loss, {})
    if step.loss_fn.token_level_loss:
        return original(*args, **kwargs)
    return original(**given | {"dim": -1}).mean()


def ppo_train(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    trainer.klplug_tallies = []
    status = original(*args, **kwargs)
    if trainer.klplug_tallies:
        tally = _over_ranks(Tally.merged(trainer.klplug_tallies), trainer.strategy)
        plan = Plan.of(trainer.args)
        assert plan is not None
        status.update({k: float(value) for k, value in _metrics(plan, tally).items()})
    trainer.klplug_tallies = []
    return status


def _over_ranks(tally: Tally, strategy: Any) -> Tally:
    sums = strategy.all_reduce(torch.stack(list(tally.sums.values())), op="sum")
    maxima = strategy.all_reduce(torch.stack(list(tally.maxima.values())), op="max")
    return Tally(
        dict(zip(tally.sums, sums, strict=True)), dict(zip(tally.maxima, maxima, strict=True))
    )
