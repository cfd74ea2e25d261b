"""A folder of checkpoints is one run's at a time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from klplug.hosting.folder import LOCK, claim
from klplug.hosting.settings import SettingsError

# The child stands for a loader of data, which may outlive the run.
RUN = """
import os, sys, time
from klplug.hosting.folder import claim
claim(sys.argv[1], "", "k3_as_loss")
if os.fork():
    print("claimed", flush=True)
time.sleep(600)
"""


@contextmanager
def another_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", RUN, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, text=True, start_new_session=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "claimed\n"
        try:
            yield run
        finally:
            os.killpg(run.pid, signal.SIGKILL)


def test_a_folder_that_a_run_has_is_refused_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with another_run(folder) as run:
        for _ in range(2):
            with pytest.raises(SettingsError, match=re.escape("--out here: another run")) as told:
                claim(folder, "--out here", "k2_as_loss")
        assert f"process {run.pid} on " in str(told.value) and "k3_as_loss" in str(told.value)
        claim(tmp_path / "another", "--out there", "k2_as_loss")
        run.kill()
        run.wait()
        claim(folder, "--out here", "k2_as_loss")
    assert f"process {os.getpid()} on " in (folder / LOCK).read_text()


def test_a_folder_that_is_not_there_is_made_only_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    claim(folder, "--out", "k2_as_loss", make=False)
    assert not folder.exists()
    claim(folder, "--out", "k2_as_loss")
    assert (folder / LOCK).exists()


def test_where_nothing_can_be_written_the_host_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    claim(tmp_path / "file" / "checkpoints", "--out", "k2_as_loss")
