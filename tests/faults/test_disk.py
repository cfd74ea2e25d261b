"""A disk that is full when a checkpoint is saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from recipes.quickstart.settings import TINY
from tests.conftest import NAMED
from tests.faults.runs import LATEST, RESUME, running, running_on_a_full_disk

# At the reference the logarithm of the coefficient falls by 0.2 of a step's answers over 1000.
FALL = 0.2 * TINY.prompts * TINY.samples / 1000


@pytest.mark.slow
@pytest.mark.parametrize("host", NAMED)
def test_a_full_disk_ends_the_run_and_a_resume_goes_on_from_the_checkpoint_before(
    host: str, tmp_path: Path
) -> None:
    with running_on_a_full_disk(host, tmp_path) as run:
        assert run.wait() != 0
        assert run.steps[0]["klplug/kl_coef"] == 0.01 and run.steps[-1]["step"] < 3
        said = run.text
    assert (tmp_path / LATEST[host]).read_text().removeprefix("global_step") == "1"
    if host == "openrlhf":  # torch says of a full disk that its stream failed
        assert "PolicyModelActor.save_checkpoint" in said and "iostream error" in said
    else:  # the file is klplug's own
        assert "klplug can't save the state of its controller: No space left" in said
        before, cut = (tmp_path / "policy" / f"global_step_{i}" / "klplug.json" for i in (1, 2))
        assert json.loads(before.read_text())["reference"]["weights"] and not cut.exists()

    with running(host, tmp_path, *RESUME[host]) as run:
        assert run.wait() == 0
        assert [m["step"] for m in run.steps] == [2, 3]
        assert run.steps[0]["klplug/kl_coef"] == pytest.approx(0.01 * math.exp(-FALL), rel=1e-6)
        assert "WARNING: resuming" not in run.text
