"""make: alone it lists its targets, and nothing is made where it could not be."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("check", ROOT / "requirements" / "check.py")
assert _SPEC is not None and _SPEC.loader is not None
check = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check)


def make(*words: str) -> subprocess.CompletedProcess[str]:
    # As from a shell, and not from a make that runs the tests.
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, env=env)


def test_make_alone_lists_every_target_that_a_user_has() -> None:
    listed = re.findall(r"^make ([\w-]+) ", make().stdout, re.MULTILINE)
    named = " ".join(re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    inner = {
        "help",
        "test-core",
        "test-mathematics",
        "test-tools",
        "test-openrlhf",
        "test-verl",
        "test-cluster",
        "test-runs-openrlhf",
        "test-runs-verl",
        "test-runs-cluster",
        "$(1)",
    }
    assert set(listed) == set(named.split()) - inner
    assert make("help").stdout == make().stdout


def test_an_unknown_host_ends_make_before_anything_is_installed() -> None:
    done = make("quickstart", "HOST=openrlfh")
    assert done.returncode == 2 and not done.stdout
    assert "HOST=openrlfh: there is openrlhf and verl" in done.stderr


@pytest.mark.parametrize("host", ["openrlhf", "verl"])
def test_a_grid_is_made_in_its_hosts_environment(host: str) -> None:
    planned = make("-n", "reproduce", "GRID=mine.yaml", f"HOST={host}").stdout.splitlines()
    words = " ".join(planned[-2:]).replace("\\", " ").split()
    python = f".venv-{host}/bin/python"
    assert words[1:] == [python, "-m", "recipes.reproduce", "mine.yaml"]


@pytest.mark.parametrize(
    ("version", "free", "words"),
    [
        ((3, 11), 7.0, []),
        ((3, 10), 7.0, ["this is Python 3.10", "make PYTHON=python3.11"]),
        ((3, 13), 7.0, ["this is Python 3.13", "make PYTHON=python3.11"]),
        ((3, 11), 5.9, ["5.9 GB are free here", "takes 6 GB"]),
    ],
)
def test_what_stands_in_an_environments_way(
    version: tuple[int, int], free: float, words: list[str]
) -> None:
    for host in ("openrlhf", "verl"):
        lock = (ROOT / "requirements" / f"{host}.txt").read_text()
        found = check.problems(lock, version, free, 6.0)
        assert len(found) == bool(words)
        assert all(word in found[0] for word in words)


def test_each_environment_is_checked_for_first() -> None:
    """What make would do from nothing: the check stands before the first installation."""
    planned = make("-n", "--always-make", ".venv-openrlhf").stdout.splitlines()
    first = next(i for i, line in enumerate(planned) if "pip install" in line or "-m venv" in line)
    assert "requirements/check.py requirements/openrlhf.txt . 6" in planned[first - 2]
