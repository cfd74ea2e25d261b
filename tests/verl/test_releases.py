"""Releases of verl before 0.9, from their real wheels: the same tests, in processes of their own.

The environment is the tested release's; those wheels import in it. They know no entry points, so
klplug comes as it comes to their users, through ``VERL_USE_EXTERNAL_MODULES``.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from klplug_verl.hooks import of_run
from omegaconf import OmegaConf

from klplug.hosting.patching import Hook
from recipes import cpu_shim
from tests.releases import release
from tests.verl.test_plugin import files

ROOT = Path(__file__).resolve().parents[2]
SAME = (
    "test_plugin.py::test_every_hook_is_there",
    "test_plugin.py::test_a_hook_that_moved_or_changed_is_named",
    "test_one_meaning.py",
    "test_settings.py::test_a_policy_loss_divides_by_length_where_verls_own_does",
    "test_trainer.py::test_the_force_is_beta_whatever_the_groups_std",
    "test_trainer.py::test_the_coefficient_follows_the_measured_kl_in_every_placement",
    "test_trainer.py::test_a_loss_without_klplugs_kl_stops_the_run",
    "test_trainer.py::test_state_is_saved_and_restored",
    "test_trainer.py::test_the_baseline_of_the_whole_batch_goes_with_the_samples",
    "test_trainer.py::test_the_sampler_as_the_reference_loads_no_model",
)
ONLY = {
    "0.8.0": (
        "test_training_worker.py::test_the_gradient_is_stock_verls",
        "test_training_worker.py::test_distillation_keeps_its_own_kl",
        "test_stored.py::test_the_controllers_coefficient_reaches_it",
        "test_exact.py::test_in_bfloat16_states_take_two_bytes_and_the_gradient_is_close",
        "test_exact.py::test_with_lora_the_reference_is_the_policy_without_its_adapter",
    ),
    "0.7.1": (
        "test_legacy_worker.py",
        "test_exact.py::test_in_bfloat16_states_take_two_bytes_and_the_gradient_is_close",
    ),
}


def run(
    version: str, folder: Path, arguments: Sequence[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if k not in ("KLPLUG_DISABLE", "PYTEST_ADDOPTS")}
    own |= cpu_shim.environment("verl")
    first = [str(release("verl", version)), str(ROOT), str(ROOT / "adapters"), own["PYTHONPATH"]]
    own |= {
        "PYTHONPATH": os.pathsep.join(first),
        "VERL_USE_EXTERNAL_MODULES": "klplug_verl",
        "KLPLUG_TEST_HOSTS": "verl",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        env=own,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize("version", ONLY)
def test_the_same_tests_hold(version: str, tmp_path: Path) -> None:
    names = [f"tests/verl/{name}" for name in (*ONLY[version], *SAME)]
    # The version first: a release that is not the one on the path would prove nothing.
    code = (
        f"import sys, verl, pytest; assert verl.__version__ == {version!r}, verl.__file__;"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    done = run(version, ROOT, ["-c", code, "-q", "-x", "-p", "no:cacheprovider", *names])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout and " passed" in done.stdout


def parameters(folder: Path, hook: Hook) -> tuple[str, ...] | None:
    """Of a hooked function in a release that can't be imported here; ``None`` if it isn't there."""
    path = folder / f"{hook.module.replace('.', '/')}.py"
    body = ast.parse(path.read_text()).body if path.exists() else []
    found: ast.stmt | None = None
    for name in hook.name.split("."):
        found = next((node for node in body if getattr(node, "name", None) == name), None)
        body = getattr(found, "body", [])
    if not isinstance(found, ast.FunctionDef):
        return None
    return tuple(argument.arg for argument in found.args.args)


def test_what_keeps_0_7_0_from_running_is_known() -> None:
    """It needs transformers 4. Its first difference stops a run before anything starts."""
    folder = release("verl", "0.7.0")
    different = []
    for hook in of_run(OmegaConf.create({"trainer": {"use_legacy_worker_impl": "auto"}})):
        found = parameters(folder, hook)
        if found is None or not set(hook.parameters) <= set(found):
            different.append((hook.name, found))
    assert different == [("need_reference_policy", ("role_worker_mapping",))]


@pytest.mark.parametrize("version", ONLY)
def test_a_command_that_lacks_the_variable_is_refused(version: str, tmp_path: Path) -> None:
    asks = ("+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=1")
    main = ["-m", "verl.trainer.main_ppo", *files(tmp_path), *asks]
    done = run(version, tmp_path, main, VERL_USE_EXTERNAL_MODULES="")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"klplug: error: verl {version} did not load klplug" in done.stderr
    assert "VERL_USE_EXTERNAL_MODULES=klplug_verl in the environment" in done.stderr


def test_main_ppo_sync_is_refused_by_name(tmp_path: Path) -> None:
    asks = ("+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=1")
    main = ["-m", "verl.trainer.main_ppo_sync", *files(tmp_path), *asks]
    done = run("0.8.0", tmp_path, main)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "main_ppo_sync" in done.stderr and "Use verl.trainer.main_ppo" in done.stderr


def test_the_megatron_worker_of_0_7_is_refused_by_name(tmp_path: Path) -> None:
    asks = ("+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=1")
    megatron = "actor_rollout_ref.actor.strategy=megatron"
    main = ["-m", "verl.trainer.main_ppo", *files(tmp_path), *asks, megatron]
    done = run("0.7.1", tmp_path, main)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "strategy=megatron" in done.stderr and "use_legacy_worker_impl=disable" in done.stderr


# Whole runs, with the release first on the path of every process.


@pytest.mark.slow
@pytest.mark.parametrize("version", ONLY)
def test_a_whole_run_with_a_kl_in_loss_and_reward(version: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--host", "verl", "--kl-type", "k3_in_reward+k3_as_loss", "--steps", "2")
    done = run(version, ROOT, ["-m", "recipes.quickstart", *options, "--out", str(out)])
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["host_version"] == version and summary["klplug_active"] is True
    log = (out / "log.txt").read_text()
    assert log.count("active in the trainer") == 1 and log.count("active in a worker") == 1
    first, second = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert abs(first["klplug/k3"]) < 1e-6 < second["klplug/k3"]
    assert second["klplug/kl"] == pytest.approx(second["klplug/kl_before_update"], rel=1e-3)


@pytest.mark.slow
def test_workers_that_lack_the_variable_end_the_run_before_it_starts(tmp_path: Path) -> None:
    asks = ("+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=1")
    own_ray = {"address": "local", "include_dashboard": False, "object_store_memory": 100 * 2**20}
    ray = [f"+ray_kwargs.ray_init.{key}={value}" for key, value in own_ray.items()]
    without = "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES=''"
    main = ["-m", "verl.trainer.main_ppo", *files(tmp_path), *asks, *ray, without]
    done = run("0.8.0", tmp_path, main)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "verl did not load it" in done.stderr
    assert "VERL_USE_EXTERNAL_MODULES=klplug_verl is in the environment" in done.stderr
