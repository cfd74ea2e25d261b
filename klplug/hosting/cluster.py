"""klplug on every node of a Ray cluster, asked of each before anything trains.

A node's workers run in the environment that its ``ray start`` ran in, whatever the command's is.
The only user of Ray here; ``import klplug`` does not load this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import klplug
from klplug.hosting.settings import SettingsError

_EXCEPTION = re.compile(r"^[\w.]+(?:Error|Exception|Exit)\b.*", re.MULTILINE)


def check_nodes(host: str, adapter: str, hint: str = "") -> None:
    """Raise unless a worker of every node that can have one runs with this klplug.

    Args:
        host: the package that a worker imports.
        adapter: klplug's module that is then loaded, by the host or by Ray's setup hook.
        hint: what else a node may lack, for the end of the message.

    Raises:
        SettingsError: names each node, what is there, and what to do.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Sent by value, being this function's own: nodes that have no klplug can run it too.
    class Worker:
        def version(self) -> str:
            import importlib
            import sys

            importlib.import_module(host)
            if adapter not in sys.modules:
                importlib.import_module(adapter)  # which says what is missing
                raise RuntimeError(f"{adapter} is there, but {host} did not load it")
            return str(importlib.import_module("klplug").__version__)

    # An actor, not a task: its error tells what a setup hook died of.
    remote = ray.remote(Worker)
    asked = [
        (
            f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})",
            remote.options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote()
            .version.remote(),
        )
        for node in ray.nodes()
        if node["Alive"] and any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))
    ]
    wrong = []
    for name, version in asked:
        try:
            found = ray.get(version)
        except ray.exceptions.RayError as error:
            wrong.append(f"on {name}: {_reason(error)}")
            continue
        if found != klplug.__version__:
            wrong.append(f"on {name}: klplug {found}")
    if wrong:
        raise SettingsError(
            f"klplug {klplug.__version__} does not run on every node of this Ray cluster: "
            f"{'; '.join(wrong)}. No node may go on with {host}'s own KL. Install klplug in the "
            "environment of each node's `ray start`, or send it along with the job "
            f"(docs/cluster.md){hint}"
        )


def _reason(error: Exception) -> str:
    """The last exception that Ray's report of many lines names."""
    named = _EXCEPTION.findall(str(error))
    return named[-1] if named else str(error)


def after_ray_init(check: Callable[[], None]) -> None:
    """Call ``check`` once this process is connected: now, or when it next calls ``ray.init``."""
    import ray

    if ray.is_initialized():
        check()
        return
    original = ray.init

    def init(*args: Any, **kwargs: Any) -> Any:
        ray.init = original
        context = original(*args, **kwargs)
        check()
        return context

    ray.init = init
