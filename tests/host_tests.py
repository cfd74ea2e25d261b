"""A host's own tests, with klplug loaded and unused, and without it: they must give the same.

    python -m tests.host_tests HOST CHECKOUT [--in-place] [TEST...]

in the host's environment, with a checkout of the host's repository, whose package is the one that
is tested. Without names of tests, those that need neither a GPU nor the network. ``--in-place``
runs them a third time, with klplug's estimators and means where the host's are (tests/in_place.py).
Prints a table; the exit status is 0 where no test changed, and klplug was where it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
if os.environ["KLPLUG_IN_PLACE"] == "1":
    from klplug_in_place import CALLS, pytest_collection_modifyitems
else:
    CALLS = {{}}
outcomes = {{}}

def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome

def pytest_sessionfinish(session):
    patch = sys.modules.get("klplug_{host}.hooks")
    applied = sum(patch.PATCH.applied.values()) if patch else 0
    with open(os.environ["KLPLUG_OUTCOMES"], "w") as file:
        json.dump({{"outcomes": outcomes, "replaced": applied, "calls": dict(CALLS)}}, file)
"""


def outcomes(
    host: str, checkout: Path, tests: list[str], *, loaded: bool = False, in_place: bool = False
) -> tuple[dict[str, str], int, dict[str, int]]:
    """By test what became of it; how many functions klplug hooked; the calls of those in place."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "klplug_outcomes.py").write_text(PLUGIN.format(load=LOAD[host], host=host))
        # By another name: the checkout has tests of its own.
        shutil.copy(ROOT / "tests" / "in_place.py", Path(folder, "klplug_in_place.py"))
        found = Path(folder, "outcomes.json")
        own = {k: v for k, v in os.environ.items() if not k.startswith("KLPLUG")}
        own |= cpu_shim.environment(host)
        own |= {
            "PYTHONPATH": os.pathsep.join(
                [str(checkout), folder, str(ROOT / "adapters"), str(ROOT), own["PYTHONPATH"]]
            ),
            "KLPLUG_LOADED": str(int(loaded)),
            "KLPLUG_IN_PLACE": str(int(in_place)),
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
        return said["outcomes"], said["replaced"], said["calls"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.host_tests")
    parser.add_argument("host", choices=sorted(TESTS))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("tests", nargs="*")
    parser.add_argument("--in-place", action="store_true")
    args = parser.parse_args()
    if not (args.checkout / args.host / "__init__.py").is_file():
        parser.error(f"{args.checkout} is no checkout of {args.host}: it has no {args.host}/")
    checkout = args.checkout.resolve()
    tests = args.tests or [t for t in TESTS[args.host] if (checkout / t).exists()]
    without, none, _ = outcomes(args.host, checkout, tests)
    loaded, replaced, _ = outcomes(args.host, checkout, tests, loaded=True)
    runs = {"without klplug": without, "with it loaded": loaded}
    calls: dict[str, int] = {"": 1}
    if args.in_place:
        runs["with klplug in place"], _, calls = outcomes(args.host, checkout, tests, in_place=True)
    for title, found in runs.items():
        counts = ", ".join(
            f"{n} {outcome}" for outcome, n in sorted(Counter(found.values()).items())
        )
        print(f"{title}: {counts or 'no test ran'}")
    print(f"functions of {args.host}'s that were klplug's: {none} and {replaced}")
    if args.in_place:
        print(f"calls of klplug's in place: {calls or 'none'}")
    changed = {
        f"{name} {title}: {without.get(name, 'missing')}, then {found.get(name, 'missing')}"
        for title, found in runs.items()
        for name in {*without, *found}
        if without.get(name) != found.get(name)
    }
    for line in sorted(changed):
        print(f"CHANGED {line}")
    return int(bool(changed) or not loaded or none != 0 or replaced == 0 or not calls)


if __name__ == "__main__":
    sys.exit(main())
