"""klplug on every node of a Ray cluster: what carries it there, and what happens where it is not.

Two nodes on this machine, each with its own `ray start`; the second with klplug or without.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import klplug
from klplug.hosting.host import hosts
from recipes.quickstart import run
from recipes.quickstart.settings import HERE, settings
from recipes.shared.processes import HostProcesses
from tests.cluster.nodes import (
    ROOT,
    SECOND,
    WITH_KLPLUG,
    Cluster,
    environment_without_klplug,
    on_cpu,
)
from tests.conftest import NAMED

pytestmark = pytest.mark.slow
ON_EACH = pytest.mark.parametrize("host", NAMED)

# As each host's command connects: OpenRLHF's launcher wraps ray.init, verl's hook waits for it.
CONNECT = {
    "openrlhf": "import ray, wrapt; from klplug_openrlhf.launcher import init_ray\n"
    "wrapt.wrap_function_wrapper(ray, 'init', init_ray)",
    "verl": "import ray; from klplug.hosting.cluster import after_ray_init\n"
    "from klplug_verl.hooks import check_cluster\nafter_ray_init(check_cluster)",
}
FUNCTION = {"openrlhf": "openrlhf.models.utils.compute_approx_kl",
            "verl": "verl.workers.utils.losses.ppo_loss"}  # fmt: skip
DRIVER = """
import json, sys
{connect}
ray.init(runtime_env=json.loads(sys.argv[1]), log_to_driver=False)

def whose(function):
    import importlib, klplug, ray
    module, _, name = function.rpartition('.')
    importlib.import_module(module.partition('.')[0])
    found = getattr(importlib.import_module(module), name)
    return ray.util.get_node_ip_address(), hasattr(found, '__klplug__'), klplug.__file__

alive = {{n['NodeManagerAddress']: n['NodeID'] for n in ray.nodes() if n['Alive']}}
where = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
there = where(alive[sys.argv[2]], soft=False)
print(json.dumps(ray.get(ray.remote(whose).options(scheduling_strategy=there).remote(sys.argv[3]))))
"""
# The command's own klplug, of another version than the nodes'.
ANOTHER = "import klplug; klplug.__version__ = '0.0.1'\n"


def driver(host: str, before: str = "", **runtime_env: object) -> list[str]:
    code = before + DRIVER.format(connect=CONNECT[host])
    return ["-c", code, json.dumps(runtime_env), SECOND, FUNCTION[host]]


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("klplug: error: ")]
    return error


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with HostProcesses() as processes:
        yield Cluster(processes)


@ON_EACH
def test_a_worker_of_another_node_runs_klplugs_function(cluster: Cluster, host: str) -> None:
    with cluster.node(sys.executable, on_cpu(host, WITH_KLPLUG)):
        done = cluster.run(driver(host))
        other = cluster.run(driver(host, before=ANOTHER))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [SECOND, True, klplug.__file__]
    assert f"on {SECOND}" in error_of(other) and f"klplug {klplug.__version__};" in error_of(other)


@ON_EACH
def test_a_node_without_klplug_stops_the_command_unless_the_job_brings_it(
    cluster: Cluster, host: str, tmp_path: Path
) -> None:
    """The stock command, up to where it would place its workers; then `py_modules`, as
    docs/cluster.md has it."""
    adapters = [str(ROOT / "adapters" / package) for package in hosts()[host].packages]
    brings: dict[str, object] = {"py_modules": [str(ROOT / "klplug"), *adapters]}
    if host == "verl":  # sent as folders it has no entry points
        brings["env_vars"] = {"VERL_USE_EXTERNAL_MODULES": "klplug_verl"}
    bare = environment_without_klplug(tmp_path / "bare")
    with cluster.node(bare, on_cpu(host)):
        stopped = cluster.run(command(host, tmp_path), on_cpu(host, WITH_KLPLUG))
        done = cluster.run(driver(host, **brings))
    for word in (SECOND, f"No module named 'klplug_{host}'", "Install klplug in", host):
        assert word in error_of(stopped)
    assert "active in" not in stopped.stdout
    assert done.returncode == 0, done.stderr
    node, is_klplugs, path = json.loads(done.stdout.splitlines()[-1])
    assert node == SECOND and is_klplugs
    assert Path(path).is_relative_to(cluster.scratch)  # Ray's copy


# One logical GPU a node, so two ranks can only be on both.
OVER_TWO = {
    "openrlhf": ["--actor.num_nodes", "2", "--actor.num_gpus_per_node", "1",
                 "--ref.num_nodes", "2", "--ref.num_gpus_per_node", "1"],
    "verl": ["trainer.nnodes=2", "trainer.n_gpus_per_node=1"],
}  # fmt: skip


@pytest.mark.smoke
@ON_EACH
def test_the_quickstart_trains_over_two_nodes(host: str, tmp_path: Path) -> None:
    made = settings(host=host, steps=2, kl_type="k2_as_loss", ranks=2)
    prompts, variables = tmp_path / "prompts.jsonl", on_cpu(host, WITH_KLPLUG)
    run.write_prompts(made, prompts)
    side = run.host_side(made)
    _, *words = side.command(made, made.recipe, HERE / "policy", prompts, tmp_path / "trained")
    # Ray takes no resources from who joins a cluster.
    words = [word for word in words if "ray_kwargs" not in word]
    with HostProcesses() as processes:
        cluster = Cluster(processes, variables, "--num-gpus=1")
        with cluster.node(sys.executable, variables, "--num-gpus=1"):
            done = cluster.run([*words, *OVER_TWO[host]], variables, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed = (done.stdout + done.stderr).splitlines()
    steps = {m["step"]: m for line in printed if (m := side.step_metrics(line)) is not None}
    assert list(steps) == [1, 2]
    assert all(metrics["klplug/active"] == 1 for metrics in steps.values())


def command(host: str, folder: Path) -> list[str]:
    policy = ROOT / "recipes" / "quickstart" / "policy"
    if host == "openrlhf":
        data = folder / "train.jsonl"
        data.write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
        return [
            "-m", "klplug_openrlhf", "--klplug.kl_type", "k2_as_loss", "--klplug.kl_coef", "1e-3",
            "--actor.model_name_or_path", str(policy), "--data.prompt_dataset", str(data),
            "--data.input_key", "question", "--data.label_key", "answer",
            "--reward.remote_url", "reward.py", "--vllm.num_engines", "1",
            "--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "8",
        ]  # fmt: skip
    import pyarrow
    import pyarrow.parquet

    path = folder / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1+1"]}), path)
    return [
        "-m", "verl.trainer.main_ppo", "+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=1e-3",
        f"data.train_files={path}", f"data.val_files={path}", "algorithm.adv_estimator=grpo",
        f"actor_rollout_ref.model.path={policy}", "trainer.device=cpu",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.rollout.name=transformers_cpu",
        "hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none",
    ]  # fmt: skip
