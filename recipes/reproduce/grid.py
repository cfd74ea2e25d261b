"""A grid of runs, read from a YAML file and checked whole before its first run.

    seeds: [1, 2, 3]
    runs:                                    # blocks, made in this order
      - {kl_type: [none, k2_as_loss], kl_coef: [0.1, 0.5], updates: 4}

With `recipe:` in the place of model, data and steps the runs are those of a GPU recipe.
In a block every value of a list is combined with every other. All of seed 1 comes first, then all
of seed 2. So an unfinished block holds whole seeds.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from recipes.quickstart.data import load_problems
from recipes.quickstart.settings import Settings, settings
from recipes.recipe import of_type
from recipes.reproduce.gpu import GpuRun
from recipes.shared.files import from_yaml
from recipes.shared.settings import HOSTS, WITHOUT_COEF, SettingsError, canonical_kl_type

HERE = Path(__file__).resolve().parent
GRIDS = HERE / "grids"

SHARED = {
    **{"host": "openrlhf", "model": "tiny", "data": "words"},
    **{"steps": None, "save_every": 0, "spike": 1.0},
}
GPU = ("recipe", "host")
TYPES = {"steps": int, "save_every": int, "spike": float}  # of the shared keys; the others are text
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
        return read(path)
    except SettingsError as error:
        raise GridError(str(error)) from error


def read(path: Path) -> Grid:
    """The grid of a file.

    Raises:
        GridError, SettingsError: A key or value that cannot be.
    """
    written = from_yaml(path)
    is_gpu = isinstance(written, Mapping) and "recipe" in written
    check_keys(written, (*(GPU if is_gpu else SHARED), *MEASURED, "seeds", "runs"), str(path))
    measured = {key: written.get(key, default) for key, default in MEASURED.items()}
    for key, value in measured.items():
        check_count(value, f"{path}: {key}")
    blocks = written.get("runs")
    if not isinstance(blocks, list) or not blocks:
        raise GridError(f"{path}: runs must be a list of blocks, not {blocks!r}")
    named = {
        key: of_type(written[key], TYPES.get(key, str), f"{path}: {key}")
        for key in (*GPU, *SHARED)
        if key in written
    }
    shared = {**SHARED, **named}
    if is_gpu:
        shared = {"host": shared["host"], "base": named["recipe"]}
    runs = [
        run
        for number, block in enumerate(blocks, start=1)
        for run in block_runs(block, shared, written.get("seeds"), f"{path}: block {number}")
    ]
    if not is_gpu:
        check_problems(shared["data"], measured["problems"], f"{path}: problems")
    return Grid(path.stem, tuple(dict.fromkeys(runs)), **measured)


def block_runs(
    block: Any, shared: dict[str, Any], seeds: Any, where: str
) -> Iterator[Settings | GpuRun]:
    """The runs of one block, each checked as its own launcher checks it.

    Raises:
        GridError: A key or value that cannot be, a value that is there twice.
        SettingsError: A value of another type.
    """
    check_keys(block, VARIED, where)
    if "kl_type" not in block:
        raise GridError(f"{where}: no kl_type")
    seeds = block.get("seeds", seeds)
    if seeds is None:
        raise GridError(f"{where}: no seeds")
    seeds = listed(seeds, int, f"{where}: seeds")
    updates = listed(block.get("updates", 1), int, f"{where}: updates")
    for count in updates:
        check_count(count, f"{where}: updates")
    coefs = [None]
    if "kl_coef" in block:
        coefs = listed(block["kl_coef"], float, f"{where}: kl_coef")
    names = listed(block["kl_type"], str, f"{where}: kl_type")
    try:
        kl_types = once(map(canonical_kl_type, names), f"{where}: kl_type")
        for seed, count, coef, kl_type in product(seeds, updates, coefs, kl_types):
            # Without KL there is one run, whatever the coefficients.
            coef = None if kl_type in WITHOUT_COEF else coef
            varied = {"kl_type": kl_type, "kl_coef": coef, "updates": count, "seed": seed}
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


def listed(written: Any, kind: type, where: str) -> list[Any]:
    """The values of a key, one or a list of them, each of its type and there once."""
    values = written if isinstance(written, list) else [written]
    if not values:
        raise GridError(f"{where}=[]: at least one value is needed")
    return once((of_type(value, kind, where) for value in values), where)


def once(values: Iterable[Any], where: str) -> list[Any]:
    values = list(values)
    if twice := [value for value in values if values.count(value) > 1]:
        raise GridError(f"{where}: {twice[0]} is there twice")
    return values


def check_problems(data: str, asked: int, where: str) -> None:
    """As many are held out as are asked for; of `words` there is no end."""
    if data != "words" and (there := len(load_problems(data, "test"))) < asked:
        raise GridError(f"{where}={asked}: {data} has {there} that are held out")


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
