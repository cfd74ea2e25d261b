"""Which hosts a run covers: ``KLPLUG_TEST_HOSTS`` (default ``openrlhf,verl``; empty: the core).

Each host has its own environment, so ``make test`` names one at a time. A host that is named and
can't be imported is a failure: no run skips its way to green.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

HOSTS = ("openrlhf", "verl")
NAMED = [h.strip() for h in os.environ.get("KLPLUG_TEST_HOSTS", ",".join(HOSTS)).split(",") if h]

collect_ignore = [str(Path(__file__).parent / host) for host in HOSTS if host not in NAMED]


def pytest_configure(config: pytest.Config) -> None:
    for host in NAMED:
        if host not in HOSTS:
            raise pytest.UsageError(f"KLPLUG_TEST_HOSTS names {host!r}; there is {HOSTS}")
        if importlib.util.find_spec(host) is None:
            raise pytest.UsageError(
                f"KLPLUG_TEST_HOSTS names {host}, which can't be imported in this environment; "
                f"run it with .venv-{host}, or set KLPLUG_TEST_HOSTS (empty: the core only)"
            )
