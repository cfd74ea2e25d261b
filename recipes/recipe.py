"""A recipe: one run in the words that both hosts share, from a file in `configs/`.

What both hosts have in common (batch sizes, sampling, learning rate, KL) is written once and
translated by `recipes.openrlhf.host` and `recipes.verl.host`. What only one of them knows is in
its section, in its own words.
"""

import difflib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from recipes.shared.files import from_yaml
from recipes.shared.settings import (
    HOSTS,
    SettingsError,
    canonical_kl_type,
    checked_kl_coef,
    checked_seed,
)

CONFIGS = Path(__file__).resolve().parent / "configs"
KEPT_CHECKPOINTS = 3


@dataclass(frozen=True)
class Shape:
    """What the estimates need of a model's config.json, by its names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    """The longest question and answer together."""
    tie_word_embeddings: bool = False
    head_dim: int = 0
    """0: hidden_size / num_attention_heads."""
    parameters: int = 0
    """0: those of a model of Llama's form."""

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Recipe:
    """A run; equal fields mean the same run on either host."""

    name: str
    model: str
    """A hub's name, or the path of a Hugging Face folder."""
    shape: Shape
    data: str
    """A data set of `recipes.data`."""
    prompts: int
    """Questions per rollout."""
    samples: int
    """Answers per question: GRPO's group."""
    updates: int
    """Optimiser steps per rollout."""
    micro_batch: int
    """Answers per GPU in one forward and backward pass; changes memory, not the gradient."""
    max_prompt_tokens: int
    max_new_tokens: int
    mean_new_tokens: int
    """Assumed, for the time estimate alone."""
    training_rows: int
    """Of the prepared data set, about; the launcher counts those that are there."""
    learning_rate: float
    kl_coef: float | None
    kl_type: str = "k2_as_loss"
    episodes: int = 1
    """Times through the data."""
    nodes: int = 1
    gpus_per_node: int = 1
    gpu_gib: int = 80
    """Memory that a GPU must have."""
    rollout_tensor_parallel: int = 1
    rollout_memory: float = 0.5
    """Share of a GPU that vLLM takes while it generates; it sleeps during training."""
    temperature: float = 1.0
    top_p: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip: float = 0.2
    """PPO's clip range, below and above 1."""
    dual_clip: float = 3.0
    seed: int = 42
    save_every: int = 50
    """Rollouts between two checkpoints."""
    reward: str = ""
    """A file with `reward_func` for OpenRLHF, `compute_score` for verl; "": shared/reward.py."""
    hosts: tuple[str, ...] = HOSTS
    template: Mapping[str, Any] = field(default_factory=dict)
    """What the model's chat template is told, on verl and when it is evaluated; OpenRLHF can't."""
    openrlhf: Mapping[str, Any] = field(default_factory=dict)
    verl: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def answers(self) -> int:
        """Per rollout."""
        return self.prompts * self.samples

    @property
    def questions(self) -> int:
        """In an episode. A short rollout at its end would not go evenly to GPUs and updates."""
        return self.training_rows // self.prompts * self.prompts

    @property
    def steps(self) -> int:
        """Rollouts in the whole run."""
        return self.episodes * self.questions // self.prompts

    def common(self) -> dict[str, Any]:
        """What must be equal on both hosts, as each of them reads its own configuration back."""
        return {
            "model": self.model,
            "gpus": self.gpus,
            "rollouts": self.steps,
            "prompts": self.prompts,
            "samples": self.samples,
            "answers_per_update": self.answers // self.updates,
            "micro_batch": self.micro_batch,
            "passes_over_rollout": 1,
            "episodes": self.episodes,
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "learning_rate": self.learning_rate,
            "schedule": "constant",
            "warmup": 0.0,
            "betas": self.betas,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "clip": (self.clip, self.clip),
            "dual_clip": self.dual_clip,
            "aggregation": "token-mean",
            "advantage": "group mean and standard deviation",
            "entropy": 0.0,
            "seed": self.seed,
            "kl_type": self.kl_type,
            "kl_coef": self.kl_coef,
        }


def names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    """A file's keys, with those of the files it includes; its own come last, and win."""
    own = from_yaml(path) or {}
    if not isinstance(own, dict):
        raise SettingsError(f"{path}: a mapping is needed, not {type(own).__name__}")
    merged: dict[str, Any] = {}
    included_names = own.pop("include", [])
    for name in [included_names] if isinstance(included_names, str) else included_names:
        included = CONFIGS / f"{name}.yaml"
        if not included.is_file():
            raise SettingsError(f"{path}: include {name!r}: there is no {included}")
        merged = joined(merged, read(included))
    if isinstance(own.get("reward"), str):  # beside the file that names it
        own["reward"] = str(path.parent.resolve() / own["reward"])
    return joined(merged, own)


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the second's values winning; sections (`shape`, `openrlhf`, `verl`) key by key."""
    sections = {
        key: {**first[key], **value}
        for key, value in second.items()
        if isinstance(value, dict) and isinstance(first.get(key), dict)
    }
    return {**first, **second, **sections}


def load(name: str) -> Recipe:
    """A recipe by its name in `configs/`, or by the path of a .yaml file.

    Raises:
        SettingsError: No such recipe, or a key or value that cannot be.
    """
    path = Path(name) if name.endswith(".yaml") else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise SettingsError(f"no recipe {name!r}.{hint} There are {', '.join(names())}")
    written = read(path)
    check_keys(written, Recipe, path)
    check_keys(written["shape"], Shape, path, "shape.")
    written["shape"] = Shape(**written["shape"])
    for key in ("betas", "hosts"):
        if key in written:
            written[key] = tuple(written[key])
    return checked(Recipe(**{**written, "name": path.stem}))


def check_keys(written: Any, kind: type, path: Path, prefix: str = "") -> None:
    """Every key is known and of its type, and none is missing."""
    if not isinstance(written, dict):
        raise SettingsError(f"{path}: {prefix.rstrip('.')} must be a mapping, not {written!r}")
    known = {f.name: f for f in fields(kind) if f.name != "name"}
    for key, value in written.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {prefix}{near[0]}?" if near else ""
            raise SettingsError(
                f"{path}: unknown key {prefix}{key}.{hint} Known: {', '.join(known)}. "
                "What only one host knows goes into its section, openrlhf or verl"
            )
        written[key] = of_type(value, known[key].type, f"{path}: {prefix}{key}")
    needed = (f for f in known.values() if f.default is f.default_factory is MISSING)
    missing = [f"{prefix}{f.name}" for f in needed if f.name not in written]
    if missing:
        raise SettingsError(f"{path}: missing: {', '.join(missing)}")


def of_type(value: Any, kind: Any, place: str) -> Any:
    """The value; a number that YAML takes for text, as it does 1e-6, made one.

    Raises:
        SettingsError: It is of another type.
    """
    if kind == float | None:
        return value if value is None else of_type(value, float, place)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    is_right = {
        float: False,
        int: type(value) is int,
        str: isinstance(value, str),
        Mapping[str, Any]: isinstance(value, dict),
    }
    if is_right.get(kind, True):
        return value
    needed = {int: "a whole number", float: "a number", str: "text"}.get(kind, "a mapping")
    raise SettingsError(f"{place}={value!r} must be {needed}")


def checked(recipe: Recipe) -> Recipe:
    """The recipe, its numbers fitting together.

    Raises:
        SettingsError: Names what does not fit.
    """
    where = f"recipe {recipe.name}"
    counts = ("prompts", "updates", "micro_batch", "episodes", "nodes", "gpus_per_node")
    for key in (*counts, "max_prompt_tokens", "max_new_tokens", "rollout_tensor_parallel"):
        if getattr(recipe, key) < 1:
            raise SettingsError(f"{where}: {key}={getattr(recipe, key)} must be at least 1")
    if recipe.samples < 2:
        raise SettingsError(f"{where}: samples={recipe.samples}: a group needs at least 2 answers")
    if recipe.prompts % recipe.updates:
        raise SettingsError(
            f"{where}: updates={recipe.updates} does not divide prompts={recipe.prompts}"
        )
    update = recipe.answers // recipe.updates
    if update % (recipe.gpus * recipe.micro_batch):
        raise SettingsError(
            f"{where}: an update's {update} answers do not go evenly to {recipe.gpus} GPUs in "
            f"micro-batches of {recipe.micro_batch}"
        )
    if recipe.gpus % recipe.rollout_tensor_parallel:
        raise SettingsError(
            f"{where}: rollout_tensor_parallel={recipe.rollout_tensor_parallel} does not divide "
            f"{recipe.gpus} GPUs"
        )
    longest = recipe.max_prompt_tokens + recipe.max_new_tokens
    if longest > recipe.shape.max_position_embeddings:
        raise SettingsError(
            f"{where}: max_prompt_tokens + max_new_tokens = {longest}, and {recipe.model} reads "
            f"{recipe.shape.max_position_embeddings} tokens"
        )
    if recipe.reward and not Path(recipe.reward).is_file():
        raise SettingsError(f"{where}: reward={recipe.reward}: no such file")
    checked_seed(recipe.seed)
    if recipe.temperature <= 0:
        raise SettingsError(f"{where}: temperature={recipe.temperature} must be above 0")
    if unknown := set(recipe.hosts) - set(HOSTS):
        raise SettingsError(f"{where}: hosts={sorted(unknown)}: there is {', '.join(HOSTS)}")
    return with_kl(recipe, recipe.kl_type, recipe.kl_coef)


def with_kl(recipe: Recipe, kl_type: str | None, kl_coef: float | None) -> Recipe:
    """The recipe with another KL; None keeps its own.

    Raises:
        SettingsError: Names the variable, its value and what is allowed.
    """
    canonical = canonical_kl_type(kl_type or recipe.kl_type)
    return replace(
        recipe, kl_type=canonical, kl_coef=checked_kl_coef(canonical, kl_coef, recipe.kl_coef)
    )
