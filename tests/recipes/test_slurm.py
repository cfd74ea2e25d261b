"""The Slurm script: what `srun` would run, and what Ray's own `symmetric-run` makes of that."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.recipe import load

ON_NODE = {"SLURM_CPUS_ON_NODE": "3"}
ONCE = ["--ntasks-per-node=1", "--cpu-bind=none"]
SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm" / "recipe.sbatch"


def srun(folder: Path, nodes: int, *words: str) -> list[str]:
    """The words of the one `srun` of a job on 3 CPUs of a node, and Ray's variables."""
    (folder / "bin").mkdir()
    (folder / "bin" / "activate").write_text(f"PATH={folder}/bin:$PATH\n")
    fake = folder / "bin" / "srun"
    variables = '"$RAY_OVERRIDE_RESOURCES" "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN"'
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" {variables}\n')
    fake.chmod(0o755)
    hidden = ("RAY_", "SLURM_")
    own = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    done = subprocess.run(
        ["bash", str(SCRIPT), *words],
        env=own | {"VENV": str(folder), "SLURM_JOB_NUM_NODES": str(nodes)} | ON_NODE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize("host", ["openrlhf", "verl"])
def test_on_one_node_it_is_the_recipes_own_command_on_the_jobs_cpus(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    recipe = "smollm2-360m-gsm8k"
    assert host in load(recipe).hosts
    words = [host, recipe, "key=a b", "--flag"]
    command = ["python", "-m", f"recipes.{host}", recipe, "key=a b", "--flag"]
    *found, resources, mode, token = srun(tmp_path, 1, *words)
    assert (found, mode, token) == ([*ONCE, *command], "", "")
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", resources)
    spec = ResourceAndLabelSpec()
    spec.resolve(is_head=True, node_ip_address="127.0.0.1")
    assert spec.num_cpus == 3


def test_what_is_missing_is_named() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "verl"], capture_output=True, text=True)
    assert done.returncode == 1 and "the name of a recipe" in done.stderr


@pytest.mark.parametrize("host", ["openrlhf", "verl"])
def test_on_two_nodes_ray_starts_on_each_and_the_command_on_the_first(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.scripts import symmetric_run

    recipe = "qwen2.5-math-7b-openr1-math-2-nodes"
    assert load(recipe).nodes == 2
    found = srun(tmp_path, 2, host, recipe, "--flag")
    assert found[:2] == ONCE
    ray, *words, resources, mode, token = found[2:]
    assert json.loads(resources) == {"CPU": 3}
    assert (ray, mode) == ("ray", "token")
    assert len(token) == 32 and int(token, 16) > 0
    address = words[words.index("--address") + 1]
    own = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    assert address == f"{own[0]}:6379" and socket.inet_aton(own[0])

    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(symmetric_run.subprocess, "run", run)
    monkeypatch.setattr(symmetric_run, "check_ray_already_started", lambda: False)
    monkeypatch.setattr(symmetric_run, "check_cluster_ready", lambda nodes: nodes == 2)
    monkeypatch.setattr(symmetric_run, "check_head_node_ready", lambda address: True)
    monkeypatch.setattr(sys, "argv", ["ray", *words])
    symmetric_run.symmetric_run.main(words[1:], standalone_mode=False)
    start = ["ray", "start", "--head", f"--node-ip-address={own[0]}", "--port=6379"]
    command = ["python", "-m", f"recipes.{host}", recipe, "--flag"]
    assert ran == [start, command, ["ray", "stop"]]

    ran.clear()  # the other node, which has another address
    monkeypatch.setattr(symmetric_run.psutil, "net_if_addrs", dict)
    symmetric_run.symmetric_run.main(words[1:], standalone_mode=False)
    assert ran == [["ray", "start", "--address", address, "--block"], ["ray", "stop"]]
