"""OpenRLHF in this process, on a CPU: stand-ins in place before anything imports torch's CUDA."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import version

import pytest

from recipes import cpu_shim

os.environ.update({k: v for k, v in cpu_shim.environment("openrlhf").items() if k != "PYTHONPATH"})
cpu_shim.install("openrlhf")


def pytest_report_header() -> str:
    """Which release is tested: another than the installed one may be first on the path."""
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None
    return f"openrlhf {version('openrlhf')} in {spec.origin}"


@pytest.fixture
def patched() -> Iterator[None]:
    """klplug applied to OpenRLHF, and the originals back afterwards."""
    import klplug_openrlhf

    klplug_openrlhf.apply()
    yield
    klplug_openrlhf.restore()
