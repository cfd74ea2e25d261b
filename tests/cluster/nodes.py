"""Ray nodes on this machine, each with an environment and an address of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from recipes import cpu_shim
from recipes.shared.processes import HostProcesses

ROOT = Path(__file__).resolve().parents[2]
HEAD, SECOND = "127.0.0.2", "127.0.0.3"
WITH_KLPLUG = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")])}


def on_cpu(host: str, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables, and the stand-ins without which the host's modules don't import."""
    variables = dict(variables or {})
    path = [str(cpu_shim.HERE / "startup"), *filter(None, [variables.get("PYTHONPATH")])]
    return cpu_shim.environment(host) | variables | {"PYTHONPATH": os.pathsep.join(path)}


def environment_without_klplug(folder: Path) -> str:
    """The Python of an environment that has everything this one has, but for klplug."""
    venv.create(folder, symlinks=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    there = Path(sysconfig.get_path("purelib", vars=paths))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "klplug" not in entry.name:
            (there / entry.name).symlink_to(entry)
    return str(folder / "bin" / "python")


class Cluster:
    """A head, from this environment, and nodes that join it: `ray start`, as users call it."""

    def __init__(
        self, processes: HostProcesses, variables: Mapping[str, str] = WITH_KLPLUG, *words: str
    ) -> None:
        self.processes = processes
        self.scratch = processes.scratch
        with socket.socket() as free:
            free.bind((HEAD, 0))
            self.address = f"{HEAD}:{free.getsockname()[1]}"
        # Ray 2.60 asks for a token wherever one lies in the home folder; this one is the test's.
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid4().hex, "OMP_NUM_THREADS": "1"}
        environment = processes.environment(own)
        # What the tests' own process sees is not what a node sees.
        hidden = ("PYTHONPATH", "KLPLUG_DISABLE", "VERL_USE")
        self.environment = {k: v for k, v in environment.items() if not k.startswith(hidden)}
        port = self.address.partition(":")[2]
        self._start(HEAD, sys.executable, variables, "--head", f"--port={port}",
                    "--include-dashboard=false", f"--temp-dir={self.scratch}", *words)  # fmt: skip

    @contextmanager
    def node(self, python: str, variables: Mapping[str, str], *words: str) -> Iterator[None]:
        """A second node, for as long as the block runs."""
        process = self._start(SECOND, python, variables, f"--address={self.address}", *words)
        try:
            yield
        finally:
            process.terminate()
            process.wait(timeout=30)

    def _start(
        self, ip: str, python: str, variables: Mapping[str, str], *words: str
    ) -> subprocess.Popen[bytes]:
        log = self.scratch / f"{ip}.log"
        log.write_text("")
        command = [
            python, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={ip}",
            "--num-cpus=16", f"--object-store-memory={80 * 2**20}", *words,
        ]  # fmt: skip
        environment = self.environment | dict(variables)
        process = self.processes.start(command, environment, self.scratch, log)
        deadline = time.monotonic() + 300  # on a busy machine; an idle one takes some ten seconds
        # Said once the node has joined.
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no Ray node at {ip}: {log.read_text(errors='replace')}")
            time.sleep(0.1)
        return process

    def joined(self, variables: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a command on the head, with klplug, connected to this cluster."""
        own = {"RAY_ADDRESS": self.address}
        return self.environment | WITH_KLPLUG | own | dict(variables or {})

    def run(
        self, words: list[str], variables: Mapping[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Such a command, to its end."""
        return subprocess.run(
            [sys.executable, "-W", "ignore", *words],
            cwd=self.scratch,  # Ray puts it on every worker's path
            env=self.joined(variables),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
