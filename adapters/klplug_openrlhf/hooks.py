"""Where OpenRLHF computes a KL, and what klplug does there instead: the table.

Two processes matter. The trainer (a CPU actor) makes experience, joins an in-reward KL to the
advantages and owns the controller. The policy actors compute the KL loss of each micro-batch.
``args`` travel to both inside OpenRLHF's own strategy object.
"""

from __future__ import annotations

from types import ModuleType

from klplug.hosting.patching import Hook, Patch
from klplug_openrlhf import actor, hidden, moving, reference, trainer
from klplug_openrlhf.host import HOST

_ACTOR = "openrlhf.trainer.ray.ppo_actor"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
_LAUNCHER = "openrlhf.trainer.ray.launcher"
_TRAINER = "openrlhf.trainer.ppo_trainer"

PATCH = Patch(
    host="openrlhf",
    tested=HOST.tested_text,
    hooks=(
        Hook(
            "openrlhf.models.utils",
            "compute_approx_kl",
            ("log_probs", "log_probs_base", "kl_estimator"),
            actor.compute_approx_kl,
            supplies=("log_probs", "ref_log_probs"),
        ),
        Hook(
            "openrlhf.models.loss",
            "PolicyLoss.forward",
            ("log_probs", "old_log_probs", "advantages"),
            actor.policy_loss,
            supplies=("advantages",),
        ),
        Hook(
            _ACTOR,
            "aggregate_loss",
            ("loss", "loss_mask", "token_level_loss"),
            actor.aggregate_loss,
            otherwise=Hook(_ACTOR, "masked_mean", ("tensor", "mask", "dim"), actor.masked_mean),
        ),
        Hook(_ACTOR, "ActorPPOTrainer.__init__", ("strategy",), actor.init),
        Hook(
            _ACTOR,
            "ActorPPOTrainer.training_step",
            ("experience", "kl_ctl", "step"),
            actor.training_step,
            supplies=("response_mask", "old_log_probs", "rollout_log_probs"),
        ),
        Hook(_ACTOR, "ActorPPOTrainer.ppo_train", ("kl_ctl",), actor.ppo_train),
        Hook(
            _MAKER,
            "RemoteExperienceMaker.make_experience",
            ("samples_list",),
            trainer.make_experience,
            supplies=(
                *("log_probs", "ref_log_probs", "response_mask"),
                *("group_ids", "sample_weights", "posterior_log_probs", "teacher_log_probs"),
            ),
        ),
        Hook(
            _MAKER,
            "RemoteExperienceMaker.compute_advantages_and_returns",
            ("experiences",),
            trainer.compute_advantages_and_returns,
        ),
        Hook(
            _LAUNCHER,
            "BaseModelActor.execute_batch",
            ("method_name", "all_data", "start_idx", "end_idx"),
            moving.execute_batch,
            supplies=("exact_kl",),
        ),
        Hook(
            _LAUNCHER,
            "RayActorGroup.async_run_method",
            ("method_name",),
            moving.async_run_method,
        ),
        Hook(
            _LAUNCHER,
            "RayActorGroup.async_init_model_from_pretrained",
            (),
            reference.async_init_model_from_pretrained,
        ),
        Hook(
            _MAKER,
            "RemoteExperienceMaker._flatten_results",
            ("refs", "duplicate_factor"),
            hidden.flatten_results,
        ),
        Hook(_TRAINER, "BasePPOTrainer.__init__", ("strategy",), trainer.init),
        Hook(_TRAINER, "BasePPOTrainer.ppo_train", ("global_steps",), trainer.ppo_train),
        Hook(
            _TRAINER,
            "BasePPOTrainer.save_logs_and_checkpoints",
            ("global_step", "logs_dict", "client_states"),
            trainer.save,
        ),
        Hook(
            _TRAINER,
            "BasePPOTrainer.save_best_checkpoint",
            ("eval_metrics", "global_step", "client_states"),
            trainer.save,
        ),
        Hook(_TRAINER, "BasePPOTrainer.init_checkpoint_states", (), trainer.init_checkpoint_states),
    ),
)


COMMAND = Patch(
    host="openrlhf",
    tested=HOST.tested_text,
    hooks=tuple(h for h in PATCH.hooks if h.name.startswith("RayActorGroup.")),
)
"""What acts in the command's own process, where the groups of actors are made."""


def apply_to(module: ModuleType) -> None:
    """Post-import hook of ``klplug_openrlhf.install``."""
    PATCH.apply_to(module)
