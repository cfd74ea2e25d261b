"""A grid of runs, read from a YAML file and checked whole before its first run.

    seeds: [1, 2, 3]
    runs:                                    # blocks, made in this order
      - {kl_type: [none, k2_as_loss], kl_coef: [0.1, 0.5], updates: 4}

With `recipe:` in the place of model, data and steps the runs are those of a GPU recipe.
In a block every value of a list is combined with every other, seed by seed: all of seed 1, then
all of seed 2. So an unfinished block holds whole seeds.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from recipes.quickstart.settings import Settings, settings
from recipes.reproduce.gpu import GpuRun
from recipes.shared.settings import HOSTS, SettingsError

HERE = Path(__file__).resolve().parent
GRIDS = HERE / "grids"

SHARED = {"host": "openrlhf", "model": "tiny", "data": "words", "steps": None, "save_every": 0}
GPU = ("recipe", "host")
MEASURED = {"problems": 500, "samples": 16}
VARIED = ("kl_type", "kl_coef", "updates", "seeds")


class GridError(ValueError):
    """The grid cannot be; the message is all one needs."""


@dataclass(frozen=True)
class Grid:
    """What is run, and what is measured of each run's policy."""

    name: str
    runs: tuple[Settings, ...] | tuple[GpuRun, ...]
    """In the order in which they are made."""
    problems: int
    """Held-out problems of each evaluation."""
    samples: int
    """Sampled answers to each at the end of a run."""


def load(name: str) -> Grid:
    """A grid by its name in `grids/`, or by the path of a .yaml file.

    Raises:
        GridError: No such file, or a key or value that cannot be; no run was made.
    """
    path = Path(name) if name.endswith(".yaml") else GRIDS / f"{name}.yaml"
    if not path.is_file():
        there = sorted(found.stem for found in GRIDS.glob("*.yaml"))
        raise GridError(f"no grid {name!r}: there are {', '.join(there)}, or a .yaml file")
    try:
        written = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise GridError(f"{path}: not YAML: {error}") from error
    is_gpu = isinstance(written, Mapping) and "recipe" in written
    check_keys(written, (*(GPU if is_gpu else SHARED), *MEASURED, "seeds", "runs"), str(path))
    measured = {key: written.get(key, default) for key, default in MEASURED.items()}
    for key, value in measured.items():
        check_count(value, f"{path}: {key}")
    blocks = written.get("runs")
    if not isinstance(blocks, list) or not blocks:
        raise GridError(f"{path}: runs must be a list of blocks, not {blocks!r}")
    shared = {key: written.get(key, default) for key, default in SHARED.items()}
    if is_gpu:
        shared = {"host": shared["host"], "base": written["recipe"]}
    runs = [
        run
        for number, block in enumerate(blocks, start=1)
        for run in block_runs(block, shared, written.get("seeds"), f"{path}: block {number}")
    ]
    return Grid(path.stem, tuple(dict.fromkeys(runs)), **measured)


def block_runs(
    block: Any, shared: dict[str, Any], seeds: Any, where: str
) -> Iterator[Settings | GpuRun]:
    """The runs of one block, each checked as its own launcher checks it."""
    check_keys(block, VARIED, where)
    if "kl_type" not in block:
        raise GridError(f"{where}: no kl_type")
    seeds = listed(block.get("seeds", seeds))
    for seed in seeds:
        if type(seed) is not int:
            raise GridError(f"{where}: seeds={seeds}: whole numbers are needed")
    coefs, updates = listed(block.get("kl_coef")), listed(block.get("updates", 1))
    for count in updates:
        check_count(count, f"{where}: updates")
    for seed, count, coef, kl_type in product(seeds, updates, coefs, listed(block["kl_type"])):
        # Without KL there is one run, whatever the coefficients.
        coef = None if kl_type == "none" or coef is None else number(coef, where)
        varied = {"kl_type": kl_type, "kl_coef": coef, "updates": count, "seed": seed}
        try:
            yield gpu_run(**shared, **varied) if "base" in shared else settings(**shared, **varied)
        except SettingsError as error:
            raise GridError(f"{where}: {error}") from error


def gpu_run(host: str, base: str, **varied: Any) -> GpuRun:
    if host not in HOSTS:
        raise SettingsError(f"host={host}: there is {', '.join(HOSTS)}")
    asked = GpuRun(host, base, **varied)
    recipe = asked.recipe
    if host not in recipe.hosts:
        raise SettingsError(f"recipe {base} is for {', '.join(recipe.hosts)} only")
    return replace(asked, kl_type=recipe.kl_type, kl_coef=recipe.kl_coef)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise GridError(f"{where}: kl_coef={value!r} must be a number")
    return float(value)


def check_count(value: Any, where: str) -> None:
    if type(value) is not int or value < 1:
        raise GridError(f"{where}={value!r} must be a whole number of at least 1")


def check_keys(written: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(written, Mapping):
        raise GridError(f"{where}: a mapping is needed, not {type(written).__name__}")
    for key in written:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise GridError(f"{where}: unknown key {key}.{hint} Known: {', '.join(known)}")
