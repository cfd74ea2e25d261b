"""The CPU stand-ins, without starting a host."""

import os
import pickle
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from recipes import cpu_shim
from recipes.cpu_shim import deepspeed_ops, openrlhf, vllm_cpu
from recipes.cpu_shim.torch_cuda import CpuDevice

PACKAGES = cpu_shim.HERE / "packages"


@pytest.fixture
def bert_padding(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PACKAGES))
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    import flash_attn.bert_padding

    assert Path(flash_attn.bert_padding.__file__).is_relative_to(PACKAGES)
    return flash_attn.bert_padding


def python(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_device_value_serves_both_of_openrlhfs_uses() -> None:
    device = CpuDevice()
    assert torch.ones(1).to(device).device == torch.device("cpu")
    assert torch.device(f"cuda:{device}") == torch.device("cuda", 0)
    assert pickle.loads(pickle.dumps(device)) == device


def test_unpadding_keeps_the_real_rows_in_order(bert_padding: ModuleType) -> None:
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    rows, indices, cumulative, longest, lengths = bert_padding.unpad_input(hidden, mask)
    assert rows.tolist() == [[2, 3], [4, 5], [6, 7]]
    assert indices.tolist() == [1, 2, 3]
    assert cumulative.tolist() == [0, 2, 3]
    assert longest == 2
    assert lengths.tolist() == [2, 1]
    assert bert_padding.index_first_axis(rows, torch.tensor([2, 0])).tolist() == [[6, 7], [2, 3]]


def test_padding_is_the_inverse_of_unpadding(bert_padding: ModuleType) -> None:
    hidden = torch.randn(3, 5, 2, 4, dtype=torch.bfloat16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
    rows, indices, *_ = bert_padding.unpad_input(hidden, mask)
    back = bert_padding.pad_input(rows, indices, 3, 5)
    assert torch.equal(back, hidden * mask[:, :, None, None])
    assert back.dtype == hidden.dtype


def test_the_environment_switches_the_stand_ins_on() -> None:
    code = """
import torch
torch.cuda.set_device(0); torch.cuda.synchronize(); torch.cuda.empty_cache()
import flash_attn
print(torch.zeros(1, device=torch.cuda.current_device()).device, torch.cuda.current_stream())
print(flash_attn.__file__)
"""
    devices, file = python(code, cpu_shim.environment("openrlhf")).splitlines()
    assert devices == "cpu None"
    assert Path(file).is_relative_to(PACKAGES)


def test_without_the_variable_nothing_is_patched() -> None:
    code = (
        "import sys, torch; print(torch.cuda.current_device.__module__, 'recipes' in sys.modules)"
    )
    environment = cpu_shim.environment("openrlhf") | {"KLPLUG_CPU_SHIM": ""}
    assert python(code, environment) == "torch.cuda False"


def test_with_a_gpu_nothing_is_patched(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "from types import SimpleNamespace\n"
        "cuda = SimpleNamespace(is_available=lambda: True, current_device=lambda: 3)\n"
    )
    environment = cpu_shim.environment("openrlhf")
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    code = "import sys, torch; print(torch.cuda.current_device(), 'flash_attn' in str(sys.path))"
    code += "\nfrom importlib.util import find_spec; print(find_spec('recipes.cpu_shim.openrlhf'))"
    out = python(code + "\nprint('recipes.cpu_shim.openrlhf' in sys.modules)", environment)
    assert out.splitlines()[0] == "3 False"
    assert out.splitlines()[-1] == "False"


def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the other one')\n")
    environment = cpu_shim.environment("openrlhf") | {"KLPLUG_CPU_SHIM": ""}
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    assert python("pass", environment) == "the other one"


def test_an_unknown_host_is_an_error() -> None:
    with pytest.raises(ValueError, match="openrlhf"):
        cpu_shim.install("nemo")


def test_weights_travel_over_gloo() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    util = ModuleType("distributed_util")
    openrlhf.sync_weights_over_gloo(util)
    weight = torch.randn(3, 4).to(torch.bfloat16)
    received = torch.empty(3, 4, dtype=torch.bfloat16)

    def member(rank: int, tensor: torch.Tensor) -> None:
        util.stateless_init_process_group("127.0.0.1", port, rank, 2, "cpu").broadcast(
            tensor, src=0
        )

    with ThreadPoolExecutor() as pool:
        list(pool.map(member, (0, 1), (weight, received)))
    assert torch.equal(weight, received)


def test_the_receiving_side_takes_the_trainers_dtype() -> None:
    module = SimpleNamespace(WorkerWrap=type("WorkerWrap", (), {}))
    openrlhf.receive_weights_on_cpu(module)
    loaded: list[tuple[str, torch.Tensor]] = []
    worker = module.WorkerWrap()
    worker._model_update_group = SimpleNamespace(broadcast=lambda tensor, src: tensor.fill_(1.5))
    worker.model_runner = SimpleNamespace(
        model=SimpleNamespace(load_weights=lambda weights: loaded.extend(weights))
    )
    worker.update_weight("lm_head.weight", torch.bfloat16, (2, 2))
    ((name, weight),) = loaded
    assert name == "lm_head.weight"
    assert weight.dtype == torch.bfloat16
    assert weight.tolist() == [[1.5, 1.5], [1.5, 1.5]]


@pytest.mark.parametrize(("asked", "given"), [("bfloat16", "float32"), ("float16", "float16")])
def test_rollouts_are_in_float32(asked: str, given: str) -> None:
    class AsyncEngineArgs:
        def __init__(self, model: str, dtype: str) -> None:
            self.dtype = dtype

    module = ModuleType("arg_utils")
    module.AsyncEngineArgs = AsyncEngineArgs  # type: ignore[attr-defined]
    vllm_cpu.roll_out_in_float32(module)
    assert AsyncEngineArgs(model="m", dtype=asked).dtype == given


def test_linear_layers_keep_their_weights() -> None:
    utils, layer = ModuleType("layer_utils"), torch.nn.Linear(3, 2)
    vllm_cpu.keep_linear_weights(utils)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        x = torch.ones(1, 3)
        assert torch.equal(layer.cpu_linear(x, layer.weight, layer.bias), layer(x))


def test_ray_gets_logical_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLPLUG_CPU_SHIM_RANKS", "2")
    ray = ModuleType("ray")
    ray.init = lambda **options: options  # type: ignore[attr-defined]
    openrlhf.give_ray_logical_gpus(ray)
    options = ray.init(runtime_env={"env_vars": {}})
    assert options["num_gpus"] == 2
    assert options["address"] == "local"
    assert options["runtime_env"] == {"env_vars": {}}
    assert ray.init(num_gpus=5)["num_gpus"] == 5


def test_locks_of_killed_builds_are_removed(tmp_path: Path) -> None:
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    for op in deepspeed_ops.OPS:
        (tmp_path / op).mkdir()
        (tmp_path / op / f"{op}.so").touch()
        (tmp_path / op / "lock").touch()
    with deepspeed_ops.compiled_ops(environment, tmp_path / "log.txt", announce=pytest.fail):
        assert not list(tmp_path.glob("*/lock"))
        in_use = tmp_path / "fused_adam" / "lock"
        in_use.touch()
        with deepspeed_ops.compiled_ops(environment, tmp_path / "log.txt", announce=str):
            assert in_use.exists()


def test_a_compiler_at_work_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 1\necho $2 built\n")
    slow.chmod(0o755)
    monkeypatch.setattr(deepspeed_ops.sys, "executable", str(slow))
    monkeypatch.setattr(deepspeed_ops, "SIGN_OF_LIFE", 0.2)
    said: list[str] = []
    deepspeed_ops.build(dict(os.environ), tmp_path / "log.txt", said.append)
    assert len(said) >= 2 and all("so far" in line for line in said)
    assert (tmp_path / "log.txt").read_text() == "recipes.cpu_shim.deepspeed_ops built\n"


def test_without_a_compiler_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_ops.shutil, "which", lambda name: None)
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    with (
        pytest.raises(RuntimeError, match=r"C\+\+ compiler"),
        deepspeed_ops.compiled_ops(environment, tmp_path / "log.txt", announce=str),
    ):
        pytest.fail("there are no ops")
