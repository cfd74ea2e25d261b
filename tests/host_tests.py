"""A host's own tests, with klplug loaded and unused, and without it: they must give the same.

    python -m tests.host_tests HOST CHECKOUT [TEST...]

in the host's environment, with a checkout of the host's repository, whose package is the one that
is tested. Without names of tests, those that need neither a GPU nor the network. Prints a table;
the exit status is 0 where no test changed, and klplug was where it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from recipes import cpu_shim

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "verl": [
        "tests/trainer/ppo/test_core_algos_on_cpu.py",
        "tests/trainer/ppo/test_dynamic_policy_losses_on_cpu.py",
        "tests/trainer/ppo/test_loss_aggregation_on_cpu.py",
        "tests/trainer/ppo/test_metric_utils_on_cpu.py",
        "tests/trainer/ppo/test_reinforce_pp_multiturn_on_cpu.py",
        "tests/trainer/ppo/test_rollout_corr.py",
        "tests/trainer/ppo/test_rollout_corr_integration.py",
    ],
    "openrlhf": ["tests"],
}
# verl loads klplug by itself; into OpenRLHF its launcher brings it.
LOAD = {"verl": "import verl", "openrlhf": "import klplug_openrlhf as k; k.apply()"}

PLUGIN = """
import json, os, sys

if os.environ["KLPLUG_LOADED"] == "1":
    {load}
outcomes = {{}}

def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome

def pytest_sessionfinish(session):
    patch = sys.modules.get("klplug_{host}.hooks")
    applied = sum(patch.PATCH.applied.values()) if patch else 0
    with open(os.environ["KLPLUG_OUTCOMES"], "w") as file:
        json.dump({{"outcomes": outcomes, "replaced": applied}}, file)
"""


def outcomes(
    host: str, checkout: Path, tests: list[str], loaded: bool
) -> tuple[dict[str, str], int]:
    """By test what became of it, and how many of the host's functions were klplug's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "klplug_outcomes.py").write_text(PLUGIN.format(load=LOAD[host], host=host))
        found = Path(folder, "outcomes.json")
        own = {k: v for k, v in os.environ.items() if not k.startswith("KLPLUG")}
        own |= cpu_shim.environment(host)
        own |= {
            "PYTHONPATH": os.pathsep.join(
                [str(checkout), folder, str(ROOT / "adapters"), str(ROOT), own["PYTHONPATH"]]
            ),
            "KLPLUG_LOADED": str(int(loaded)),
            "KLPLUG_OUTCOMES": str(found),
            **({} if loaded else {"KLPLUG_DISABLE": "1"}),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "klplug_outcomes", "--no-header"]
        done = subprocess.run(
            [*command, "-W", "ignore", "-p", "no:cacheprovider", *tests],
            cwd=checkout,
            env=own,
            capture_output=True,
            text=True,
            check=False,
        )
        if not found.exists():
            raise SystemExit(f"pytest did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        said = json.loads(found.read_text())
        return said["outcomes"], said["replaced"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.host_tests")
    parser.add_argument("host", choices=sorted(TESTS))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("tests", nargs="*")
    args = parser.parse_args()
    if not (args.checkout / args.host / "__init__.py").is_file():
        parser.error(f"{args.checkout} is no checkout of {args.host}: it has no {args.host}/")
    checkout = args.checkout.resolve()
    tests = args.tests or [t for t in TESTS[args.host] if (checkout / t).exists()]
    without, none = outcomes(args.host, checkout, tests, loaded=False)
    loaded, replaced = outcomes(args.host, checkout, tests, loaded=True)
    changed = {
        name: (without.get(name, "missing"), loaded.get(name, "missing"))
        for name in sorted({*without, *loaded})
        if without.get(name) != loaded.get(name)
    }
    for title, found in (("without klplug", without), ("with it loaded", loaded)):
        counts = ", ".join(
            f"{n} {outcome}" for outcome, n in sorted(Counter(found.values()).items())
        )
        print(f"{title}: {counts or 'no test ran'}")
    print(f"functions of {args.host}'s that were klplug's: {none} and {replaced}")
    for name, (before, after) in changed.items():
        print(f"CHANGED {name}: {before}, then {after}")
    return int(bool(changed) or not loaded or none != 0 or replaced == 0)


if __name__ == "__main__":
    sys.exit(main())
