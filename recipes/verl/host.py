"""verl's side of a recipe: its command line, and what its own configuration makes of it."""

import contextlib
import io
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from recipes.quickstart.verl import kl_overrides
from recipes.recipe import KEPT_CHECKPOINTS, Recipe
from recipes.shared import reward
from recipes.shared.settings import SettingsError

NAME = "verl"
PACKAGES = ("verl", "klplug_verl", "math_verify")
TRAIN_FILE = "train.parquet"
REWARD = "compute_score"
MODULE = "verl.trainer.main_ppo"
REWARD_MANAGER = {
    "reward.reward_manager.source": "importlib",
    "reward.reward_manager.name": "WholeRewardManager",
    "reward.reward_manager.module.path": Path(__file__).resolve().with_name("reward_manager.py"),
}


def command(recipe: Recipe, data: Path, out: Path) -> list[str]:
    """Module and arguments, for `python -m`."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    own = dict(recipe.verl)
    groups = {key: own.pop(key) for key in ("model_engine",) if key in own}
    options = {
        "actor_rollout_ref.model.path": recipe.model,
        "actor_rollout_ref.model.enable_gradient_checkpointing": True,
        "trainer.nnodes": recipe.nodes,
        "trainer.n_gpus_per_node": recipe.gpus_per_node,
        "data.train_files": data / TRAIN_FILE,
        # verl wants one; it is not looked at with test_freq=-1. `recipes.evaluate` evaluates.
        "data.val_files": data / "test.parquet",
        "data.train_max_samples": recipe.questions,  # as on OpenRLHF
        "data.train_batch_size": recipe.prompts,
        "data.max_prompt_length": recipe.max_prompt_tokens,
        "data.max_response_length": recipe.max_new_tokens,
        "data.truncation": "left",
        "data.seed": recipe.seed,
        **{
            f"+data.apply_chat_template_kwargs.{key}": repr(value)
            for key, value in recipe.template.items()
        },
        "reward.custom_reward_function.path": recipe.reward or Path(reward.__file__).resolve(),
        "reward.custom_reward_function.name": REWARD,
        **({} if recipe.reward else REWARD_MANAGER),
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": True,
        f"{rollout}.name": "vllm",
        f"{rollout}.n": recipe.samples,
        f"{rollout}.temperature": recipe.temperature,
        f"{rollout}.top_p": recipe.top_p,
        f"{rollout}.seed": recipe.seed,
        f"{rollout}.tensor_model_parallel_size": recipe.rollout_tensor_parallel,
        f"{rollout}.gpu_memory_utilization": recipe.rollout_memory,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": recipe.micro_batch,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": recipe.micro_batch,
        f"{actor}.ppo_mini_batch_size": recipe.prompts // recipe.updates,
        f"{actor}.ppo_micro_batch_size_per_gpu": recipe.micro_batch,
        f"{actor}.ppo_epochs": 1,
        f"{actor}.optim.lr": recipe.learning_rate,
        f"{actor}.optim.betas": f"[{','.join(map(str, recipe.betas))}]",
        f"{actor}.optim.weight_decay": recipe.weight_decay,
        f"{actor}.optim.lr_warmup_steps_ratio": 0.0,
        f"{actor}.optim.clip_grad": recipe.max_grad_norm,
        f"{actor}.clip_ratio": recipe.clip,
        f"{actor}.clip_ratio_low": recipe.clip,
        f"{actor}.clip_ratio_high": recipe.clip,
        f"{actor}.clip_ratio_c": recipe.dual_clip,
        f"{actor}.loss_agg_mode": "token-mean",
        f"{actor}.entropy_coeff": 0,
        "trainer.total_epochs": recipe.episodes,
        "trainer.save_freq": recipe.save_every,
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
        "trainer.logger": "[console,tensorboard]",
        "trainer.project_name": "klplug",
        "trainer.experiment_name": recipe.name,
        "trainer.default_local_dir": out / "checkpoints",
        "trainer.max_actor_ckpt_to_keep": KEPT_CHECKPOINTS,
        "trainer.resume_mode": "auto",
        # Hydra keeps no log of its own beside the run's.
        "hydra.run.dir": ".",
        "hydra.output_subdir": "null",
        "hydra/job_logging": "none",
    }
    if "model_engine" not in groups:  # Megatron's checkpoints are in that form by themselves
        options[f"{actor}.checkpoint.save_contents"] = "[model,optimizer,extra,hf_model]"
        options[f"{actor}.checkpoint.load_contents"] = "[model,optimizer,extra]"
    options |= own
    written = [f"{key}={value}" for key, value in {**groups, **options}.items()]
    return [MODULE, *kl_overrides(recipe), *written]


def rows(path: Path) -> int:
    """Questions in a training file."""
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path).num_rows


def compose(words: list[str]) -> Any:
    """What verl's own configuration makes of a command: the config that `run_ppo` is given.

    Hydra's composition, klplug's plugin and verl's `validate_config` all have had their say.

    Raises:
        SettingsError: verl, or klplug, refuses the command.
    """
    from verl.trainer import main_ppo

    module, *arguments = words
    found: list[Any] = []
    said = io.StringIO()
    try:
        with (
            mock.patch.object(main_ppo, "run_ppo", lambda config, **_: found.append(config)),
            mock.patch.object(sys, "argv", [module, *arguments]),
            contextlib.redirect_stderr(said),
        ):
            main_ppo.main()
    except SystemExit as error:
        lines = [line for line in said.getvalue().splitlines() if is_telling(line)]
        raise SettingsError("verl refuses: " + " ".join(lines or [str(error)])) from error
    if not found:
        raise SettingsError(f"{module} ended before it would have trained")
    return found[0]


def is_telling(line: str) -> bool:
    """Not a traceback's place, nor all the words again, nor Hydra's advice to see more of it."""
    telling_nothing = (" ", "Traceback", "Error executing job with", "Set the environment")
    return bool(line.strip()) and not line.startswith(telling_nothing)


def common(config: Any) -> dict[str, Any]:
    """A composed configuration in the words of `Recipe.common`."""
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    data, own = config.data, config.get("klplug")
    if own is not None:
        kl = {"kl_type": own.kl_type, "kl_coef": own.get("kl_coef")}
    elif actor.use_kl_loss:
        kl = {"kl_type": f"stock:{actor.kl_loss_type}", "kl_coef": actor.kl_loss_coef}
    else:
        algorithm = config.algorithm
        kl = {
            "kl_type": f"stock:{algorithm.kl_penalty}",
            "kl_coef": algorithm.kl_ctrl.kl_coef,
        }
    grouped = config.algorithm.adv_estimator == "grpo" and config.algorithm.norm_adv_by_std_in_grpo
    scheduler = actor.optim.get("lr_scheduler_type") or actor.optim.get("lr_decay_style")
    return {
        "model": config.actor_rollout_ref.model.path,
        "gpus": config.trainer.nnodes * config.trainer.n_gpus_per_node,
        "rollouts": data.train_max_samples // data.train_batch_size * config.trainer.total_epochs,
        "prompts": data.train_batch_size,
        "samples": rollout.n,
        "answers_per_update": actor.ppo_mini_batch_size * rollout.n,
        "micro_batch": actor.ppo_micro_batch_size_per_gpu,
        "passes_over_rollout": actor.ppo_epochs,
        "episodes": config.trainer.total_epochs,
        "max_prompt_tokens": rollout.prompt_length,
        "max_new_tokens": rollout.response_length,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "learning_rate": actor.optim.lr,
        "schedule": scheduler,
        "warmup": actor.optim.lr_warmup_steps_ratio,
        "betas": tuple(actor.optim.betas),
        "weight_decay": actor.optim.weight_decay,
        "max_grad_norm": actor.optim.clip_grad,
        "clip": (actor.clip_ratio_low, actor.clip_ratio_high),
        "dual_clip": actor.clip_ratio_c,
        "aggregation": actor.loss_agg_mode,
        "advantage": "group mean and standard deviation" if grouped else None,
        "entropy": actor.entropy_coeff,
        "seed": data.seed,
        **kl,
    }
