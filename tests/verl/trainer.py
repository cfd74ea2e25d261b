"""verl's trainers without Ray: their own methods over stand-ins for queue and workers."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from klplug_verl.hooks import PATCH
from klplug_verl.settings import derive
from klplug_verl.trainer import compute_advantage, fit
from omegaconf import DictConfig, OmegaConf, open_dict

TRAINERS = ("v1", "ray") if any(".v1." in path for path in PATCH.modules) else ("ray",)
"""Which the installed verl has: its v1 trainer, and ``RayPPOTrainer``."""


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


def trainer(*overrides: str, kind: str = TRAINERS[0], folder: Path | None = None) -> Any:
    """A trainer after its ``__init__``; without Ray only the parts that klplug touches."""
    if kind == "ray" and "v1" in TRAINERS:
        overrides = (*overrides, "trainer.use_v1=False")
    made, _ = derived(*overrides)
    with open_dict(made):
        if folder is not None:
            made.trainer.default_local_dir = str(folder)
        OmegaConf.resolve(made)
    return v1_trainer(made) if kind == "v1" else ray_trainer(made)


def v1_trainer(made: DictConfig) -> Any:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    class Trainer(PPOTrainer):  # type: ignore[misc]
        def _build_replay_buffer(self) -> None: ...

        def on_sample_end(self) -> None: ...

        def on_step_end(self) -> None: ...

    return Trainer(made)


def ray_trainer(made: DictConfig) -> Any:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.utils import Role

    class Trainer(RayPPOTrainer):  # type: ignore[misc]
        def _create_dataloader(self, *_: Any) -> None: ...

    return Trainer(made, None, {Role.ActorRollout: None}, None)


def joined(trainer: Any, data: Any, keys: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The trainer's advantage stage, from scores to advantages, with the queue left out."""
    from verl.trainer.ppo import ray_trainer

    algorithm = trainer.config.algorithm
    metrics: dict[str, Any] = {}
    is_v1 = hasattr(trainer, "_compute_advantage")

    def stage(*_: Any) -> Any:
        found = data
        if algorithm.use_kl_in_reward:
            found, own = ray_trainer.apply_kl_penalty(
                found, kl_ctrl=trainer.kl_ctrl_in_reward, kl_penalty=algorithm.kl_penalty
            )
            metrics.update(own)
        else:
            found.batch["token_level_rewards"] = found.batch["token_level_scores"]
        settings = {
            "adv_estimator": algorithm.adv_estimator,
            "num_repeat": 2,
            "norm_adv_by_std_in_grpo": algorithm.norm_adv_by_std_in_grpo,
            "config": algorithm,
        }
        if not is_v1:
            return ray_trainer.compute_advantage(found, **settings)
        from verl.trainer.ppo.v1.trainer_base import compute_advantage_for_multi_trajectories

        return compute_advantage_for_multi_trajectories(found, batch_keys=list(keys), **settings)

    if is_v1:

        def whole_stage(batch: Any, metrics: dict[str, Any]) -> Any:
            return stage()

        return compute_advantage(whole_stage, trainer, (None, metrics), {}), metrics
    result = fit(stage, trainer, (), {})
    if hasattr(trainer, "klplug"):
        metrics.update(trainer.klplug.report())
    return result, metrics


def quoted(kl_type: str) -> str:
    """As Hydra takes a value that holds `,` or `=`."""
    return f"'{kl_type}'"
