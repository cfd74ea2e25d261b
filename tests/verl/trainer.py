"""verl's trainers without Ray: their own methods over stand-ins for queue and workers."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from klplug_verl.hooks import PATCH
from klplug_verl.settings import derive
from klplug_verl.trainer import fit
from omegaconf import DictConfig, OmegaConf, open_dict

from tests.verl.engine import nested
from tests.verl.tensors import IS_LEGACY, LENGTHS

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


def derived(*overrides: str, model: str = "hub/model") -> tuple[DictConfig, str | None]:
    """The config as the command's own process resolves it, and the line it prints."""
    engine = "trainer.use_legacy_worker_impl=disable"
    if IS_LEGACY and any(
        w in o
        for o in overrides
        for w in ("combined", "baseline=", "=rollout", "exact", "=posterior", "=teacher")
    ):
        overrides = (*overrides, engine)  # as the refusal says
    made = config("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2", *overrides)
    with open_dict(made):
        made.data.train_files = made.data.val_files = "hub/data"
        made.actor_rollout_ref.model.path = model
    line = derive(made, written(overrides))
    return made, line


def trainer(
    *overrides: str, kind: str = TRAINERS[0], folder: Path | None = None, base: type = object
) -> Any:
    """A trainer after its ``__init__``; without Ray only the parts that klplug touches.

    Args:
        base: what one of a recipe, or one that is registered, has before verl's own.
    """
    if kind == "ray" and "v1" in TRAINERS:
        overrides = (*overrides, "trainer.use_v1=False")
    made, _ = derived(*overrides)
    with open_dict(made):
        if folder is not None:
            made.trainer.default_local_dir = str(folder)
        OmegaConf.resolve(made)
    return v1_trainer(made, base) if kind == "v1" else ray_trainer(made, base)


def v1_trainer(made: DictConfig, base: type = object) -> Any:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    class Trainer(*(() if base is object else (base,)), PPOTrainer):  # type: ignore[misc]
        def _build_replay_buffer(self) -> None: ...

        def on_sample_end(self) -> None: ...

        def on_step_end(self) -> None: ...

    return Trainer(made)


def ray_trainer(made: DictConfig, base: type = object) -> Any:
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.trainer.ppo.utils import Role

    class Trainer(*(() if base is object else (base,)), RayPPOTrainer):  # type: ignore[misc]
        def _create_dataloader(self, *_: Any) -> None: ...

    return Trainer(made, None, {Role.ActorRollout: None}, None)


class Queue:
    """In place of the v1 trainer's queue, by the two calls that its advantage stage makes."""

    def __init__(self, data: Any, keys: Sequence[str]) -> None:
        self.keys, self.partition_id, self.extra_info = list(keys), "train", dict[str, Any]()
        lengths = torch.tensor(LENGTHS)
        tensors = {
            "rm_scores" if name == "token_level_scores" else name: nested(
                [row[:length] for row, length in zip(tensor, lengths, strict=True)]
            )
            for name, tensor in data.batch.items()
        }
        others = {name: own.tolist() for name, own in data.non_tensor_batch.items()}
        self.fields = {**tensors, **others}

    def kv_batch_get(
        self, keys: Sequence[str], partition_id: str, select_fields: Sequence[str]
    ) -> Any:
        from verl.utils import tensordict_utils as tu

        assert (list(keys), partition_id) == (self.keys, self.partition_id)
        return tu.get_tensordict({k: v for k, v in self.fields.items() if k in select_fields})

    def kv_batch_put(self, keys: Sequence[str], partition_id: str, fields: Any) -> Queue:
        assert (list(keys), partition_id) == (self.keys, self.partition_id)
        assert fields.batch_size == (len(self.keys),)
        self.fields |= dict(fields)
        return self

    def __len__(self) -> int:
        return len(self.keys)


def joined(trainer: Any, data: Any, keys: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The trainer's advantage stage, from scores to advantages."""
    metrics: dict[str, Any] = {}
    if hasattr(trainer, "_compute_advantage"):
        from verl.trainer.ppo.v1 import trainer_base

        queue = Queue(data, keys)
        with mock.patch.object(trainer_base, "tq", queue):
            assert trainer._compute_advantage(queue, metrics) is queue
        for name, tensor in queue.fields.items():
            if isinstance(tensor, torch.Tensor):
                data.batch[name] = tensor.to_padded_tensor(0.0)
        return data, metrics

    from verl.trainer.ppo import ray_trainer, rollout_corr_helper

    algorithm = trainer.config.algorithm

    def stage() -> Any:  # as it stands in the middle of RayPPOTrainer.fit
        found = data
        if algorithm.use_kl_in_reward:
            found, own = ray_trainer.apply_kl_penalty(
                found, kl_ctrl=trainer.kl_ctrl_in_reward, kl_penalty=algorithm.kl_penalty
            )
            metrics.update(own)
        else:
            found.batch["token_level_rewards"] = found.batch["token_level_scores"]
        correction = algorithm.get("rollout_correction")
        if correction is not None and "rollout_log_probs" in found.batch:
            found, own = rollout_corr_helper.compute_rollout_correction_and_add_to_batch(
                found, correction
            )
            metrics.update(own)
        return ray_trainer.compute_advantage(
            found,
            adv_estimator=algorithm.adv_estimator,
            gamma=algorithm.gamma,
            lam=algorithm.lam,
            num_repeat=2,
            norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo,
            config=algorithm,
        )

    result = fit(stage, trainer, (), {})
    if hasattr(trainer, "klplug"):
        metrics.update(trainer.klplug.report())
    return result, metrics


def quoted(kl_type: str) -> str:
    """As Hydra takes a value that holds `,` or `=`."""
    return f"'{kl_type}'"
