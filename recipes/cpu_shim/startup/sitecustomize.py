"""Switches the CPU stand-ins on in every Python process of a run: driver, Ray workers, vLLM's own.

Python imports `sitecustomize` by itself at start-up. With this folder on PYTHONPATH another one
further down the path is hidden, so that one is run first.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run_next_sitecustomize() -> None:
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    spec = PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


def install_stand_ins() -> None:
    host = os.environ.get("KLPLUG_CPU_SHIM", "")
    # Only the host's own virtual environment: a bare interpreter that inherits PYTHONPATH (a build
    # tool's, say) has no torch to patch.
    if not host or PathFinder.find_spec("wrapt") is None or PathFinder.find_spec("torch") is None:
        return
    sys.path.append(str(HERE.parents[2]))
    from recipes import cpu_shim

    cpu_shim.install(host)


run_next_sitecustomize()
install_stand_ins()
