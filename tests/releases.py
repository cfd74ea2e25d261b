"""Other releases of a host than the installed one: their wheels, unpacked for tests to import.

A release whose wheel can't be had fails the test that asked for it: a host's tests run only where
``KLPLUG_TEST_HOSTS`` names it, and then all of them count.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEELS = Path(__file__).resolve().parents[1] / ".cache" / "wheels"


def release(host: str, version: str) -> Path:
    """The folder that holds ``host`` at ``version``, to put first on ``sys.path``.

    pip downloads the wheel once, without dependencies, from the registry it is configured for;
    those installed for the tested release have to do. Its metadata is unpacked too, so whatever
    asks for the host's version in a process that has the folder on its path gets this one.
    """
    folder = WHEELS / f"{host}-{version}"
    if folder.is_dir():
        return folder
    WHEELS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WHEELS) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*pip, "-d", scratch, f"{host}=={version}"], capture_output=True, text=True, timeout=300
        )
        if done.returncode != 0:
            raise RuntimeError(f"the wheel of {host} {version} can't be had:\n{done.stderr}")
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                # As pip installs it: what a wheel has under NAME.data/purelib belongs at the top.
                member.filename = re.sub(r"^[^/]+\.data/purelib/", "", member.filename)
                # Both hosts' wheels hold a top-level `tests` too, which would hide this one.
                if member.filename.startswith(host):
                    archive.extract(member, unpacked)
        try:
            unpacked.rename(folder)  # whole or not there, also for two runs at once
        except OSError:
            if not folder.is_dir():
                raise
    return folder
