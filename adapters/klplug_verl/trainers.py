"""What trainers of verl's own, of its recipes and of forks do otherwise than ``main_ppo``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

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
        estimators: of its own, to the kl_type of the same gradient where ITERATIVE is on.
    """

    name: str
    note: str
    stale: bool = False
    fetches: bool = False
    drops: str = ""
    own_loss: bool = False
    served: bool = False
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
    ),
    Trainer(
        r"(?:\b|_)(?:spin|flowrl|gkd)\b",
        "A trainer with a loss of its own, which is not verl's policy loss.",
        own_loss=True,
    ),
    Trainer(
        r"\brpg\b",
        "The trainer of RPG: where use_iterative_ref_model, its reference is the policy that "
        "made the samples. Its estimators named rpg_ have a clamp of 10 on their value.",
        estimators=RPG,
    ),
    Trainer(r"recipe", "", served=True),
)


def row(trainer: str) -> Trainer | None:
    """The row of a trainer other than ``main_ppo``."""
    return next((known for known in TRAINERS if re.search(known.name, trainer)), None)
