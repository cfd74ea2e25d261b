"""``make test-latest``: klplug against the newest release of a host that the registry has.

``python -m tests.latest HOST`` in the host's environment prints a line: the release, whether every
hook is found, and what the tests of the host's behaviour say. The exit status is 0 if all is well.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

from recipes import cpu_shim
from tests.contract import missing
from tests.releases import release

ROOT = Path(__file__).resolve().parents[1]

# What is run in releases other than the installed one.
BEHAVIOUR = {
    "openrlhf": [
        *(f"tests/openrlhf/test_{name}.py" for name in ("any_release", "one_meaning", "trainer")),
        *("tests/openrlhf/test_experience.py", "-k", "not flash_reinforce"),  # new in 0.11
    ],
    "verl": ["tests/verl/test_one_meaning.py"],
}
CHECK = "import klplug_{host} as adapter; adapter.check()"


def newest(host: str) -> str:
    """The newest release that the configured registry has."""
    pip = [sys.executable, "-m", "pip", "index", "versions", host]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"the registry does not say which releases {host} has:\n{done.stderr}")
    return done.stdout.partition("(")[2].partition(")")[0]


def run_in(host: str, version: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Python with ``host`` at ``version`` first on its path."""
    folders = [release(host, version), ROOT, ROOT / "adapters"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "KLPLUG_TEST_HOSTS": host,
        "OMP_NUM_THREADS": "1",
    }
    if "pytest" not in words:  # the tests stand in for a GPU themselves, and once is enough
        shim = cpu_shim.environment(host)
        startup = shim["PYTHONPATH"].partition(os.pathsep)[0]
        path = os.pathsep.join([startup, environment["PYTHONPATH"]])
        environment |= shim | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def behaviour(host: str, version: str) -> subprocess.CompletedProcess[str]:
    """The tests that hold in every release, in this one."""
    return run_in(host, version, ["-m", "pytest", "-p", "no:cacheprovider", *BEHAVIOUR[host]])


def report(host: str, version: str) -> tuple[str, bool]:
    """One line on a release, and whether it is served."""
    hooks = importlib.import_module(f"klplug_{host}.hooks").PATCH.hooks
    checked = run_in(host, version, ["-c", CHECK.format(host=host)])
    if checked.returncode != 0:
        reason = checked.stderr.strip().splitlines()[-1]
        lacking = "; ".join(missing(release(host, version), hooks)) or "no hook"
        return f"{host} {version}: not served. {reason} Missing in its sources: {lacking}", False
    done = behaviour(host, version)
    *_, summary = done.stdout.strip().splitlines()
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR "))]
    line = f"{host} {version}: all {len(hooks)} hooks found; its behaviour: {summary.strip('= ')}"
    return "\n".join([line, *failed]), done.returncode == 0


if __name__ == "__main__":
    name = sys.argv[1]
    line, served = report(name, sys.argv[2] if len(sys.argv) > 2 else newest(name))
    print(line)
    raise SystemExit(not served)
