"""Make each mistake in a copy of the tree, run its tests, and print what no test noticed.

    python -m tests.mutants [--jobs 2] [--only WORD]

A host's rows need that host's environment, ``.venv-HOST``; ``KLPLUG_TEST_HOSTS`` says which to run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import hypothesis  # noqa: F401  (loaded once, and torch with it, for all that is forked)
import pytest
import torch

from tests.mutants import Mutant
from tests.mutants.core import CORE
from tests.mutants.hosts import HOSTS

ROOT = Path(__file__).resolve().parents[2]


def copied(folder: Path) -> Path:
    """A copy of what is in the working tree and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    # DeepSpeed's compiled ops, which take minutes: made once for all trees.
    (ROOT / ".cache").mkdir(exist_ok=True)
    (folder / ".cache").symlink_to(ROOT / ".cache")
    return folder


def passes(tree: Path, host: str, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether ``tests`` pass in ``tree``, and the end of what they said.

    Raises:
        RuntimeError: pytest ran none of them.
    """
    # A test that is named by itself is asked for, slow or not.
    marked = [] if all("::" in test for test in tests) else ["-m", "not slow"]
    words = ["-q", "-x", *marked, "--no-header", "-p", "no:cacheprovider", *tests]
    environment = {
        **os.environ,
        # Before the working tree, which is installed there.
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "adapters")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "KLPLUG_TEST_HOSTS": host,
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryFile("w+") as said:
        if host:
            python = str(ROOT / f".venv-{host}/bin/python")
            command = [python, "-m", "pytest", *words]
            code = subprocess.run(
                command, cwd=tree, env=environment, stdout=said, stderr=subprocess.STDOUT
            ).returncode
        else:
            child = FORK.Process(target=_forked, args=(tree, environment, words, said.fileno()))
            child.start()
            child.join()
            code = child.exitcode
        said.seek(0)
        end = said.read()[-2000:]
    if code not in (0, 1, 2):
        raise RuntimeError(f"{' '.join(tests)} ended with {code}:\n{end}")
    return code == 0, end


FORK = multiprocessing.get_context("fork")


def _forked(tree: Path, environment: dict[str, str], words: list[str], output: int) -> None:
    """pytest in a process that has torch already, which takes longer to load than most tests."""
    os.chdir(tree)
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(output, stream)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "klplug")]:
        del sys.modules[name]
    sys.path[:0] = [str(tree), str(tree / "adapters")]
    sys.dont_write_bytecode = True
    os._exit(int(pytest.main(words)))


def survives(mutant: Mutant, tree: Path) -> bool:
    """Whether the tests pass with the mistake in ``tree``, which is mended again."""
    path = tree / mutant.file
    text = path.read_text()
    path.write_text(mutant.changed(text))
    try:
        return passes(tree, mutant.host, mutant.tests)[0]
    finally:
        path.write_text(text)


# In a process of the pool, which has a tree of its own.
_tree: Path


def _take(trees: SimpleQueue[Path]) -> None:
    global _tree
    _tree = trees.get()


def _passes_here(host: str, tests: tuple[str, ...]) -> tuple[bool, str]:
    return passes(_tree, host, tests)


def _survives_here(mutant: Mutant) -> bool:
    began = time.monotonic()
    lives = survives(mutant, _tree)
    took = f"{time.monotonic() - began:4.0f} s"
    print(f"{'SURVIVES' if lives else 'noticed '}  {took}  {mutant.name}", flush=True)
    return lives


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--only", default="", help="those with this word in file, line or tests")
    options = parser.parse_args()
    hosts = os.environ.get("KLPLUG_TEST_HOSTS", "openrlhf,verl").split(",")
    mutants = [m for m in (*CORE, *HOSTS) if not m.host or m.host in hosts]
    mutants = [m for m in mutants if options.only in f"{m.name} {' '.join(m.tests)} {m.host}"]
    stale = [mutant.name for mutant in mutants if not mutant.fits(ROOT)]
    if not mutants or stale:
        print(
            "these stand nowhere, or more than once:", *stale or ["none was asked for"], sep="\n  "
        )
        return 2
    torch.set_num_threads(1)  # a process that is forked has none of its parent's threads
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        trees = FORK.SimpleQueue()
        for job in range(options.jobs):
            trees.put(copied(Path(place) / f"tree-{job}"))
        # Processes: a test that forks ranks of its own fails in what a thread has forked.
        with ProcessPoolExecutor(options.jobs, FORK, _take, (trees,)) as pool:
            # Tests that fail without any mistake would notice everything.
            sound = {}
            for host, named in sorted({(m.host, "::" in m.tests[0]) for m in mutants}):
                of_kind = (
                    m.tests for m in mutants if (m.host, "::" in m.tests[0]) == (host, named)
                )
                tests = tuple(dict.fromkeys(test for tests in of_kind for test in tests))
                sound[tests] = pool.submit(_passes_here, host, tests)
            tried = [pool.submit(_survives_here, mutant) for mutant in mutants]
            try:
                for tests, found in sound.items():
                    passed, said = found.result()
                    if not passed:
                        print(f"{' '.join(tests)} fails without any mistake:\n{said}")
                        return 2
                survivors = [m for m, found in zip(mutants, tried, strict=True) if found.result()]
            finally:
                pool.shutdown(cancel_futures=True)
    names = "".join(f"\n  {m.name}" for m in survivors) or " none"
    print(f"{len(mutants)} mutants, {time.monotonic() - started:.0f} s; survivors:{names}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
