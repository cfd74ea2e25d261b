"""The built wheel, and an environment that has ``klplug[cli]`` and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(out),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def declared(found: Distribution, extra: str = "") -> Iterator[Distribution]:
    """What ``found`` asks for, as it is installed here, with all that those ask for."""
    for text in found.requires or ():
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            yield distribution(needed.name)
            yield from declared(distribution(needed.name))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has ``klplug[cli]`` and what that declares, and nothing else."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (klplug,) = distributions(path=[str(site)])
    needed = {found.metadata["Name"]: found for found in declared(klplug, extra="cli")}
    for file in (file for found in needed.values() for file in found.files or ()):
        if ".." not in file.parts:  # a command, in bin
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), site / file)
    return home


def run(bare: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """That environment's Python, in its folder."""
    # Nothing of the checkout or of the caller's environment.
    return subprocess.run(
        [bare / "bin" / "python", "-I", *words], cwd=bare, env={}, capture_output=True, text=True
    )
