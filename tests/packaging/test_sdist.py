"""The source distribution: all of a checkout, so that quickstart and tests run from it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    return {name for name in listed.stdout.split("\0") if name}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tarfile.TarInfo]:
    out = tmp_path_factory.mktemp("sdist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "-s", "--no-isolation", "--outdir", out, ROOT],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2]: member for member in archive if member.isfile()}


def test_every_file_of_a_checkout_is_in_it(
    sdist: dict[str, tarfile.TarInfo], tracked: set[str]
) -> None:
    assert tracked - set(sdist) == {name for name in tracked if name.startswith(".ci/")}


def test_what_can_be_executed_still_can(
    sdist: dict[str, tarfile.TarInfo], tracked: set[str]
) -> None:
    executable = {name for name in tracked & set(sdist) if os.access(ROOT / name, os.X_OK)}
    assert "tests/face/walk_b.sh" in executable
    assert executable == {name for name in tracked & set(sdist) if sdist[name].mode & 0o100}


def test_nothing_that_was_made_is_in_it(sdist: dict[str, tarfile.TarInfo]) -> None:
    made = {".venv", ".venv-openrlhf", ".venv-verl", ".cache", "runs", "site", "__pycache__"}
    assert not [name for name in sdist if made & set(Path(name).parts)]
