"""The launcher of both hosts: `python -m recipes.openrlhf RECIPE`, `python -m recipes.verl RECIPE`.

A recipe is a file in `configs/`; `KL_TYPE`, `KL_COEF`, `MODEL`, `DATA`, `OUT` and `DRY_RUN` are
environment variables; what follows the recipe's name is given to the host as it is, and wins.
"""

import argparse
import os
import shlex
import symtable
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from recipes import cluster, estimates
from recipes.recipe import Recipe, Shape, checked, load, names, with_kl
from recipes.shared.folder import FolderError, claim
from recipes.shared.settings import SettingsError, is_folder

RECORD = "recipe.json"
VARIABLES = {
    "KL_TYPE": "any kl_type of klplug, or the host's own: stock:k1, stock:k2, stock:k3",
    "KL_COEF": "strength of the KL",
    "MODEL": "a Hugging Face folder, or a hub's name, instead of the recipe's",
    "DATA": "folder that python -m recipes.data wrote (default: data/HOST/DATA SET)",
    "OUT": "folder of the run (default: runs/HOST-RECIPE)",
    "DRY_RUN": "1: print the command, its estimates and what the host makes of it; start nothing",
}


def main(host: ModuleType, argv: list[str] | None = None) -> int:
    arguments, own = parser(host).parse_known_args(argv)
    if arguments.recipe is None:
        print("\n".join(name for name in names() if host.NAME in load(name).hosts))
        return 0
    try:
        launch(host, arguments.recipe, own, os.environ)
    except (SettingsError, FolderError) as error:
        print(f"recipes.{host.NAME}: error: {error}", file=sys.stderr)
        return 2
    return 0


def parser(host: ModuleType) -> argparse.ArgumentParser:
    variables = "\n".join(f"  {name:8} {text}" for name, text in VARIABLES.items())
    made = argparse.ArgumentParser(
        prog=f"python -m recipes.{host.NAME}",
        description="Train a recipe; without one, list them.",
        epilog=f"environment variables:\n{variables}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("recipe", nargs="?", help="a name from the list, or a .yaml file like them")
    return made


def launch(host: ModuleType, name: str, own: list[str], environment: Mapping[str, str]) -> None:
    """Becomes the host's process; with DRY_RUN, shows what it would be.

    Raises:
        SettingsError: Names what cannot be; nothing was loaded yet.
    """
    written = load(name)
    recipe = chosen(host, written, environment)
    data = Path(environment.get("DATA") or f"data/{host.NAME}/{recipe.data}").expanduser()
    out = Path(environment.get("OUT") or f"runs/{host.NAME}-{recipe.name}").expanduser()
    data, out = data.absolute(), out.absolute()  # the hosts' workers are elsewhere
    recipe = counted(host, recipe, data)
    words = [*host.command(recipe, data, out), *own]
    if environment.get("DRY_RUN", "0") not in ("", "0"):
        if recipe.model != written.model:
            recipe = sized(recipe, written.model)
        dry_run(host, recipe, words, data)
        return
    check_installed(host)
    check_data(host, recipe, data)
    check_reward(host, recipe)
    check_gpus(recipe)
    run = {"host": host.NAME, "recipe": asdict(recipe), "data": str(data), "own": own}
    claim(out, RECORD, run, f"OUT={out}", "run of a recipe")
    print(shlex.join(["python", "-m", *words]))
    print(rollouts(recipe), flush=True)
    os.execv(sys.executable, [sys.executable, "-m", *words])


def chosen(host: ModuleType, recipe: Recipe, environment: Mapping[str, str]) -> Recipe:
    """The recipe with what the variables say."""
    if host.NAME not in recipe.hosts:
        raise SettingsError(f"recipe {recipe.name} is for {', '.join(recipe.hosts)} only")
    coef = environment.get("KL_COEF") or None
    try:
        recipe = with_kl(recipe, environment.get("KL_TYPE") or None, coef and float(coef))
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"KL_COEF={coef}: must be a number") from error
    model = environment.get("MODEL")
    return with_model(recipe, model) if model else recipe


def counted(host: ModuleType, recipe: Recipe, data: Path) -> Recipe:
    """The recipe with the questions of the data that is there, if it is."""
    path = data / host.TRAIN_FILE
    if not path.is_file():
        return recipe
    if (rows := host.rows(path)) < recipe.prompts:
        raise SettingsError(
            f"{path} has {rows} questions, and a rollout of recipe {recipe.name} takes "
            f"{recipe.prompts}"
        )
    return replace(recipe, training_rows=rows)


def rollouts(recipe: Recipe) -> str:
    """What an episode takes of the data, and what it leaves."""
    return (
        f"{recipe.training_rows} questions: {recipe.questions // recipe.prompts} rollouts of "
        f"{recipe.prompts} an episode, {recipe.training_rows - recipe.questions} left out"
    )


def with_model(recipe: Recipe, model: str) -> Recipe:
    """The recipe with another model."""
    path = str(Path(model).expanduser().absolute()) if is_folder(model) else model
    return replace(recipe, model=path)


def sized(recipe: Recipe, of: str) -> Recipe:
    """The recipe with the sizes of its own model; as it is, and said, where they can't be had.

    Args:
        recipe: with a model of the user's.
        of: the model whose sizes it has.

    Raises:
        SettingsError: That model reads fewer tokens.
    """
    try:
        shape = shape_of(recipe.model)
    except (AttributeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        print(
            f"MODEL={recipe.model}: its configuration can't be had, so the estimates are those of "
            f"{of}. {reason}\n"
        )
        return recipe
    return checked(replace(recipe, shape=shape))


def shape_of(model: str) -> Shape:
    """A folder's sizes, or a hub's: by its configuration, and as a model without its weights.

    Raises:
        OSError: The hub cannot be reached, or has no such model.
        ValueError: A configuration that this transformers does not know, or of no language model.
        AttributeError: A configuration without one of the sizes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    return Shape(
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", 0),
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", text.num_attention_heads),
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        head_dim=getattr(text, "head_dim", None) or 0,
        parameters=sum(weight.numel() for weight in empty.parameters()),
    )


def check_installed(host: ModuleType) -> None:
    missing = [name for name in host.PACKAGES if find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"{sys.executable} has no {', '.join(missing)}: install {host.NAME}, and klplug with "
            "pip install '.[recipes]' from this checkout, into the same environment"
        )


def check_data(host: ModuleType, recipe: Recipe, data: Path) -> None:
    if not (data / host.TRAIN_FILE).is_file():
        raise SettingsError(
            f"{data / host.TRAIN_FILE} is not there. Make it: "
            f"python -m recipes.data {recipe.data} --to {host.NAME} --out {shlex.quote(str(data))}"
        )


def check_reward(host: ModuleType, recipe: Recipe) -> None:
    """A reward of the user's has the function that this host calls; it is not run."""
    if not recipe.reward:
        return
    table = symtable.symtable(Path(recipe.reward).read_text("utf-8"), recipe.reward, "exec")
    if host.REWARD not in table.get_identifiers():
        raise SettingsError(
            f"{recipe.reward} has no function {host.REWARD}, which {host.NAME} calls"
        )


def check_gpus(recipe: Recipe) -> None:
    """The GPUs must be there, said before anything is loaded: this node's, or the cluster's."""
    if recipe.nodes > 1:
        cluster.check(recipe)
        return
    import torch

    found = torch.cuda.device_count()
    if found < recipe.gpus_per_node:
        raise SettingsError(
            f"recipe {recipe.name} needs {recipe.gpus_per_node} GPUs of {recipe.gpu_gib} GB, and "
            f"this machine has {found}"
        )


def dry_run(host: ModuleType, recipe: Recipe, words: list[str], data: Path) -> None:
    """The command, the estimates, and the shared settings as the host itself reads them."""
    print(shlex.join(["python", "-m", *words]))
    print(f"\n{rollouts(recipe)}")
    print("\nmemory, estimated, not measured:")
    print("\n".join(f"  {line}" for line in estimates.memory(recipe, host.NAME)))
    print("\ndisk, estimated, not measured:")
    print(f"  {estimates.checkpoints(recipe, host.NAME)}")
    print("\ntime, estimated for H100s, not measured:")
    print("\n".join(f"  {line}" for line in estimates.time(recipe)), flush=True)
    check_installed(host)
    check_data(host, recipe, data)
    check_reward(host, recipe)
    read_back = host.common(host.compose(words))
    print(f"\nas {host.NAME} reads it:")
    print("\n".join(f"  {key:20} {value}" for key, value in read_back.items()))
