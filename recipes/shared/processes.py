"""A host's processes: started apart from ours, ended with ours, every one of them."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from uuid import uuid4

import psutil

MARK = "KLPLUG_QUICKSTART_RUN"
PATIENCE = 5.0  # seconds between asking a process to end and ending it
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """For the case that no handler sees: the quickstart itself is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def raise_exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


class HostProcesses:
    """A run's processes, known by a mark in their environment that children inherit.

    Ray's daemons leave the session and lose their parent, so neither a process group nor a tree
    holds them all, and `ray stop` would end other people's as well.
    """

    def __init__(self) -> None:
        self.mark = uuid4().hex

    def __enter__(self) -> "HostProcesses":
        # A short path: Ray's sockets lie below it, and a socket's path has 107 characters at most.
        self.scratch = Path(tempfile.mkdtemp(prefix="klq-", dir="/tmp"))
        self.handlers = {
            number: signal.signal(number, raise_exit) for number in (signal.SIGTERM, signal.SIGHUP)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.end()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """The inherited environment, the given variables, the mark, and the run's own folders."""
        # A Ray address in the environment is another cluster's.
        inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        # vLLM leaves its sockets in TMPDIR.
        own = dict.fromkeys(("RAY_TMPDIR", "TMPDIR"), str(self.scratch))
        return inherited | dict(variables) | own | {MARK: self.mark}

    def start(
        self, command: list[str], environment: Mapping[str, str], folder: Path, log: Path
    ) -> subprocess.Popen[bytes]:
        """Start in a session of its own, so that Ctrl-C reaches us alone, output to the log."""
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                env=dict(environment),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def alive(self) -> list[psutil.Process]:
        """The marked processes and all below them.

        A Ray worker writes its title over its own environment, mark and all; its parent's stays.
        """
        marked = [process for process in psutil.process_iter() if self._is_marked(process)]
        found = dict.fromkeys(marked)
        for process in marked:
            with suppress(psutil.Error):
                found |= dict.fromkeys(process.children(recursive=True))
        return list(found)

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.pid != os.getpid() and process.environ().get(MARK) == self.mark
        except (psutil.Error, OSError):
            return False  # ended meanwhile, or another user's

    def end(self) -> None:
        """Ask all to end, then end those that are left, and those started in between."""
        found = self.alive()
        for process in found:
            with suppress(psutil.Error):
                process.terminate()
        _, left = psutil.wait_procs(found, timeout=PATIENCE)
        for _ in range(3):
            left = list(dict.fromkeys([*left, *self.alive()]))
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            _, left = psutil.wait_procs(left, timeout=PATIENCE)
