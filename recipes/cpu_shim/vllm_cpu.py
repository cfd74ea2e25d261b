"""vLLM's CPU build: what stands between it and a policy whose weights change."""

from types import ModuleType

import torch
from wrapt import wrap_function_wrapper


def keep_linear_weights(layer_utils: ModuleType) -> None:
    """Symptom: the first weight sync dies: `'Parameter' object has no attribute 'weight_loader'`.

    Reason: the CPU backend packs each linear weight for oneDNN and drops the original, so there is
    nothing left to load new weights into. Plain `linear` keeps it.
    """

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layer_utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def roll_out_in_float32(arg_utils: ModuleType) -> None:
    """Symptom: generation at a quarter of the speed that float32 has.

    Reason: OpenRLHF fixes bfloat16 for its engines; a CPU without AMX emulates it.
    """

    def float32(wrapped, instance, args, kwargs):
        if kwargs.get("dtype") == "bfloat16":
            kwargs = kwargs | {"dtype": "float32"}
        return wrapped(*args, **kwargs)

    wrap_function_wrapper(arg_utils, "AsyncEngineArgs.__init__", float32)
