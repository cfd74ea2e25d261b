"""klplug for verl: installed beside it, found by it; two overrides on the stock command line.

    python -m verl.trainer.main_ppo ... +klplug.kl_type=k2_as_loss +klplug.kl_coef=1e-3

verl's own keys take a full ``kl_type`` too: ``actor_rollout_ref.actor.kl_loss_type`` (strength
``kl_loss_coef``) for ``*_as_loss``, ``algorithm.kl_penalty`` (strength ``algorithm.kl_ctrl``) for
``*_in_reward``. Stock names there keep their stock meaning, bit for bit.

Served: ``verl.trainer.main_ppo`` of verl 0.9 (found as a plugin), 0.8 and 0.7 (with
``VERL_USE_EXTERNAL_MODULES=klplug_verl`` in the environment), with the v1 trainer in any
``trainer.v1.trainer_mode`` or ``RayPPOTrainer``; every engine that calls ``ppo_loss`` (FSDP2
tested; FSDP and Megatron have the same call and scaling, and were not run) and 0.7's own FSDP
worker; every policy loss, every aggregation. An in-reward KL needs an advantage estimator that
leaves it as it is (``refusals.REWARD_ESTIMATORS``). Refused by name: 0.8's ``main_ppo_sync``, 0.7's
own Megatron worker, the fully asynchronous and one-step-off recipes, an in-reward KL under an
estimator that whitens, bootstraps or weighs it, ``head=combined`` and ``clipped`` with another
policy loss than ``vanilla``, a KL in the loss beside a distillation that throws the policy loss
away. Not touched: what verl's ``kl_penalty`` does with verl's own names, so
distillation losses keep theirs; ``kl_cov`` and the other policy losses, whose KL is to the old
policy.

``apply``, ``restore`` and ``status`` are for code that drives verl's workers itself.
"""

from __future__ import annotations

import os

__all__ = ["apply", "check", "restore", "status"]


def check() -> None:
    """Raise ``HookError`` if a hooked verl function has moved or changed."""
    from klplug_verl.hooks import PATCH

    PATCH.check()


def apply() -> None:
    """Replace verl's KL in this process, all hooks or none; modules not loaded yet follow."""
    from klplug_verl.hooks import PATCH

    PATCH.check()
    PATCH.apply()


def restore() -> None:
    """Put verl's own functions back."""
    from klplug_verl.hooks import PATCH

    PATCH.restore()


def status() -> dict[str, bool]:
    """For every hooked path, whether klplug's function is the one that runs there."""
    from klplug_verl.hooks import PATCH

    return PATCH.status()


if "klplug_verl" in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
    # As verl before 0.9 loads it, which knows no entry points.
    from klplug_verl import install as install
