"""Which models the reference worker loads: verl copies the policy's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug_verl import teacher
from klplug_verl.keys import WORKERS_REFERENCE, WORKERS_TEACHER

_NODES = tuple(key.partition(".")[2] for key in (WORKERS_REFERENCE, WORKERS_TEACHER))


@dataclass
class _Named:
    """The settings of the models that a run names, for a reference that is about to be built."""

    reference: dict[str, Any] | None
    teacher: dict[str, Any] | None


_NAMED: ContextVar[_Named | None] = ContextVar("klplug_named_models", default=None)


@contextmanager
def built(worker: Any) -> Iterator[None]:
    """While verl builds a worker's engines: its reference, and the teacher beside it."""
    paths = [worker.config.get(node) for node in _NODES]
    if paths == [None, None] or "ref" not in worker.role:
        yield
        return
    token = _NAMED.set(_Named(*(path and _settings(worker, path) for path in paths)))
    try:
        yield
        if _NAMED.get() is not None:
            said = ", ".join(f"{node}={path}" for node, path in zip(_NODES, paths, strict=True))
            raise RuntimeError(f"{said} is set, but verl built no engine for a reference")
    finally:
        _NAMED.reset(token)


def _settings(worker: Any, path: str) -> dict[str, Any]:
    own = {"path": path, "hf_config_path": None, "tokenizer_path": None}
    return {**worker.config.model, **own}


def init_training_worker(original: Call, worker: Any, args: Args, kwargs: Kwargs) -> None:
    """One engine's worker; the reference's is the one that only goes forward."""
    given, named = bound(original, args, kwargs), _NAMED.get()
    config = given["config"]
    if named is None or not config.engine_config.forward_only:
        original(**given)
        return
    _NAMED.set(None)
    if named.reference is not None:
        given["config"] = _of(config, named.reference)
    original(**given)
    if named.teacher is not None:
        teacher.load(worker, _of(config, named.teacher))


def _of(config: Any, model: dict[str, Any]) -> Any:
    """A worker's configuration, of another model."""
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass

    other = omega_conf_to_dataclass(OmegaConf.create(model))
    other.mtp = config.model_config.mtp
    return dataclasses.replace(config, model_config=other)
