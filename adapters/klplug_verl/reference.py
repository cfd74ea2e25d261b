"""Which model the reference worker loads: verl copies the policy's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug_verl.keys import WORKERS_REFERENCE

_NODE = WORKERS_REFERENCE.partition(".")[2]
# The settings of a reference that is about to be built.
_MODEL: ContextVar[Any] = ContextVar("klplug_reference_model", default=None)


@contextmanager
def built(worker: Any) -> Iterator[None]:
    """While verl builds a worker's engines: its reference is of the model that the run names."""
    path = worker.config.get(_NODE)
    if path is None or "ref" not in worker.role:
        yield
        return
    own = {"path": path, "hf_config_path": None, "tokenizer_path": None}
    token = _MODEL.set({**worker.config.model, **own})
    try:
        yield
        if _MODEL.get() is not None:
            raise RuntimeError(
                f"klplug.ref_model={path} is set, but verl built no engine for a reference"
            )
    finally:
        _MODEL.reset(token)


def init_training_worker(original: Call, _: Any, args: Args, kwargs: Kwargs) -> None:
    """One engine's worker; the reference's is the one that only goes forward."""
    given, model = bound(original, args, kwargs), _MODEL.get()
    config = given["config"]
    if model is not None and config.engine_config.forward_only:
        from omegaconf import OmegaConf
        from verl.utils.config import omega_conf_to_dataclass

        other = omega_conf_to_dataclass(OmegaConf.create(model))
        other.mtp = config.model_config.mtp
        given["config"] = dataclasses.replace(config, model_config=other)
        _MODEL.set(None)
    original(**given)
