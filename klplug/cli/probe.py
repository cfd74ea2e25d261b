"""``python -m klplug.cli.probe HOST FILE [--ray]``: whether klplug's hooks are active, as JSON.

A process of its own, started as the host's are: hosts print, take long to import, and may end the
process that imports them. ``FILE`` is written after each answer, so that one is left if the next
never comes.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from klplug.hosting.host import hosts

Answer = dict[str, Any]


def probe(host: str, install: bool) -> Answer:
    """``hooks``, by path whether klplug's function runs there, and ``error``, if there was one.

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
        return {"hooks": {}, "error": f"{type(problem).__name__}: {problem}"}


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
    answers = {"process": probe(host, install=True)}
    Path(file).write_text(json.dumps(answers))
    if "--ray" in options:
        answers["ray_worker"] = probe_in_ray(host)
        Path(file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
