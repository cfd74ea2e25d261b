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
from tests.faults.runs import LATEST, RESUME, running, verl_on_a_full_disk

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


def test_verl_on_a_full_disk_names_the_file_and_goes_on_from_the_checkpoint_before(
    tmp_path: Path,
) -> None:
    with verl_on_a_full_disk(tmp_path) as run:
        assert run.wait() != 0
        assert run.steps[0]["klplug/kl_coef"] == 0.01 and run.steps[-1]["step"] < 3
        assert "klplug can't save the state of its controller: No space left" in run.text
    assert (tmp_path / LATEST).read_text() == "1"
    before, cut = (tmp_path / "policy" / f"global_step_{i}" / "klplug.json" for i in (1, 2))
    assert json.loads(before.read_text())["reference"]["weights"] and not cut.exists()

    with running("verl", tmp_path, *RESUME["verl"]) as run:
        assert run.wait() == 0
        assert [m["step"] for m in run.steps] == [2, 3]
        assert run.steps[0]["klplug/kl_coef"] == pytest.approx(0.01 * math.exp(-FALL), rel=1e-6)
        assert "WARNING: resuming" not in run.text
