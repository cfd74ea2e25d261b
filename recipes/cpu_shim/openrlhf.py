"""OpenRLHF 0.11 on a CPU: each stand-in with its symptom and its reason."""

import os
import sys
from datetime import timedelta
from types import ModuleType

import torch
from torch import Tensor
from wrapt import register_post_import_hook, wrap_function_wrapper

from recipes.cpu_shim import HERE, torch_cuda, vllm_cpu

SYNC_TIMEOUT = timedelta(minutes=10)


class GlooBroadcast:
    """The trainer's weights to vLLM's processes: a group of its own over TCP.

    Stands in for vLLM's PyNcclCommunicator, which needs NCCL; same call, `stream` has no meaning.
    """

    def __init__(self, address: str, port: int, rank: int, world_size: int) -> None:
        distributed = torch.distributed
        self.store = distributed.TCPStore(address, port, world_size, rank == 0, SYNC_TIMEOUT)
        store = distributed.PrefixStore("weights", self.store)
        self.group = distributed.ProcessGroupGloo(store, rank, world_size, SYNC_TIMEOUT)

    def broadcast(self, tensor: Tensor, src: int = 0, stream: object = None) -> None:
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self.group.broadcast([tensor], options).wait()


def sync_weights_over_gloo(distributed_util: ModuleType) -> None:
    """Symptom: no NCCL library to load at `stateless_init_process_group`.

    Reason: `--vllm.sync_backend gloo` leaves CUDA IPC aside, yet still builds a PyNcclCommunicator.
    """

    def stateless_init_process_group(master_address, master_port, rank, world_size, device):
        return GlooBroadcast(master_address, master_port, rank, world_size)

    distributed_util.stateless_init_process_group = stateless_init_process_group


def receive_weights_on_cpu(vllm_worker_wrap: ModuleType) -> None:
    """Symptom: `mismatch dtype` or `Torch not compiled with CUDA enabled` at the first weight sync.

    Reason: the receiving side allocates on "cuda" and asserts the trainer's bfloat16, where this
    engine holds float32. vLLM's `load_weights` copies into its own dtype, which casts exactly.
    """

    def update_weight(self, name, dtype, shape, empty_cache=False):
        weight = torch.empty(shape, dtype=dtype)
        self._model_update_group.broadcast(weight, src=0)
        self.model_runner.model.load_weights(weights=[(name, weight)])

    vllm_worker_wrap.WorkerWrap.update_weight = update_weight


def give_ray_logical_gpus(ray: ModuleType) -> None:
    """Symptom: the placement groups wait for a GPU for ever.

    Reason: OpenRLHF asks for whole and fractional GPUs; a number of logical ones satisfies Ray.
    `local` keeps the run out of any other cluster of this machine, and makes Ray's processes
    children of this one, so that they end with it.
    """

    def init(wrapped, instance, args, kwargs):
        if "RAY_ADDRESS" in os.environ:  # a cluster of the user's, as in a submitted job
            return wrapped(*args, **kwargs)
        ranks = int(os.environ["KLPLUG_CPU_SHIM_RANKS"])
        logical = {
            "address": "local",
            "num_cpus": 2 * ranks + 2,
            "num_gpus": ranks,
            "include_dashboard": False,
            "object_store_memory": 256 * 2**20,
        }
        return wrapped(*args, **logical | kwargs)

    wrap_function_wrapper(ray, "init", init)


def register() -> None:
    torch_cuda.stand_in_cuda_calls()
    sys.path.append(str(HERE / "packages"))  # last: a real flash_attn comes first
    for hook, module in (
        (torch_cuda.stand_in_device_mesh, "torch.distributed.device_mesh"),
        (vllm_cpu.keep_linear_weights, "vllm.model_executor.layers.utils"),
        (vllm_cpu.roll_out_in_float32, "vllm.engine.arg_utils"),
        (sync_weights_over_gloo, "openrlhf.utils.distributed_util"),
        (receive_weights_on_cpu, "openrlhf.trainer.ray.vllm_worker_wrap"),
        (give_ray_logical_gpus, "ray"),
    ):
        register_post_import_hook(hook, module)
