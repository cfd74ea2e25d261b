"""What goes wrong in a run of verl's that someone waits for: how it ends, and what is left of it.

Nothing of the controller is lost, and the last lines of the log name what happened.
"""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest

from recipes.quickstart.settings import TINY
from tests.faults.runs import RESUME, running

pytestmark = pytest.mark.slow

# At the reference the logarithm of the coefficient falls by 0.2 of a step's answers over 1000.
FALL = 0.2 * TINY.prompts * TINY.samples / 1000


def test_verl_ended_between_rollouts_goes_on_with_its_coefficient(tmp_path: Path) -> None:
    """SIGTERM to the command; then a resume, one with a file cut in half, one with its temporary
    file left behind."""
    with running("verl", tmp_path) as run:
        run.wait_for_step(2)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() != 0
        saved = {m["step"]: m["klplug/kl_coef"] for m in run.steps}
    assert saved[2] == pytest.approx(0.01 * math.exp(-FALL), rel=1e-6)

    last = int((tmp_path / "policy" / "latest_checkpointed_iteration.txt").read_text())
    state = tmp_path / "policy" / f"global_step_{last}" / "klplug.json"
    kept = json.loads(state.read_text())
    assert kept["reference"]["weights"] is not None
    (state.parent / "klplug.json.1.tmp").write_text("{")  # of a run that was killed as it wrote
    whole = state.read_text()

    state.write_text(whole[: len(whole) // 2])
    with running("verl", tmp_path, *RESUME["verl"]) as run:
        assert run.wait() != 0
        assert not run.steps
        assert f"{state} is no whole JSON file" in run.text and "delete the file" in run.text

    state.write_text(whole)
    with running("verl", tmp_path, *RESUME["verl"], steps=last + 1) as run:
        assert run.wait() == 0
        assert [m["step"] for m in run.steps] == [last + 1]
        assert run.steps[0]["klplug/kl_coef"] == pytest.approx(kept["value"], rel=1e-6)
        assert "WARNING: resuming" not in run.text


def test_two_runs_of_verl_on_one_folder_leave_a_whole_state(tmp_path: Path) -> None:
    """Nothing keeps a user from it: both go on, and what each checkpoint keeps is one of theirs."""
    kl_types = ("k1_in_reward", "k2_as_loss")
    with (
        running("verl", tmp_path, kl_type=kl_types[0], steps=2) as one,
        running("verl", tmp_path, kl_type=kl_types[1], steps=2, log="other.txt") as other,
    ):
        assert [one.wait(), other.wait()] == [0, 0]
        assert [[m["step"] for m in run.steps] for run in (one, other)] == [[1, 2], [1, 2]]
    for step in (1, 2):
        folder = tmp_path / "policy" / f"global_step_{step}"
        kept = json.loads((folder / "klplug.json").read_text())
        assert kept["kl_type"] in kl_types and kept["reference"]["weights"]
        assert kept["value"] == pytest.approx(0.01 * math.exp(-FALL), rel=0.06)
        assert not list(folder.glob("klplug.json.*"))
