"""How the GPU recipes are brought to a machine: image, locks, Slurm. No engine runs them here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from klplug.hosting.host import hosts
from tests.locks import pins

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "recipes" / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
HOSTS = hosts()


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    broken = DOCKERFILE.read_text().replace("--no-install-recommends ", "")
    done = subprocess.run([hadolint, "-"], input=broken, capture_output=True, text=True)
    assert done.returncode == 1 and "DL3015" in done.stdout


@pytest.mark.parametrize("name", HOSTS)
def test_the_lock_has_the_release_that_klplug_is_tested_with(name: str) -> None:
    locked = pins(name)
    assert locked[name] == HOSTS[name].tested[0]
    asked = (DOCKER / f"{name}.in").read_text()
    assert asked.startswith(f"{name}[vllm") and f"]=={locked[name]}\n" in asked
    # Torch, its libraries and the compiler are of one CUDA.
    assert {"nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= locked.keys()
    assert not [pin for pin, version in locked.items() if "+" in version]  # PyPI's own builds
    assert f"nvidia/cuda:{locked['cuda-toolkit'][:4]}." in DOCKERFILE.read_text()


@pytest.mark.parametrize("name", HOSTS)
def test_the_page_has_the_locks_versions(name: str) -> None:
    page = (ROOT / "recipes" / "README.md").read_text("utf-8")
    (row,) = re.findall(rf"^\| `{name}\.txt`: (.*) \|$", page, re.MULTILINE)
    release, python, cuda, *others = row.split(" | ")
    locked = pins(name)
    assert release == f"{HOSTS[name].title} {locked[name]}"
    head = (DOCKER / f"{name}.txt").read_text().splitlines()[0]
    assert f"Python {python}, CUDA {cuda}" in head
    names = ("torch", "vllm", "flash-attn", "transformers", "ray")
    assert others == [locked[name] for name in names]
    assert f"flash-attn=={locked['flash-attn']} " in page


def test_klplug_can_be_built_from_what_the_image_is_given(tmp_path: Path) -> None:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for path in (line[1:] for line in lines if line.startswith("!")):
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        (tmp_path / path).parent.mkdir(exist_ok=True)
        copy(ROOT / path, tmp_path / path)
    command = [sys.executable, "-m", "build", "-w", "--no-isolation", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "recipes" / "docker" / "Dockerfile").is_file()


def test_shellcheck_finds_nothing_in_the_slurm_script() -> None:
    script = ROOT / "recipes" / "slurm" / "recipe.sbatch"
    shellcheck = Path(sys.executable).parent / "shellcheck"
    for command in ([shellcheck, script], ["bash", "-n", script]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    broken = script.read_text().replace('"${command[@]}"\n', "${command[@]}\n")
    done = subprocess.run([shellcheck, "-"], input=broken, capture_output=True, text=True)
    assert done.returncode == 1 and "SC2068" in done.stdout
