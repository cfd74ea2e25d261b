"""What trainers of verl's own, of its recipes and of forks do otherwise than ``main_ppo``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from klplug.samples import weights_of

if TYPE_CHECKING:
    from klplug_verl.plan import Plan

ITERATIVE = "actor_rollout_ref.actor.use_iterative_ref_model"
"""RPG: the reference is the policy at the start of the step."""

# RPG differentiates a value at samples of the reference, which is the old policy, without a
# weight. With w = pi/old: w - log w - 1 and w (log w - 1) + 1 have the derivatives w - 1 and
# w log w in log pi, which are w times c of k3 and k2. Those of - log w and w log w are these
# minus w and plus w, and w is zero on average.
RPG = {
    "rpg_fkl": "k3_as_loss,reference=old,cap=none",
    "rpg_ufkl": "k3_as_loss,reference=old,cap=none",
    "rpg_urkl": "k2_as_loss,reference=old,cap=none",
    "rpg_rkl": "k2_as_loss,reference=old,cap=none",
}


@dataclass(frozen=True)
class Trainer:
    """What a trainer of verl's own, or of its recipes, does otherwise than ``main_ppo``.

    Attributes:
        name: pattern of what starts it.
        note: a sentence.
        stale: it trains on samples of a policy some updates old.
        fetches: it takes whole mini-batches from a queue, and data.train_batch_size says nothing.
        drops: why a KL in the reward never reaches its advantages; empty where it does.
        own_loss: its loss is not verl's, and what KL it has is not known.
        served: klplug has hooks for it.
        own_fit: its ``fit`` is not ``RayPPOTrainer``'s; ``None`` where that is not known.
        estimators: of its own, to the kl_type of the same gradient where ITERATIVE is on.
    """

    name: str
    note: str
    stale: bool = False
    fetches: bool = False
    drops: str = ""
    own_loss: bool = False
    served: bool = False
    own_fit: bool | None = None
    estimators: Mapping[str, str] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Its row holds for a fork's trainer of that name too."""
        return self.own_loss or bool(self.estimators)


# Sources: verl 0.9.1 experimental/{fully_async_policy,one_step_off_policy,separation}; verl-recipe.
TRAINERS = (
    Trainer(
        r"fully_async",
        "verl's fully asynchronous trainer: samples are made by a policy some updates old.",
        stale=True,
        fetches=True,
    ),
    Trainer(
        r"one_step_off",
        "verl's one-step-off-policy trainer: samples are made by the policy of the step before.",
        stale=True,
    ),
    Trainer(
        r"\bprime\b",
        "The trainer of PRIME, which makes its rewards itself.",
        drops="the trainer of PRIME never calls apply_kl_penalty",
        own_fit=True,
    ),
    Trainer(
        r"(?:\b|_)(?:spin|flowrl|gkd)\b",
        "A trainer with a loss of its own, which is not verl's policy loss.",
        own_loss=True,
    ),
    Trainer(
        r"\bsppo\b",
        "The trainer of SPPO, whose loss is a square without a ratio and not verl's policy loss.",
        own_loss=True,
        own_fit=True,
    ),
    Trainer(
        r"\brpg\b",
        "The trainer of RPG: where use_iterative_ref_model, its reference is the policy that "
        "made the samples. Its estimators named rpg_ have a clamp of 10 on their value.",
        estimators=RPG,
    ),
    Trainer(
        r"recipe[./](?:dapo|entropy|spo|rep_exp|atropos|async_flow|dance_grpo|partial_rollout"
        r"|specRL)[./]",
        "",
        served=True,
        own_fit=True,
    ),
    Trainer(r"recipe", "", served=True),
)


def row(trainer: str) -> Trainer | None:
    """The row of a trainer other than ``main_ppo``."""
    return next((known for known in TRAINERS if re.search(known.name, trainer)), None)


def stage_of(plan: Plan) -> str:
    """What needs verl's own steps, which a ``fit`` of a trainer's own passes by; empty for nothing.

    Workers compute a KL as loss without them, at the coefficient of their config.
    """
    needs = (
        *(f"{t} is in the reward" for t in plan.in_reward.terms),
        *([f"kl_ctrl={plan.kl_ctrl} moves the coefficient"] if plan.kl_ctrl != "fixed" else []),
        *([f"ref_update={plan.ref_update}"] if plan.ref_update is not None else []),
        *(f"baseline={t.baseline}" for t in plan.as_loss.terms if t.baseline != "none"),
        *(f"weight={own.written}" for own in weights_of(plan.spec)),
        *(["reference=posterior"] if plan.spec.has_the_reward else []),
        *(["reference=teacher"] if plan.needs_teacher else []),
        *([f"vocab={plan.vocab}"] if plan.over_vocabulary else []),
    )
    return next(iter(needs), "")


def out_of_reach(plan: Plan, trainer: str, stage: str = "fit") -> str:
    return (
        f"kl_type {plan.spec}: {stage_of(plan)}, and {trainer} has a {stage} of its own. klplug "
        "does not reach it. Use verl.trainer.main_ppo, or k2_as_loss with kl_ctrl=fixed"
    )
