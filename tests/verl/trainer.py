"""verl's v1 trainer without Ray: its own methods over stand-ins for queue and workers."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from klplug_verl.hooks import compute_advantage
from klplug_verl.settings import derive
from omegaconf import DictConfig, OmegaConf, open_dict


def config(*overrides: str) -> DictConfig:
    """verl's whole config, composed as its main does."""
    return copy.deepcopy(composed(*overrides))


@functools.lru_cache
def composed(*overrides: str) -> DictConfig:
    import verl
    from hydra import compose, initialize_config_dir

    folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
    with initialize_config_dir(config_dir=folder, version_base=None):
        return compose(config_name="ppo_trainer", overrides=list(overrides))


def written(overrides: Sequence[str]) -> dict[str, Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {o.key_or_group: o.value() for o in parsed}


def derived(*overrides: str) -> tuple[DictConfig, str | None]:
    """The config as the command's own process resolves it, and the line it prints."""
    made = config("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2", *overrides)
    with open_dict(made):
        made.data.train_files = made.data.val_files = "hub/data"
        made.actor_rollout_ref.model.path = "hub/model"
    line = derive(made, written(overrides))
    return made, line


def trainer(*overrides: str, folder: Path | None = None) -> Any:
    """A trainer after its ``__init__``; without Ray only the parts that klplug touches."""
    from verl.trainer.ppo.v1 import trainer_base

    made, _ = derived(*overrides)
    if folder is not None:
        made.trainer.default_local_dir = str(folder)

    class Trainer(trainer_base.PPOTrainer):  # type: ignore[misc]
        def _build_replay_buffer(self) -> None: ...

        def on_sample_end(self) -> None: ...

        def on_step_end(self) -> None: ...

    with open_dict(made):
        OmegaConf.resolve(made)
    return Trainer(made)


def joined(trainer: Any, data: Any, keys: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The trainer's advantage stage, from scores to advantages, with the queue left out."""
    from verl.trainer.ppo import ray_trainer
    from verl.trainer.ppo.v1 import trainer_base

    algorithm = trainer.config.algorithm

    def stage(batch: Any, metrics: dict[str, Any]) -> Any:
        found = data
        if algorithm.use_kl_in_reward:
            found, own = ray_trainer.apply_kl_penalty(
                found, kl_ctrl=trainer.kl_ctrl_in_reward, kl_penalty=algorithm.kl_penalty
            )
            metrics.update(own)
        else:
            found.batch["token_level_rewards"] = found.batch["token_level_scores"]
        return trainer_base.compute_advantage_for_multi_trajectories(
            found,
            batch_keys=list(keys),
            adv_estimator=algorithm.adv_estimator,
            num_repeat=2,
            norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo,
            config=algorithm,
        )

    metrics: dict[str, Any] = {}
    result = compute_advantage(stage, trainer, (None, metrics), {})
    return result, metrics


def quoted(kl_type: str) -> str:
    """As Hydra takes a value that holds `,` or `=`."""
    return f"'{kl_type}'"
