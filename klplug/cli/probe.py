"""``python -m klplug.cli.probe HOST FILE [--ray]``: whether klplug's hooks are active, as JSON.

A process of its own, started as the host's are: hosts print, take long to import, and may end the
process that imports them. ``FILE`` is written after each answer, so that one is left if the next
never comes.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from klplug.hosting.host import hosts

Answer = dict[str, Any]


def probe(host: str, install: bool) -> Answer:
    """``hooks``, by path whether klplug's function runs there, and ``error``, if there was one.

    ``lacks`` is what the host imports and can't, being neither klplug's nor its own: not installed,
    or broken, as an extension without its CUDA library is.

    Args:
        host: its name.
        install: install klplug first, as the launcher does; else only look.
    """
    row = hosts()[host]
    try:
        if install and row.setup is not None:
            module, _, function = row.setup.rpartition(".")
            getattr(importlib.import_module(module), function)()
        importlib.import_module(host)  # some find their plugins here
        patch = row.hooks
        if patch is None:
            return {"hooks": {}, "error": None}
        patch.check()
        return {"hooks": patch.status(), "error": None}
    except (Exception, SystemExit) as problem:
        answer = {"hooks": {}, "error": f"{type(problem).__name__}: {problem}"}
        module = (getattr(problem, "name", None) or "").partition(".")[0]
        ours = ("klplug", "wrapt", *row.packages, host)
        if isinstance(problem, ImportError) and module and module not in ours:
            answer["lacks"] = module
        return answer


def probe_in_ray(host: str) -> Answer:
    """The same in a worker of a Ray that is started for this, on this machine."""
    import ray

    setup = hosts()[host].setup
    runtime_env = {} if setup is None else {"worker_process_setup_hook": setup}
    try:
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env=runtime_env,
        )
        answer: Answer = ray.get(ray.remote(probe).remote(host, install=False))
        return answer
    except Exception as problem:
        return {"hooks": {}, "error": f"{type(problem).__name__}: {problem}"}
    finally:
        ray.shutdown()


def main(host: str, file: str, *options: str) -> None:
    here = probe(host, install=True)
    _write({"process": here}, file)
    if "--ray" in options:
        # A worker would lack the same, after the time that a Ray takes to start.
        there = here if "lacks" in here else probe_in_ray(host)
        _write({"process": here, "ray_worker": there}, file)


def _write(answers: dict[str, Answer], file: str) -> None:
    # At once: whoever waits for it reads it meanwhile.
    Path(f"{file}.new").write_text(json.dumps(answers))
    os.replace(f"{file}.new", file)


if __name__ == "__main__":
    main(*sys.argv[1:])
