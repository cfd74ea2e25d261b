"""What goes wrong in a run of OpenRLHF's: see test_verl.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import RESUME, running

pytestmark = pytest.mark.slow


def test_openrlhf_whose_actor_is_killed_ends_and_goes_on_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    """SIGKILL to the policy's process in the middle of a run, as the kernel does out of memory."""
    with running("openrlhf", tmp_path) as run:
        run.wait_for_step(1)
        run.named("PolicyModelActor").kill()
        assert run.wait() != 0
        done = run.steps[-1]["step"]
        assert "PolicyModelActor" in run.text and "died" in run.text
        first = run.steps[0]["klplug/kl_coef"]
    assert first == 0.01 and done < 3

    with running("openrlhf", tmp_path, *RESUME["openrlhf"]) as run:
        assert run.wait() == 0
        assert run.steps[0]["step"] in (done, done + 1) and run.steps[-1]["step"] == 3
        assert run.steps[0]["klplug/kl_coef"] < 0.01
        assert "WARNING: resuming" not in run.text
