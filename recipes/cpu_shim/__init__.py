"""Stand-ins for what only a GPU can do, so that the real hosts run on a CPU (see README.md).

Used by the quickstart and by the tests, never shipped. `environment` gives the variables that
switch them on in every process of a run; `startup/sitecustomize.py` calls `install` in each.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from wrapt import register_post_import_hook

HERE = Path(__file__).resolve().parent
HOSTS = ("openrlhf", "verl")


def install(host: str) -> None:
    """Registers the stand-ins of `host`; they act once torch is imported and finds no GPU."""
    if host not in HOSTS:
        raise ValueError(f"KLPLUG_CPU_SHIM={host!r}: there are stand-ins for {', '.join(HOSTS)}")

    def stand_in_for_gpu(torch: ModuleType) -> None:
        if not torch.cuda.is_available():
            import_module(f"recipes.cpu_shim.{host}").register()

    register_post_import_hook(stand_in_for_gpu, "torch")


def environment(host: str, ranks: int = 1, threads: int = 1) -> dict[str, str]:
    """What a process needs in its environment to run `host` on a CPU with `ranks` logical GPUs."""
    repository = HERE.parents[1]
    inherited = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": os.pathsep.join([str(HERE / "startup"), *([inherited] if inherited else [])]),
        # Building and loading DeepSpeed's ops calls the environment's own `ninja`.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "KLPLUG_CPU_SHIM": host,
        "KLPLUG_CPU_SHIM_RANKS": str(ranks),
        # DeepSpeed: its CPU backend with gloo, and its compiled ops inside the checkout.
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
        "TORCH_EXTENSIONS_DIR": str(repository / ".cache" / "torch_extensions" / host),
        # Several processes share the cores and take turns: more threads each would only contend.
        "OMP_NUM_THREADS": str(threads),
        # Threads that wait asleep: spinning ones take the cores from those they wait for.
        "OMP_WAIT_POLICY": "PASSIVE",
        # vLLM: no pinning (it wants whole cores per rank), and a gibibyte of KV cache is plenty.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # verl: the platform that its stand-ins add.
        "VERL_PLATFORM": "cpu",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
