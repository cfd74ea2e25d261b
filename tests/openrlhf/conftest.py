"""OpenRLHF in this process, on a CPU: stand-ins in place before anything imports torch's CUDA."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import version

import pytest

from recipes import cpu_shim
from recipes.cpu_shim.deepspeed_ops import compiled_ops

os.environ.update({k: v for k, v in cpu_shim.environment("openrlhf").items() if k != "PYTHONPATH"})
cpu_shim.install("openrlhf")


def pytest_report_header() -> str:
    """Which release is tested: another than the installed one may be first on the path."""
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None
    return f"openrlhf {version('openrlhf')} in {spec.origin}"


@pytest.fixture(scope="session")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """DeepSpeed's, whose lock a killed run may have left: all later ones would wait for ever."""
    log = tmp_path_factory.mktemp("ops") / "log.txt"
    environment = {**os.environ, **cpu_shim.environment("openrlhf")}
    with compiled_ops(environment, log, announce=print):
        yield


@pytest.fixture
def patched() -> Iterator[None]:
    """klplug applied to OpenRLHF, and the originals back afterwards."""
    import klplug_openrlhf

    klplug_openrlhf.apply()
    yield
    klplug_openrlhf.restore()
