"""The folder of a run's checkpoints: a second run there, the run ended, and what a resume finds.

Nothing of the controller or of the reference's identity is lost, and the log names what happened.
"""

from __future__ import annotations

import math
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

import klplug
from recipes.quickstart.settings import TINY
from tests.conftest import NAMED
from tests.faults.runs import RESUME, Checkpoint, running

pytestmark = pytest.mark.slow

# At the reference the logarithm of the coefficient falls by 0.2 of a step's answers over 1000.
FALL = 0.2 * TINY.prompts * TINY.samples / 1000
ON_EACH = pytest.mark.parametrize("ended", NAMED, indirect=True, scope="module")


@dataclass
class Ended:
    """A run that SIGTERM ended between its rollouts, and another that was tried on its folder."""

    host: str
    folder: Path
    coefs: list[float]  # as logged, step by step
    process: int
    status: int
    second_status: int
    second_log: str

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.newest(self.host, self.folder)

    def copied(self, folder: Path) -> Checkpoint:
        """Its folder, for a resume of its own."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Checkpoint.newest(self.host, folder)


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    host, folder = request.param, tmp_path_factory.mktemp(request.param)
    with running(host, folder) as first:
        first.wait_for_words(f"klplug {klplug.__version__}: ")
        with running(host, folder, kl_type="k2_as_loss", log="second.txt") as second:
            second_status = second.wait()
        first.wait_for_step(2)
        first.process.send_signal(signal.SIGTERM)
        status = first.wait()
    coefs = [metrics["klplug/kl_coef"] for metrics in first.steps]
    return Ended(host, folder, coefs, first.process.pid, status, second_status, second.text)


@ON_EACH
def test_a_second_run_on_the_folder_is_told_of_the_first(ended: Ended) -> None:
    assert ended.second_status == 2
    (error,) = [x for x in ended.second_log.splitlines() if x.startswith("klplug: error: ")]
    assert f"{ended.folder}/policy" in error
    assert f"another run saves its checkpoints there (process {ended.process} on " in error
    assert "k1_in_reward" in error and "k2_as_loss" not in error


@ON_EACH
def test_a_run_that_sigterm_ended_goes_on_with_its_coefficient(
    ended: Ended, tmp_path: Path
) -> None:
    assert ended.status != 0 and len(ended.coefs) == 2
    assert ended.coefs == [0.01, pytest.approx(0.01 * math.exp(-FALL), rel=1e-6)]
    checkpoint = ended.copied(tmp_path)
    assert checkpoint.kept["kl_type"] == "k1_in_reward" and checkpoint.kept["reference"]["weights"]
    # Of a run that was killed as it wrote.
    checkpoint.file.with_name("klplug.json.1.tmp").write_text("{")

    with running(ended.host, tmp_path, *RESUME[ended.host]) as resumed:
        assert resumed.wait() == 0
    assert [m["step"] for m in resumed.steps] == list(range(checkpoint.step + 1, 4))
    assert resumed.steps[0]["klplug/kl_coef"] == checkpoint.kept["value"]
    assert "WARNING: resuming" not in resumed.text


@ON_EACH
def test_a_state_that_was_cut_in_half_stops_a_resume(ended: Ended, tmp_path: Path) -> None:
    file = ended.copied(tmp_path).file
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with running(ended.host, tmp_path, *RESUME[ended.host]) as resumed:
        assert resumed.wait() != 0
    assert not resumed.steps
    said = {
        "openrlhf": [str(file.parents[1]), "failed finding central directory"],  # DeepSpeed's words
        "verl": [f"{file} is no whole JSON file", "delete the file"],
    }
    assert all(words in resumed.text for words in said[ended.host])
