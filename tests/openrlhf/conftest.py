"""OpenRLHF in this process, on a CPU: stand-ins in place before anything imports torch's CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from recipes import cpu_shim

os.environ.update({k: v for k, v in cpu_shim.environment("openrlhf").items() if k != "PYTHONPATH"})
cpu_shim.install("openrlhf")


@pytest.fixture
def patched() -> Iterator[None]:
    """klplug applied to OpenRLHF, and the originals back afterwards."""
    import klplug_openrlhf

    klplug_openrlhf.apply()
    yield
    klplug_openrlhf.restore()
