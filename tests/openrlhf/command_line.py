"""OpenRLHF's ``args`` from its own command line, in whichever release is being tested."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import runpy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

from klplug_openrlhf import keys
from klplug_openrlhf.hooks import COMMAND
from klplug_openrlhf.launcher import HOST_MODULE

# What a release without dots calls the options that the tests and the quickstart set.
FLAT = keys.FLAT | {
    "actor.model_name_or_path": "pretrain",
    "data.input_key": "input_key",
    "data.label_key": "label_key",
    "data.prompt_dataset": "prompt_data",
    "eval.dataset": "eval_dataset",
    "reward.model_name_or_path": "reward_pretrain",
    "actor.adam.lr": "actor_learning_rate",
    "actor.entropy_coef": "entropy_loss_coef",
    "actor.eps_clip_low_high": "eps_clip_low_high",
    "actor.lr_scheduler": "lr_scheduler",
    "actor.num_gpus_per_node": "actor_num_gpus_per_node",
    "actor.num_nodes": "actor_num_nodes",
    "ckpt.best_metric_key": "best_metric_key",
    "ckpt.load_enable": "load_checkpoint",
    "ckpt.output_dir": "save_path",
    "ckpt.path": "ckpt_path",
    "ckpt.save_steps": "save_steps",
    "data.apply_chat_template": "apply_chat_template",
    "data.max_len": "max_len",
    "ds.attn_implementation": "attn_implementation",
    "ds.param_dtype": "param_dtype",
    "ds.zero_stage": "zero_stage",
    "logger.logging_steps": "logging_steps",
    "ref.num_gpus_per_node": "ref_num_gpus_per_node",
    "ref.num_nodes": "ref_num_nodes",
    "reward.overlong_buffer_len": "overlong_buffer_len",
    "reward.overlong_penalty_factor": "overlong_penalty_factor",
    "reward.remote_url": "remote_rm_url",
    "reward.stop_properly_penalty_coef": "stop_properly_penalty_coef",
    "rollout.batch_size": "rollout_batch_size",
    "rollout.max_new_tokens": "max_new_tokens",
    "rollout.micro_batch_size": "micro_rollout_batch_size",
    "rollout.temperature": "temperature",
    "train.batch_size": "train_batch_size",
    "train.colocate_all": "colocate_all_models",
    "train.micro_batch_size": "micro_train_batch_size",
    "train.seed": "seed",
    "vllm.enforce_eager": "enforce_eager",
    "vllm.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "vllm.sync_backend": "vllm_sync_backend",
    "vllm.tensor_parallel_size": "vllm_tensor_parallel_size",
}


def has_dots() -> bool:
    """Whether the release that is importable here has dotted options."""
    return importlib.util.find_spec("openrlhf.utils.config") is not None


def spelled(words: list[str], dots: bool | None = None) -> list[str]:
    """A command line of the newest release in the words of the one that is tested."""
    if has_dots() if dots is None else dots:
        return words
    flags = {f"--{name}": f"--{flat}" for name, flat in FLAT.items()}
    return [flags.get(word, word) for word in words]


class Reached(Exception):
    """OpenRLHF's ``train`` asked for Ray: its settings are final."""


def settled(main: Callable[[], Any], words: list[str]) -> tuple[Any, dict[str, Any]]:
    """What ``main`` made of a command line: OpenRLHF's args, and the keywords of ``ray.init``."""
    import ray

    caught: dict[str, Any] = {}

    def init(*args: Any, **kwargs: Any) -> None:
        frame = sys._getframe()
        while frame.f_code.co_name != "train":
            assert frame.f_back is not None
            frame = frame.f_back
        caught.update(args=frame.f_locals["args"], init=kwargs)
        raise Reached

    with (
        # Set here, so that the launcher's own wrapping is undone afterwards.
        mock.patch.object(argparse.ArgumentParser, "parse_args", PARSE_ARGS),
        mock.patch.object(ray, "init", init),
        mock.patch.object(ray, "is_initialized", lambda: False),
        mock.patch.object(sys, "argv", ["openrlhf", *words]),
    ):
        try:
            main()  # SystemExit goes through to the test
        except Reached:
            return caught["args"], caught["init"]
        finally:
            COMMAND.restore()  # the command's process would have ended
    raise AssertionError("OpenRLHF ended without asking for Ray")


PARSE_ARGS = argparse.ArgumentParser.parse_args


@functools.cache
def _defaults() -> Any:
    def host() -> None:
        runpy.run_module(HOST_MODULE, run_name="__main__", alter_sys=True)

    words = [
        "--actor.model_name_or_path", "policy", "--reward.remote_url", "reward.py",
        "--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "4",
        "--actor.num_gpus_per_node", "1",
    ]  # fmt: skip
    return settled(host, spelled(words))[0]


def arguments(values: dict[str, Any]) -> Any:
    """OpenRLHF's defaults for GRPO, with these values in place of theirs."""
    args = copy.deepcopy(_defaults())
    for name, value in values.items():
        change(args, name, value)
    return args


def change(args: Any, name: str, value: Any) -> None:
    """Set an option that the release has, or a key of klplug's; others are left out."""
    if FLAT.get(name) in vars(args):
        setattr(args, FLAT[name], value)
        return
    *parents, last = name.split(".")
    for parent in parents:
        args = vars(args).setdefault(parent, SimpleNamespace())
    setattr(args, last, value)
