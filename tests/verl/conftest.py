"""verl in this process, on a CPU: stand-ins in place before anything imports it.

klplug itself comes as it comes to a user: verl loads it through its entry point.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from recipes import cpu_shim

os.environ.update(
    {k: v for k, v in cpu_shim.environment("verl").items() if k not in ("PYTHONPATH", "PATH")}
)
cpu_shim.install("verl")

# Of verl 0.7 only; test_releases.py runs it there.
collect_ignore = [] if find_spec("verl.workers.actor") else ["test_legacy_worker.py"]


@pytest.fixture
def unpatched() -> Iterator[None]:
    """verl's own functions, and klplug's back afterwards."""
    import klplug_verl

    klplug_verl.restore()
    yield
    klplug_verl.apply()
