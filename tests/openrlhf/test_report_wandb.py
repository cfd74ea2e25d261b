"""An offline W&B run, as W&B itself writes it, read for a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from klplug.report.logs import Log, read

STEPS = 400  # over 32 KiB, so that records are split between blocks

WRITER = f"""
import wandb
run = wandb.init(project="p", mode="offline", config={{"klplug": {{"kl_type": "k2_as_loss"}}}})
for step in range(1, {STEPS} + 1):
    run.log({{"train/reward": 0.1 * step, "train/text": "x" * 200, "train/global_step": 10 * step}})
run.finish()
"""


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    environment = {**os.environ, "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", WRITER], env=environment, check=True, timeout=120)
    return next(folder.glob("wandb/offline-run-*/*.wandb"))


def test_every_scalar_at_the_hosts_step(offline_run: Path) -> None:
    log = Log()
    read(offline_run, log)
    assert log.problems == []
    assert log.scalars["train/reward"] == pytest.approx(
        {10 * step: 0.1 * step for step in range(1, STEPS + 1)}
    )
    assert log.config["klplug"] == {"kl_type": "k2_as_loss"}


@pytest.mark.parametrize("harm", ["torn", "corrupt"])
def test_a_harmed_file_gives_what_is_before(offline_run: Path, tmp_path: Path, harm: str) -> None:
    data = bytearray(offline_run.read_bytes())
    assert len(data) > 32768
    if harm == "torn":
        data = data[: len(data) * 3 // 4]
    else:
        data[len(data) // 2] ^= 0xFF
    path = tmp_path / "run-x.wandb"
    path.write_bytes(data)
    log = Log()
    read(path, log)
    assert 0 < len(log.scalars["train/reward"]) < STEPS
    assert any("torn or corrupt" in problem for problem in log.problems), json.dumps(log.problems)
