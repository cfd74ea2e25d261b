"""The folder that a run saves its checkpoints in: one run's at a time."""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path

from klplug.hosting.settings import SettingsError

LOCK = "klplug.lock"


def claim(folder: str | Path, named: str, kl_type: object, make: bool = True) -> None:
    """Keep other runs from this folder for as long as this process lives, however it ends.

    The checkpoints of two would be mixed: a policy of one beside a coefficient of the other.
    Nothing is claimed where this machine can't write, or where files have no locks.

    Args:
        named: the setting as a user writes it, for the message.
        kl_type: of this run, for the message to another.
        make: the folder if need be. Else one that is not there is left alone: no run has it yet,
            and the host may still refuse this one.

    Raises:
        SettingsError: names the folder, the run that has it, and what to do.
    """
    path = Path(folder) / LOCK
    if not make and not path.parent.is_dir():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # left open: closed, it is let go
    except OSError:
        return
    try:
        # Not flock: what a run forks, and what outlives it, would hold that on.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {platform.node()}, {kl_type}\n".encode())
    except (BlockingIOError, PermissionError):
        other = os.read(file, 1000).decode(errors="replace").strip()
        os.close(file)
        raise SettingsError(
            f"{named}: another run saves its checkpoints there ({other}), and those of two would "
            f"be mixed. Give this run a folder of its own; if that one is gone, delete {path}"
        ) from None
    except OSError:
        os.close(file)
