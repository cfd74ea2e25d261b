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

Answer = dict[str, Any]


def probe(host: str, install: bool) -> Answer:
    """``hooks``, by path whether klplug's function runs there, and ``error``, if there was one.

    Args:
        host: ``openrlhf`` or ``verl``.
        install: install klplug first, as the launcher does; else only look.
    """
    adapter = importlib.import_module(f"klplug_{host}")
    try:
        if install and host == "openrlhf":
            importlib.import_module("klplug_openrlhf.install").install()
        importlib.import_module(host)  # verl finds its plugins here
        adapter.check()
        return {"hooks": adapter.status(), "error": None}
    except (Exception, SystemExit) as problem:
        return {"hooks": {}, "error": f"{type(problem).__name__}: {problem}"}


def probe_in_ray(host: str) -> Answer:
    """The same in a worker of a Ray that is started for this, on this machine."""
    import ray

    runtime_env: dict[str, Any] = {}
    if host == "openrlhf":
        runtime_env["worker_process_setup_hook"] = "klplug_openrlhf.install.install"
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
