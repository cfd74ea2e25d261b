"""verl 0.9 on a CPU: each stand-in with its symptom and its reason.

All but one go into verl's own registries, which look for them by device or by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch
from wrapt import register_post_import_hook, wrap_function_wrapper

ROLLOUT = "transformers_cpu"
"""The rollout's name for ``actor_rollout_ref.rollout.name``."""


class CPUDeviceModule:
    """`torch.cpu`, and the calls of `torch.cuda` that verl makes on any device's module."""

    __name__ = "torch.cpu"

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"

    def set_device(self, *_: object) -> None: ...

    def empty_cache(self) -> None: ...

    def ipc_collect(self) -> None: ...

    def reset_peak_memory_stats(self, *_: object) -> None: ...

    def memory_allocated(self, *_: object) -> int:
        return 0

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated

    def mem_get_info(self, *_: object) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_device_name(self, *_: object) -> str:
        return "cpu"

    def get_rng_state(self, *_: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *_: object) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed


def add_cpu_platform(platform_manager: ModuleType) -> None:
    """Symptom: verl falls back to its platform `nvidia`, and fails at the first CUDA call.

    Reason: it registers platforms for three vendors' accelerators, and none for none. This one
    answers to `VERL_PLATFORM=cpu`, with gloo, and asks Ray for its (logical) GPUs.
    """
    from verl.plugin.platform.platform_base import PlatformBase

    @platform_manager.PlatformRegistry.register(platform="cpu")
    class CPUPlatform(PlatformBase):
        device_name = "cpu"
        vendor_name = "generic"
        device_module = CPUDeviceModule()

        def is_available(self) -> bool:
            return True

        def is_platform_available(self, use_smi_check: bool = False) -> bool:
            return not torch.cuda.is_available()

        def current_device(self) -> str:
            return "cpu"

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index: int) -> None: ...

        def synchronize(self, device_index: int | None = None) -> None: ...

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        manual_seed_all = manual_seed

        def set_allocator_settings(self, settings: str) -> None: ...

        def empty_cache(self) -> None: ...

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return None, None

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CUDA_VISIBLE_DEVICES"

        @contextmanager
        def nvtx_range(self, msg: str) -> Iterator[None]:
            yield

        def profiler_start(self) -> None: ...

        def profiler_stop(self) -> None: ...

        def ray_resource_name(self) -> str:
            return "GPU"

        def ray_noset_envvars(self) -> list[str]:
            return []

        def is_ipc_supported(self) -> bool:
            return False

        def cudart(self) -> None:
            return None


def add_cpu_engine(transformer_impl: ModuleType) -> None:
    """Symptom: no engine for device `cpu`; then, for the reference, no accelerator to pin memory.

    Reason: verl registers its FSDP engines for `cuda` and `npu` only, and offloads an engine that
    never trains to pinned host memory. Here everything is on the host already.
    """
    from verl.workers.engine.base import EngineRegistry

    @EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cpu"])
    class CPUFSDP2Engine(transformer_impl.FSDPEngineWithLMHead):
        def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
            forward_only = self.engine_config.forward_only
            object.__setattr__(self.engine_config, "forward_only", False)
            try:
                return super()._build_fsdp_module(module)
            finally:
                object.__setattr__(self.engine_config, "forward_only", forward_only)


def add_rollout(rollout_base: ModuleType) -> None:
    """Symptom: there is no rollout but vllm, sglang and trtllm.

    Reason: the vLLM that has a CPU build needs another transformers than this verl. The server in
    `verl_rollout.py` samples with transformers.
    """
    adapter = "recipes.cpu_shim.verl_rollout.WeightSender"
    rollout_base._ROLLOUT_REGISTRY[(ROLLOUT, "async")] = adapter


def add_rollout_server(replica: ModuleType) -> None:
    """The other half of `add_rollout`, in the registry of servers."""

    def load() -> type:
        from recipes.cpu_shim.verl_rollout import Replica

        return Replica

    replica.RolloutReplicaRegistry.register(ROLLOUT, load)


def is_older() -> bool:
    """Whether the installed verl is older than its registry of platforms (0.9)."""
    verl = find_spec("verl")
    places = (verl and verl.submodule_search_locations) or ()
    return not any(Path(place, "plugin", "platform").is_dir() for place in places)


def use_gloo_alone(distributed: ModuleType) -> None:
    """Symptom: `ValueError: Duplicate device type cpu in backend string`.

    Reason: verl asks for `cpu:gloo,{device}:{backend}`, and the device is the CPU. The one
    stand-in for which there is no registry.
    """

    def with_gloo(wrapped: Any, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return wrapped(*args, **{"backend": "gloo", **kwargs})

    wrap_function_wrapper(distributed, "initialize_global_process_group_ray", with_gloo)


def register() -> None:
    if is_older():
        from recipes.cpu_shim import verl_older

        verl_older.register()
    for hook, module in (
        (add_cpu_platform, "verl.plugin.platform.platform_manager"),
        (add_cpu_engine, "verl.workers.engine.fsdp.transformer_impl"),
        (add_rollout, "verl.workers.rollout.base"),
        (add_rollout_server, "verl.workers.rollout.replica"),
        (use_gloo_alone, "verl.utils.distributed"),
    ):
        register_post_import_hook(hook, module)
