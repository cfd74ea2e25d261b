"""The OpenRLHF side of a quickstart run: its command, its log, what it leaves."""

import ast
import re
import sys
from importlib.metadata import version
from pathlib import Path

from recipes.quickstart.progress import Metrics, number
from recipes.quickstart.settings import Recipe, Settings
from recipes.shared import reward

STOCK_PREFIX = "stock:"
STEP = re.compile(r"Global step (\d+): (\{.*\})")


def host_version() -> str:
    return version("openrlhf")


def kl_arguments(settings: Settings) -> list[str]:
    """Module to run, and the KL in its own words: klplug's launcher, or stock OpenRLHF."""
    coef = [] if settings.kl_coef is None else [repr(settings.kl_coef)]
    if not settings.kl_type.startswith(STOCK_PREFIX):
        kl_coef = ["--klplug.kl_coef", *coef] if coef else []
        return ["klplug_openrlhf", "--klplug.kl_type", settings.kl_type, *kl_coef]
    estimator = settings.kl_type.removeprefix(STOCK_PREFIX)
    # The placement that OpenRLHF itself recommends: k1 in the reward, k2 and k3 as a loss.
    as_loss = [] if estimator == "k1" else ["--algo.kl.use_loss"]
    kl = ["--algo.kl.init_coef", *coef, "--algo.kl.estimator", estimator, *as_loss]
    return ["openrlhf.cli.train_ppo_ray", *kl]


def command(
    settings: Settings, recipe: Recipe, model: Path | str, prompts: Path, trained: Path
) -> list[str]:
    """GRPO, everything on the same logical GPUs."""
    ranks = str(settings.ranks)
    answers = recipe.prompts * recipe.samples
    module, *kl = kl_arguments(settings)
    options = {
        "actor.model_name_or_path": str(model),
        "data.prompt_dataset": str(prompts),
        "data.input_key": "question",
        "data.label_key": "answer",
        "data.max_len": str(recipe.max_len),
        "reward.remote_url": str(Path(reward.__file__).resolve()),
        "algo.advantage.estimator": "group_norm",
        "rollout.batch_size": str(recipe.prompts),
        "rollout.n_samples_per_prompt": str(recipe.samples),
        "rollout.micro_batch_size": str(recipe.micro_batch),
        "rollout.max_new_tokens": str(recipe.max_new_tokens),
        "rollout.temperature": "1.0",
        "train.batch_size": str(answers // settings.updates),
        "train.micro_batch_size": str(settings.train_micro_batch),
        "train.seed": str(settings.seed),
        "actor.num_nodes": "1",
        "actor.num_gpus_per_node": ranks,
        "ref.num_nodes": "1",
        "ref.num_gpus_per_node": ranks,
        "actor.adam.lr": repr(settings.spike * recipe.learning_rate),
        "actor.lr_scheduler": "constant_with_warmup" if settings.spike == 1 else "inverse_sqrt",
        "vllm.num_engines": ranks,
        "vllm.tensor_parallel_size": "1",
        "vllm.sync_backend": "gloo",
        "vllm.gpu_memory_utilization": "0.2",
        "ds.zero_stage": "2",
        "ds.param_dtype": "bf16",
        "ds.attn_implementation": "eager",
        "ckpt.output_dir": str(trained),
        "ckpt.path": str(trained / "checkpoints"),
    }
    if recipe.cut_off_reward is not None:
        options["reward.stop_properly_penalty_coef"] = repr(recipe.cut_off_reward)
    flags = ["--vllm.enforce_eager", "--train.colocate_all", "--data.apply_chat_template"]
    if settings.save_every:
        options["ckpt.save_steps"] = str(settings.save_every)
        flags += ["--ckpt.save_hf", "--ckpt.disable_ds"]
    written = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", module, *kl, *written, *flags]


def trained_policy(trained: Path, settings: Settings) -> Path:
    """Where the run leaves the policy, as a Hugging Face folder."""
    return trained


def saved_policy(trained: Path, step: int) -> Path:
    """Where the run leaves the copy of a step, as `save_every` asks for it."""
    return trained / "checkpoints" / f"global_step{step}_hf"


def step_metrics(line: str) -> Metrics | None:
    """A step's metrics with its number under `step`; None for any other line, or a torn one.

    Values that are not numbers are left out; nan and inf are kept.
    """
    if (match := STEP.search(line)) is None:
        return None
    try:
        status = ast.parse(match[2], mode="eval").body
    except SyntaxError:
        return None
    if not isinstance(status, ast.Dict):
        return None
    metrics: Metrics = {"step": int(match[1])}
    for key, printed in zip(status.keys, status.values, strict=True):
        if isinstance(key, ast.Constant) and (value := number(printed)) is not None:
            metrics[str(key.value)] = value
    return metrics
