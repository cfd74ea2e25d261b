"""OpenRLHF's side of a recipe: its command line, and what its own configuration makes of it."""

import contextlib
import difflib
import io
import re
import runpy
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from recipes import cpu_shim
from recipes.quickstart.openrlhf import kl_arguments
from recipes.recipe import KEPT_CHECKPOINTS, Recipe
from recipes.shared import reward
from recipes.shared.settings import SettingsError

NAME = "openrlhf"
PACKAGES = ("openrlhf", "klplug_openrlhf", "math_verify")
TRAIN_FILE = "train.jsonl"
REWARD = "reward_func"
ADVANTAGES = {"group_norm": "group mean and standard deviation"}


def command(recipe: Recipe, data: Path, out: Path) -> list[str]:
    """Module and arguments, for `python -m`."""
    gpus = {"num_nodes": recipe.nodes, "num_gpus_per_node": recipe.gpus_per_node}
    options = {
        "actor.model_name_or_path": recipe.model,
        **{f"{role}.{key}": value for role in ("actor", "ref") for key, value in gpus.items()},
        "data.prompt_dataset": data / TRAIN_FILE,
        # It would train on the rest too: ranks without answers hang, and updates are cut short.
        "data.max_samples": recipe.questions,
        "data.input_key": "prompt",
        "data.label_key": "answer",
        "data.apply_chat_template": True,
        "data.max_len": recipe.max_prompt_tokens + recipe.max_new_tokens,
        "reward.remote_url": recipe.reward or Path(reward.__file__).resolve(),
        "algo.advantage.estimator": "group_norm",
        "rollout.batch_size": recipe.prompts,
        "rollout.n_samples_per_prompt": recipe.samples,
        "rollout.micro_batch_size": recipe.micro_batch,
        "rollout.max_new_tokens": recipe.max_new_tokens,
        "rollout.temperature": recipe.temperature,
        "rollout.top_p": recipe.top_p,
        "train.batch_size": recipe.answers // recipe.updates,
        "train.micro_batch_size": recipe.micro_batch,
        "train.max_epochs": 1,
        "train.num_episodes": recipe.episodes,
        "train.seed": recipe.seed,
        "train.colocate_all": True,
        "actor.adam.lr": recipe.learning_rate,
        "actor.adam.betas": list(recipe.betas),
        "actor.adam.weight_decay": recipe.weight_decay,
        "actor.lr_scheduler": "constant",
        "actor.lr_warmup_ratio": 0.0,
        "actor.max_norm": recipe.max_grad_norm,
        "actor.eps_clip_low_high": [recipe.clip, recipe.clip],
        "actor.dual_clip": recipe.dual_clip,
        "actor.loss_agg_mode": "token-mean",
        "actor.gradient_checkpointing_enable": True,
        "vllm.num_engines": recipe.gpus // recipe.rollout_tensor_parallel,
        "vllm.tensor_parallel_size": recipe.rollout_tensor_parallel,
        "vllm.gpu_memory_utilization": recipe.rollout_memory,
        "vllm.enable_prefix_caching": True,
        # Each gives its memory back while the other one works.
        "vllm.enable_sleep": True,
        "ds.enable_sleep": True,
        "ds.param_dtype": "bf16",
        "ckpt.output_dir": out / "policy",
        "ckpt.path": out / "checkpoints",
        "ckpt.save_steps": recipe.save_every,
        "ckpt.max_num": KEPT_CHECKPOINTS,
        "ckpt.load_enable": True,
        "logger.tensorboard_dir": out / "tensorboard",
        **recipe.openrlhf,
    }
    module, *kl = kl_arguments(recipe)
    return [module, *kl, *(word for key, value in options.items() for word in flag(key, value))]


def rows(path: Path) -> int:
    """Questions in a training file."""
    with path.open("rb") as lines:
        return sum(bool(line.strip()) for line in lines)


def flag(key: str, value: Any) -> list[str]:
    """An option as argparse takes it; False leaves a switch out, and None an option."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    return [f"--{key}", *map(str, value if isinstance(value, list) else [value])]


class Reached(Exception):
    """OpenRLHF would begin; holds the arguments of its `train`."""


def compose(words: list[str]) -> Namespace:
    """What OpenRLHF's own command line makes of a command: the `args` that `train(args)` is given.

    Its CLI module is run as it is, with all its assertions; `train` is stopped at the first use of
    its arguments, before which it would only start Ray.

    Raises:
        SettingsError: OpenRLHF, or klplug, refuses the command.
    """
    if find_spec("flash_attn") is None:  # building it takes a GPU's compiler; none of it is called
        sys.path.append(str(cpu_shim.HERE / "packages"))
    import openrlhf.utils
    import ray

    def get_strategy(args: Namespace) -> None:
        raise Reached(args)

    module, *arguments = words
    said = io.StringIO()
    try:
        with (
            mock.patch.object(openrlhf.utils, "get_strategy", get_strategy),
            mock.patch.object(ray, "is_initialized", lambda: True),
            mock.patch("klplug.hosting.cluster.check_nodes", lambda *_: None),
            mock.patch.object(sys, "argv", [module, *arguments]),
            contextlib.redirect_stderr(said),
        ):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Reached as reached:
        return reached.args[0]
    except (SystemExit, AssertionError) as error:
        raise SettingsError(refusal(said.getvalue(), error)) from error
    raise SettingsError(f"{module} ended before it would have trained")


def refusal(said: str, error: BaseException) -> str:
    """An assertion's words, or argparse's without its page of usage, and a name that is near."""
    if isinstance(error, AssertionError):
        return f"OpenRLHF refuses: {error}"
    line = (said.strip().splitlines() or [str(error)])[-1]
    known = set(re.findall(r"--[a-z][\w.]*", said.rpartition("error:")[0]))
    wrong = re.findall(r"--[a-z][\w.]*", line) if "unrecognized" in line else []
    near = [n for word in wrong for n in difflib.get_close_matches(word, known, n=1)]
    return f"OpenRLHF refuses: {line}" + (f". Did you mean {', '.join(near)}?" if near else "")


def common(args: Namespace) -> dict[str, Any]:
    """A composed configuration in the words of `Recipe.common`."""
    actor, rollout = args.actor, args.rollout
    own = getattr(args, "klplug", None)
    kl = {"kl_type": f"stock:{args.algo.kl.estimator}", "kl_coef": args.algo.kl.init_coef}
    if own is not None:
        kl = {"kl_type": own.kl_type, "kl_coef": own.kl_coef}
    return {
        "model": actor.model_name_or_path,
        "gpus": actor.num_nodes * actor.num_gpus_per_node,
        "rollouts": args.data.max_samples // rollout.batch_size * args.train.num_episodes,
        "prompts": rollout.batch_size,
        "samples": rollout.n_samples_per_prompt,
        "answers_per_update": args.train.batch_size,
        "micro_batch": args.train.micro_batch_size,
        "passes_over_rollout": args.train.max_epochs,
        "episodes": args.train.num_episodes,
        "max_prompt_tokens": args.data.max_len - rollout.max_new_tokens,
        "max_new_tokens": rollout.max_new_tokens,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "learning_rate": actor.adam.lr,
        "schedule": actor.lr_scheduler,
        "warmup": actor.lr_warmup_ratio,
        "betas": tuple(actor.adam.betas),
        "weight_decay": actor.adam.weight_decay,
        "max_grad_norm": actor.max_norm,
        "clip": tuple(actor.eps_clip_low_high),
        "dual_clip": actor.dual_clip,
        "aggregation": actor.loss_agg_mode,
        "advantage": ADVANTAGES.get(args.algo.advantage.estimator),
        "entropy": actor.entropy_coef or 0.0,
        "seed": args.train.seed,
        **kl,
    }
