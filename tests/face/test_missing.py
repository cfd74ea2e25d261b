"""What is not installed is said in a line, by everything that a user starts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import recipes

ROOT = Path(__file__).parents[2]
STARTED = (
    *("recipes.data", "recipes.evaluate", "recipes.openrlhf.__main__", "recipes.verl.__main__"),
    *("recipes.quickstart.__main__", "recipes.reproduce.__main__"),
)


@pytest.mark.parametrize("module", STARTED)
def test_a_recipe_without_its_extra_says_what_to_install(module: str) -> None:
    """As python -m starts it: while it imports the package, the first word is -m."""
    lost = "{'math_verify': None, 'psutil': None, 'yaml': None}"
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            f"import sys; sys.argv = ['-m']; sys.modules.update({lost}); import {module}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("recipes: error: there is no module ")
    assert "pip install '.[recipes]'" in line


def test_the_extra_is_what_pyproject_says() -> None:
    written = {
        line.partition(">")[0].replace("-", "_").replace("pyyaml", "yaml")
        for line in importlib.metadata.requires("klplug") or ()
        if "extra" not in line or "extra == 'recipes'" in line.replace('"', "'")
    }
    assert written == recipes.EXTRA


def test_any_other_error_keeps_its_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['-m']; import recipes; import no_such"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "Traceback" in done.stderr and "no_such" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("openrlhf") is not None, reason="it is installed")
def test_the_launcher_without_its_host() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "klplug_openrlhf", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("klplug: error: openrlhf is not installed for ")
