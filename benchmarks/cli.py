"""``python -m benchmarks.cli [PYTHON...]``: CPU seconds and memory of each command of ``klplug``.

Each command is a process of its own, started in turns so that what else the machine does falls on
all alike. Name several interpreters, each with a klplug of its own, to compare them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS = 11
SCRIPT = Path(__file__).parents[1] / "tests" / "audit" / "scripts" / "verl-grpo.sh"
COMMANDS = {
    "--version": ["--version"],
    "list": ["list"],
    "explain k3_as_loss": ["explain", "k3_as_loss"],
    "audit verl-grpo.sh": ["audit", str(SCRIPT)],
}


def cost(command: list[str]) -> tuple[float, float]:
    """Seconds of CPU and the most memory, in MB, of one run of ``command``."""
    # Nothing of this checkout: its working directory is on the path of python -m.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(sys.executable).parent)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(pythons: list[str]) -> None:
    runs = {(name, python): [] for name in COMMANDS for python in pythons}
    for _ in range(ROUNDS):
        for (name, python), costs in runs.items():
            costs.append(cost([python, "-m", "klplug", *COMMANDS[name]]))
    print("| command | python | CPU, s | memory, MB |\n| --- | --- | --- | --- |")
    for (name, python), costs in runs.items():
        seconds, megabytes = (statistics.median(values) for values in zip(*costs, strict=True))
        print(f"| `klplug {name}` | {python} | {seconds:.2f} | {megabytes:.0f} |")


if __name__ == "__main__":
    main([os.path.abspath(python) for python in sys.argv[1:] or [sys.executable]])
