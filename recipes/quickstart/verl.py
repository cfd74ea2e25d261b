"""The verl side of a quickstart run: its data, its command, its log."""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

from recipes.quickstart.progress import Metrics, number
from recipes.quickstart.settings import Recipe, Settings
from recipes.shared import reward

STOCK_PREFIX = "stock:"
STEP = re.compile(r"\bstep:(\d+) - (.*)")
# verl's name of what the other hosts' logs call by the name on the left; the first that is there.
NAMES = {
    "reward": ("critic/score/mean",),
    "kl": ("actor/kl_loss", "actor/reward_kl_penalty"),
    "response_length": ("response_length/mean",),
    "actor_grad_norm": ("actor/grad_norm",),
}


# Settings that 0.8 and 0.7 do not have.
NEW_IN_0_9 = (
    "actor_rollout_ref.rollout.seed",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units",
)


def host_version() -> str:
    return version("verl")


def is_older() -> bool:
    """Whether the verl that is found first is older than 0.9."""
    return tuple(map(int, host_version().split(".")[:2])) < (0, 9)


def write_data(prompts: Path, path: Path) -> Path:
    """The problems as verl reads them, from JSON lines to parquet."""
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in prompts.read_text("utf-8").splitlines()]
    table = pyarrow.Table.from_pylist(
        [
            {
                "data_source": "klplug/quickstart",
                "prompt": [{"role": "user", "content": row["question"]}],
                "reward_model": {"style": "rule", "ground_truth": row["answer"]},
                "extra_info": {"index": index},
            }
            for index, row in enumerate(rows)
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return path


def quoted(kl_type: str) -> str:
    """A kl_type as Hydra takes it: options hold what its grammar has other uses for."""
    return f"'{kl_type}'" if set(kl_type) & set(",=") else kl_type


def kl_overrides(settings: Settings) -> list[str]:
    """The KL in its own words: klplug's two overrides, or stock verl's."""
    coef = settings.kl_coef
    if not settings.kl_type.startswith(STOCK_PREFIX):
        strength = [] if coef is None else [f"+klplug.kl_coef={coef!r}"]
        return [f"+klplug.kl_type={quoted(settings.kl_type)}", *strength]
    estimator = settings.kl_type.removeprefix(STOCK_PREFIX)
    if estimator == "k1":  # as a loss it has no gradient but noise
        return [
            "algorithm.use_kl_in_reward=True",
            "algorithm.kl_penalty=k1",
            f"algorithm.kl_ctrl.kl_coef={coef!r}",
        ]
    return [
        "actor_rollout_ref.actor.use_kl_loss=True",
        f"actor_rollout_ref.actor.kl_loss_type={estimator}",
        f"actor_rollout_ref.actor.kl_loss_coef={coef!r}",
    ]


def command(
    settings: Settings, recipe: Recipe, model: Path | str, prompts: Path, trained: Path
) -> list[str]:
    """GRPO, everything on the same logical GPUs."""
    data = write_data(prompts, trained / "prompts.parquet")
    micro_batch = recipe.micro_batch
    worker = "actor_rollout_ref"
    options = {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": data,
        "data.val_files": data,
        "data.train_batch_size": recipe.prompts,
        "data.max_prompt_length": recipe.max_len - recipe.max_new_tokens,
        "data.max_response_length": recipe.max_new_tokens,
        "data.truncation": "left",
        "data.shuffle": False,
        "data.dataloader_num_workers": 0,
        "data.seed": settings.seed,
        "reward.custom_reward_function.path": reward.__file__,
        "reward.custom_reward_function.name": "compute_score",
        "reward.num_workers": 1,
        f"{worker}.model.path": model,
        f"{worker}.model.use_remove_padding": False,
        f"{worker}.model.enable_gradient_checkpointing": False,
        f"+{worker}.model.override_config.attn_implementation": "sdpa",
        f"{worker}.actor.strategy": "fsdp2",
        f"{worker}.actor.optim.lr": recipe.learning_rate,
        f"{worker}.actor.ppo_mini_batch_size": recipe.prompts // settings.updates,
        f"{worker}.actor.ppo_micro_batch_size_per_gpu": settings.train_micro_batch,
        f"{worker}.actor.checkpoint.save_contents": "[hf_model]",
        f"{worker}.rollout.name": "transformers_cpu",
        f"{worker}.rollout.n": recipe.samples,
        f"{worker}.rollout.seed": settings.seed,
        f"{worker}.rollout.tensor_model_parallel_size": 1,
        f"{worker}.rollout.agent.num_workers": 1,
        f"{worker}.rollout.log_prob_micro_batch_size_per_gpu": micro_batch,
        f"{worker}.rollout.free_cache_engine": False,
        f"{worker}.ref.log_prob_micro_batch_size_per_gpu": micro_batch,
        "trainer.device": "cpu",
        "trainer.nnodes": 1,
        "trainer.n_gpus_per_node": settings.ranks,
        "trainer.logger": "[console]",
        "trainer.total_epochs": 1,
        # The last step is saved whatever the frequency.
        "trainer.save_freq": settings.save_every or settings.steps,
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
        "trainer.default_local_dir": trained,
        "trainer.resume_mode": "disable",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        # Logical resources, in a Ray of this run's own; verl's bundles ask for several CPUs each.
        "+ray_kwargs.ray_init.address": "local",
        "ray_kwargs.ray_init.num_cpus": 16 * settings.ranks + 16,
        "++ray_kwargs.ray_init.num_gpus": settings.ranks,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init.object_store_memory": 256 * 2**20,
    }
    if is_older():
        for key in NEW_IN_0_9:
            del options[key]
        # The resource by which they ask Ray for their device.
        options["+ray_kwargs.ray_init.resources"] = f"{{cpu: {settings.ranks}}}"
    for role in ("actor", "ref"):
        options |= {
            f"{worker}.{role}.use_torch_compile": False,
            f"{worker}.{role}.fsdp_config.use_torch_compile": False,
            f"{worker}.{role}.fsdp_config.dtype": "float32",
            f"+{worker}.{role}.fsdp_config.mixed_precision.param_dtype": "fp32",
        }
    written = [f"{key}={value}" for key, value in options.items()]
    # Hydra keeps its own log beside the run's.
    own = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
    run = ["verl.trainer.main_ppo", *kl_overrides(settings), *written, *own]
    return [sys.executable, "-W", "ignore", "-m", *run]


def trained_policy(trained: Path, settings: Settings) -> Path:
    """Where the run leaves the policy, as a Hugging Face folder."""
    return saved_policy(trained, settings.steps)


def saved_policy(trained: Path, step: int) -> Path:
    """Where the run leaves the copy of a step, as `save_every` asks for it."""
    return trained / f"global_step_{step}" / "actor" / "huggingface"


def step_metrics(line: str) -> Metrics | None:
    """A step's metrics with its number under `step`; None for any other line."""
    if (match := STEP.search(line)) is None:
        return None
    metrics: Metrics = {"step": int(match[1])}
    for item in match[2].split(" - "):
        key, _, text = item.strip().rpartition(":")
        if (value := number(text)) is not None:
            metrics[key] = value
    for name, known in NAMES.items():
        found = [metrics[key] for key in known if key in metrics]
        if found:
            metrics[name] = found[0]
    return metrics
