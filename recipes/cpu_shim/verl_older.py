"""verl 0.7 and 0.8 on a CPU, as far as tests in one process go: symptom and reason of each.

They have no registry of platforms; 0.9's stand-ins find nothing to register with there.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

from wrapt import register_post_import_hook

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


def register() -> None:
    if find_spec("flash_attn") is None:
        register_post_import_hook(use_torch_padding, "verl.utils.attention_utils")
    register_post_import_hook(use_cpu_device, "verl.utils.device")
