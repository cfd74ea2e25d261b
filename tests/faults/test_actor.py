"""An actor that is killed in the middle of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import NAMED
from tests.faults.runs import RESUME, Checkpoint, running

# The process that trains the policy.
ACTOR = {"openrlhf": "PolicyModelActor", "verl": "WorkerDict"}


@pytest.mark.slow
@pytest.mark.parametrize("host", NAMED)
def test_a_run_whose_actor_is_killed_ends_and_goes_on_from_its_checkpoint(
    host: str, tmp_path: Path
) -> None:
    """SIGKILL, as the kernel sends it where memory is out."""
    with running(host, tmp_path) as run:
        run.wait_for_step(1)
        run.wait_for_a_checkpoint()  # on OpenRLHF it comes after the step's line
        run.named(ACTOR[host]).kill()
        assert run.wait() != 0
        assert ACTOR[host] in run.text and "died" in run.text
        assert run.steps[0]["klplug/kl_coef"] == 0.01 and run.steps[-1]["step"] < 3
    checkpoint = Checkpoint.newest(host, tmp_path)

    with running(host, tmp_path, *RESUME[host]) as run:
        assert run.wait() == 0
        assert [m["step"] for m in run.steps] == list(range(checkpoint.step + 1, 4))
        assert run.steps[0]["klplug/kl_coef"] == checkpoint.kept["value"]
        assert "WARNING: resuming" not in run.text
