"""torch: the CUDA calls that the hosts make unconditionally."""

from types import ModuleType

import torch


class CpuDevice(str):
    """The device `cpu`, which turns into an index inside `f"cuda:{device}"`.

    OpenRLHF's replay buffer writes torch.device(f"cuda:{torch.cuda.current_device()}"), everything
    else moves tensors with `.to(torch.cuda.current_device())`: one value has to serve both.
    """

    def __new__(cls) -> "CpuDevice":
        return super().__new__(cls, "cpu")

    def __format__(self, spec: str) -> str:
        return "0"

    def __reduce__(self) -> tuple[type["CpuDevice"], tuple[()]]:
        return CpuDevice, ()


def stand_in_cuda_calls() -> None:
    # A function object each: torch._dynamo refuses one function under two names.
    torch.cuda.current_device = lambda: CpuDevice()
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.current_stream = lambda device=None: None


def stand_in_device_mesh(device_mesh: ModuleType) -> None:
    original = device_mesh.init_device_mesh

    def init_device_mesh(device_type: str, *args, **kwargs):
        return original("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    device_mesh.init_device_mesh = torch.distributed.init_device_mesh = init_device_mesh
