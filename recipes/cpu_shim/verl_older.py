"""What verl 0.7 and 0.8 need on a CPU beside 0.9's stand-ins: symptom and reason of each.

They have no registry of platforms; that one of 0.9's finds nothing to register with there.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import Any

from wrapt import register_post_import_hook, wrap_function_wrapper

from recipes.cpu_shim.verl import CPUDeviceModule


def use_cpu_device(device: ModuleType) -> None:
    """Symptom: `module 'torch.cpu' has no attribute 'max_memory_allocated'`.

    Reason: verl calls the functions of `torch.cuda` on any device's module.
    """
    device.get_torch_device = CPUDeviceModule  # type: ignore[attr-defined]


def use_torch_padding(attention_utils: ModuleType) -> None:
    """Symptom: `No module named 'flash_attn'` where sequences are stripped of their padding.

    Reason: verl takes three functions without any attention in them from flash-attention.
    transformers has the same in torch. (A fourth, einops' rearrange, is not called here.)
    """
    from transformers import modeling_flash_attention_utils as own

    functions = (own._index_first_axis, own._pad_input, None, own._unpad_input)
    attention_utils._get_attention_functions = lambda: functions  # type: ignore[attr-defined]


def use_gloo_in_the_fsdp_worker(worker: ModuleType) -> None:
    """Symptom: `ValueError: Duplicate device type cpu in backend string`, on 0.7.

    Reason: as in `verl.use_gloo_alone`; this worker makes its process group itself.
    """

    def with_gloo(wrapped: Any, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("backend") == "cpu:gloo,cpu:nccl":
            kwargs = {**kwargs, "backend": "gloo"}
        return wrapped(*args, **kwargs)

    wrap_function_wrapper(worker.torch.distributed, "init_process_group", with_gloo)


def leave_the_reference_where_it_is(worker: ModuleType) -> None:
    """Symptom: no accelerator to pin memory, for the reference in 0.7's own worker.

    Reason: as in `verl.add_cpu_engine`.
    """
    from torch.distributed.fsdp import OffloadPolicy

    worker.CPUOffloadPolicy = lambda pin_memory: OffloadPolicy()  # type: ignore[attr-defined]


def use_transformers_5(fsdp_utils: ModuleType) -> None:
    """Symptom: `TypeError: 'set' object is not subscriptable`, on 0.7.

    Reason: not the CPU but the transformers of 0.9's environment, which names a model's layers in
    a set; in that of 0.7's day they were a list.
    """

    def with_list(wrapped: Any, _: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        model = args[0]
        model._no_split_modules = sorted(model._no_split_modules)
        return wrapped(*args, **kwargs)

    wrap_function_wrapper(fsdp_utils, "apply_fsdp2", with_list)


def register() -> None:
    register_post_import_hook(use_transformers_5, "verl.utils.fsdp_utils")
    legacy = "verl.workers.fsdp_workers"
    register_post_import_hook(use_gloo_in_the_fsdp_worker, legacy)
    register_post_import_hook(leave_the_reference_where_it_is, legacy)
    if find_spec("flash_attn") is None:
        register_post_import_hook(use_torch_padding, "verl.utils.attention_utils")
    register_post_import_hook(use_cpu_device, "verl.utils.device")
