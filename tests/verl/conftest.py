"""verl in this process, on a CPU: stand-ins in place before anything imports it.

klplug itself comes as it comes to a user: verl loads it through its entry point.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from recipes import cpu_shim

if TYPE_CHECKING:
    from tests.verl.engine import Bench

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


@pytest.fixture(scope="module")
def process() -> Iterator[None]:
    """This one, as a worker of verl's that has no others."""
    import torch

    from tests.verl.engine import own_process

    own_process()
    yield
    # Where only tests with ranks of their own were chosen, nobody made a group here.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """verl's worker of a policy, alone in its group."""
    import torch

    from tests.verl.engine import Bench

    yield Bench()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def data(bench: Bench) -> Any:
    return bench.batch()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy with other weights."""
    from tests.references import moved

    return moved(tmp_path_factory.mktemp("reference"))
