"""What a user sets for a quickstart run, and what is checked before anything starts."""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes.shared.settings import (
    HOSTS,
    RUNS,
    STOCK,
    SettingsError,
    canonical_kl_type,
    check_model,
    checked_kl_coef,
    checked_seed,
)

HERE = Path(__file__).resolve().parent
NAMED_MODELS = ("tiny", "smollm2")


@dataclass(frozen=True)
class Recipe:
    """The sizes of a run, chosen with the size of the policy."""

    steps: int
    kl_coef: float
    learning_rate: float
    prompts: int
    """Questions per step."""
    samples: int
    """Answers per question: the group of GRPO."""
    max_new_tokens: int
    max_len: int
    """Question and answer together; a longer question loses its beginning."""
    micro_batch: int
    threads: int
    """Per process; a second one makes a tiny policy's matrices slower, not faster."""
    test_problems: int
    instruction: str = ""
    """Added to every question."""
    cut_off_reward: float | None = None
    """Of an answer that did not end in time, by an option of OpenRLHF; None: judged as it is."""


TINY = Recipe(
    steps=30,
    kl_coef=1e-2,
    learning_rate=2e-4,
    prompts=32,
    samples=8,
    max_new_tokens=48,
    max_len=256,
    micro_batch=32,
    threads=1,
    test_problems=500,
)
# Shows that a real model trains, in minutes on two cores. SmolLM2 solves next to no GSM8K problem
# and most of its answers are cut off: without the last two settings no group would have a spread,
# and no step a gradient.
LARGE = Recipe(
    steps=4,
    kl_coef=1e-2,
    learning_rate=1e-5,
    prompts=4,
    samples=8,
    max_new_tokens=64,
    max_len=512,
    micro_batch=4,
    threads=2,
    test_problems=16,
    instruction="\nAnswer with the number only.",
    cut_off_reward=-0.5,
)
# It is right on a third of `sums` from the start, so there is something to learn.
LARGE_SUMS = replace(
    LARGE,
    steps=30,
    prompts=2,
    max_new_tokens=32,
    max_len=128,
    test_problems=64,
    cut_off_reward=None,
)
TINY_WIDTH = 512


@dataclass(frozen=True)
class Settings:
    """A run; two runs with equal settings are repetitions of each other."""

    host: str
    kl_type: str
    kl_coef: float | None
    steps: int
    seed: int
    model: str
    data: str
    gsm8k: str | None
    ranks: int
    updates: int = 1
    save_every: int = 0
    """Steps between copies of the policy, for curves along the run; 0: at the end alone."""
    spike: float = 1.0
    """What the recipe's learning rate is multiplied by: the rate rises to that in the first 3 % of
    the updates, and then falls with the root of their number; 1: no change. OpenRLHF only."""

    @property
    def is_stock(self) -> bool:
        return self.kl_type in STOCK

    @cached_property
    def recipe(self) -> Recipe:
        return recipe_for(self.model, self.data)

    @property
    def train_micro_batch(self) -> int:
        """Answers of a backward pass on one rank; an update of fewer is one pass."""
        recipe = self.recipe
        return min(
            recipe.micro_batch, recipe.prompts * recipe.samples // (self.ranks * self.updates)
        )

    @property
    def default_out(self) -> Path:
        host = "" if self.host == "openrlhf" else f"-{self.host}"
        model = "" if self.model == "tiny" else f"-{Path(self.model).name}"
        return RUNS / f"quickstart{host}{model}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def settings(
    *,
    host: str = "openrlhf",
    kl_type: str = "k2_as_loss",
    kl_coef: float | None = None,
    steps: int | None = None,
    seed: int = 42,
    model: str = "tiny",
    data: str = "words",
    gsm8k: str | None = None,
    ranks: int = 1,
    updates: int = 1,
    save_every: int = 0,
    spike: float = 1.0,
) -> Settings:
    """Checked settings, with what was left out filled in from the recipe.

    Raises:
        SettingsError: Names the setting, its value, and what is allowed.
    """
    if host not in HOSTS:
        raise SettingsError(f"HOST={host}: there is {', '.join(HOSTS)}")
    canonical = canonical_kl_type(kl_type)
    if model not in NAMED_MODELS:
        check_model(model, f"{', '.join(NAMED_MODELS)}, ")
    recipe = recipe_for(model, data)
    steps = recipe.steps if steps is None else steps
    if steps < 1:
        raise SettingsError(f"STEPS={steps}: at least 1")
    answers = recipe.prompts * recipe.samples
    most = answers // recipe.micro_batch
    if ranks < 1 or most % ranks:
        raise SettingsError(
            f"RANKS={ranks}: a step's {answers} answers go to the ranks in batches of "
            f"{recipe.micro_batch}, so RANKS must be a divisor of {most}"
        )
    # verl cuts a step between questions, OpenRLHF between answers.
    parts, what = (recipe.prompts, "questions") if host == "verl" else (answers // ranks, "answers")
    if updates < 1 or parts % updates:
        raise SettingsError(
            f"UPDATES={updates}: a step's {parts} {what} are cut into equal updates, "
            f"so UPDATES must be a divisor of {parts}"
        )
    if save_every < 0:
        raise SettingsError(f"--save-every {save_every}: 0, the end alone, or steps above 0")
    if not (spike == 1 or (spike > 1 and math.isfinite(spike) and host == "openrlhf")):
        raise SettingsError(f"spike={spike:g}: 1, or on OpenRLHF a finite number above it")
    if gsm8k is not None and data != "gsm8k":
        raise SettingsError(f"GSM8K={gsm8k} is read with DATA=gsm8k only, not with DATA={data}")
    coef = checked_kl_coef(canonical, kl_coef, recipe.kl_coef)
    made = Settings(
        *(host, canonical, coef, steps, checked_seed(seed), model, data, gsm8k, ranks, updates),
        *(save_every, spike),
    )
    check_data(made)
    return made


def recipe_for(model: str, data: str) -> Recipe:
    large = LARGE_SUMS if data == "sums" else LARGE
    if model in NAMED_MODELS:
        return TINY if model == "tiny" else large
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(Path(model).expanduser() if Path(model).is_dir() else model)
    return TINY if config.get_text_config().hidden_size < TINY_WIDTH else large


def check_data(made: Settings) -> None:
    """Both splits are there, in the form, and enough for the evaluation and a step."""
    from recipes.quickstart.data import MADE, load_problems

    if made.data in MADE:
        return
    try:
        for split in ("train", "test"):
            load_problems(made.data, split, gsm8k_path=made.gsm8k)
    except (FileNotFoundError, ValueError) as error:
        raise SettingsError(f"DATA={made.data}: {error}") from error
