"""Whole runs: the real trainer, DeepSpeed, Ray and vLLM, started as a user starts them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from recipes import cpu_shim
from recipes.quickstart import openrlhf, run
from recipes.quickstart.openrlhf import step_metrics
from recipes.quickstart.progress import Metrics
from recipes.quickstart.settings import HERE, TINY, settings
from recipes.shared.processes import HostProcesses
from tests.openrlhf.command_line import spelled
from tests.references import moved
from tests.releases import release
from tests.stored import drawn

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("KLPLUG_TEST_MARK") == mark
    except (psutil.Error, OSError):
        return False


@pytest.mark.smoke
def test_quickstart_of_two_steps(tmp_path: Path) -> None:
    """`make quickstart`, shortened: its files say what happened, and nothing is left running."""
    out, mark = tmp_path / "run", str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "recipes.quickstart", "--steps", "2", "--out", str(out),
         "--kl-type", "k2_as_loss,ratio=rollout"],
        cwd=ROOT,
        env=os.environ | {"KLPLUG_TEST_MARK": mark},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["host"] == "openrlhf" and summary["host_version"] == "0.11.2"
    assert summary["kl_type"] == "k2_as_loss,ratio=rollout"
    assert summary["steps"] == 2
    assert summary["klplug_active"] is True
    for name in ("accuracy_before", "accuracy_after"):
        assert 0.4 < summary[name] < 1
    assert 0 < summary["kl_last"] < 5
    assert summary["seconds"] > 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["klplug/active"] == 1 for line in lines)
    # vLLM's own log-probs were recorded: they differ from the trainer's, a little.
    assert 0.9 < lines[0]["klplug/ess"] < 1
    assert "vllm_kl" not in lines[0]  # and the policy loss was not corrected by them
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    log = (out / "log.txt").read_text()
    for process in ("the trainer", "a policy actor"):
        assert f"active in {process}" in log
    assert not [process.name() for process in psutil.process_iter() if marked(process, mark)]


@pytest.fixture
def trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[Metrics], str]]:
    """OpenRLHF's command of the quickstart with other words at its end: its steps, and its log."""

    def go(
        kl_type: str,
        *words: str,
        steps: int = 2,
        gpus: int = 1,
        without: str = "",
        version: str | None = None,
    ) -> tuple[list[Metrics], str]:
        made = settings(steps=steps, kl_type=kl_type)
        prompts, log = tmp_path / "prompts.jsonl", tmp_path / "log.txt"
        run.write_prompts(made, prompts)
        log.write_text("")
        command = openrlhf.command(made, made.recipe, HERE / "policy", prompts, tmp_path / "policy")
        command = [word for word in command if word != without]
        if version is not None:
            folder = release("openrlhf", version)
            monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
            command = spelled(command, (folder / "openrlhf" / "utils" / "config.py").exists())
        with HostProcesses() as host:
            environment = host.environment(cpu_shim.environment("openrlhf", gpus))
            status = host.start([*command, *words], environment, tmp_path, log).wait(timeout=900)
        text = log.read_text(errors="replace")
        assert status == 0, run.last_lines(log)
        steps_of = [m for line in text.splitlines() if (m := step_metrics(line)) is not None]
        return steps_of, text

    return go


def test_an_adaptive_run_is_saved_and_resumed(
    trained: Callable[..., tuple[list[Metrics], str]], tmp_path: Path
) -> None:
    words = (
        "--klplug.kl_ctrl", "adaptive", "--klplug.kl_target", "1e-5", "--klplug.kl_horizon", "1000",
        "--ckpt.save_steps", "2", "--ckpt.path", str(tmp_path / "checkpoints"),
    )  # fmt: skip
    half = str(2 * TINY.prompts)
    first, _ = trained("k1_in_reward,baseline=group", *words, "--data.max_samples", half, steps=4)
    assert [m["step"] for m in first] == [1, 2]
    assert first[0]["klplug/kl_coef"] == 0.01
    # At the reference its logarithm falls by 0.2 of the samples of a step over the horizon.
    samples = TINY.prompts * TINY.samples / 1000
    assert first[1]["klplug/kl_coef"] == pytest.approx(0.01 * math.exp(-0.2 * samples), rel=1e-6)
    last = first[1]["klplug/kl_coef"]
    error = min(max(first[1]["klplug/kl_before_update"] / 1e-5 - 1, -0.2), 0.2)

    compared = "k2_as_loss,horizon=sequence,baseline=group"
    resumed, log = trained(compared, *words, "--ckpt.load_enable", steps=4)
    assert [m["step"] for m in resumed] == [3, 4]
    assert resumed[0]["klplug/kl_coef"] == pytest.approx(last * math.exp(error * samples), rel=1e-6)
    assert "active in a policy actor (pid" in log and f"kl_type={compared} kl_coef" in log
    assert f"WARNING: resuming with kl_type={compared} a run" in log
    assert "trained with kl_type=k1_in_reward,baseline=group:" in log


def test_asynchronous_training(trained: Callable[..., tuple[list[Metrics], str]]) -> None:
    steps, log = trained(
        "k3_in_reward+k2_as_loss,head=combined",
        "--train.async_enable",
        "--train.colocate_actor_ref",
        gpus=2,
        without="--train.colocate_all",
    )
    assert [m["step"] for m in steps] == [1, 2]
    assert all(m["klplug/active"] == 1 for m in steps)
    assert "TrainingActor" in log and "active in the trainer" in log
    assert "kl_type=k3_in_reward+k2_as_loss,head=combined kl_coef=0.01" in log


def test_the_sampler_as_the_trust_region(
    trained: Callable[..., tuple[list[Metrics], str]],
) -> None:
    """No reference model is loaded, and the policy is held to the engine's own log-probs."""
    steps, log = trained("k2_as_loss,reference=rollout,bound=1", "--actor.adam.lr", "1e-3", steps=3)
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert all(m["klplug/active"] == 1 for m in steps)
    assert "kl_type=k2_as_loss,bound=1,reference=rollout kl_coef=0.01" in log
    assert "ReferenceModelActor" not in log and "PolicyModelActor" in log
    # What is left is between engine and trainer: float32 and bfloat16.
    own = "klplug/k2_as_loss.bound-1.reference-rollout/k3"
    assert all(0 < m[own] < 0.01 and "klplug/k3" not in m for m in steps)
    assert "vllm_kl" not in steps[0]


def test_monitor_measures_a_kl_that_nothing_holds(
    trained: Callable[..., tuple[list[Metrics], str]],
) -> None:
    steps, log = trained("monitor", "--actor.adam.lr", "1e-3", steps=3)
    assert "ReferenceModelActor" in log and "kl_type=monitor; sets" in log
    assert [m["klplug/kl_coef"] for m in steps] == [0, 0, 0]
    assert steps[0]["klplug/kl_before_update"] == 0  # it starts at the reference
    # The policy has moved; the first step is warm-up.
    assert steps[2]["klplug/kl_before_update"] > 0 and steps[2]["klplug/k3"] > 0
    assert steps[2]["kl"] == 0  # of the loss, in which there is none


def test_two_references_under_a_schedule_and_a_weight_of_the_whole_step(
    trained: Callable[..., tuple[list[Metrics], str]],
) -> None:
    kl_type = "0.3*k2_as_loss,reference=old+0.7*k2_as_loss,weight=difficulty"
    schedule = "--klplug.kl_ctrl linear --klplug.kl_end 0 --klplug.kl_steps 4"
    steps, log = trained(kl_type, *schedule.split(), steps=3)
    assert f"kl_type={kl_type} kl_coef=0.01" in log and "ReferenceModelActor" in log
    assert "weight=difficulty (klplug" in log
    assert [m["klplug/kl_coef"] for m in steps] == pytest.approx([0.01, 0.0075, 0.005])
    weighted = "klplug/0.7xk2_as_loss.weight-difficulty"
    assert all(0 < m[f"{weighted}/sample_weight_mean"] <= 1 for m in steps)
    assert steps[2][f"{weighted}/k3"] > 0  # moved; the first step is warm-up
    assert "klplug/0.3xk2_as_loss.reference-old/k3" in steps[2]


def test_an_entropy_gate_under_a_pid(trained: Callable[..., tuple[list[Metrics], str]]) -> None:
    """SAFE's two parts: the entropies come from the policy's own actors, in processes of theirs."""
    words = ("--klplug.kl_ctrl", "pid", "--klplug.kl_target", "1")
    steps, log = trained("k2_as_loss,weight=entropy_floor", *words)
    assert "weight=entropy_floor (klplug" in log
    assert all(0.5 <= m["klplug/sample_weight_mean"] < 20 for m in steps)
    # At the reference, 1 below the target, the error is 0.8 outside the band.
    coefficients = [m["klplug/kl_coef"] for m in steps]
    assert coefficients == pytest.approx([0.01, 0.01 * math.exp(-0.03 * 0.8)], rel=1e-4)


def test_the_square_root_of_chi2_between_answers(
    trained: Callable[..., tuple[list[Metrics], str]],
) -> None:
    kl_type = "chi2_as_loss,horizon=answer,weight=root"
    steps, log = trained(kl_type, "--actor.adam.lr", "1e-3", steps=3)
    assert f"kl_type={kl_type} kl_coef=0.01" in log
    assert steps[0]["klplug/sample_weight_mean"] == 0  # at the reference the root has no gradient
    assert steps[2]["klplug/sample_weight_mean"] > 0 and steps[2]["klplug/coef_max"] > 0


def test_the_reward_acts_through_the_posterior(
    trained: Callable[..., tuple[list[Metrics], str]],
) -> None:
    kl_type = "js_as_loss,reference=posterior"
    steps, log = trained(kl_type, "--actor.adam.lr", "1e-3", steps=3)
    assert f"kl_type={kl_type} kl_coef=0.01" in log and "ReferenceModelActor" in log
    assert [m["policy_loss"] for m in steps] == [0, 0, 0]
    assert all(m["klplug/coef_max"] > 0 for m in steps)
    assert steps[2]["klplug/k3"] > 0  # to ref, which it has left


def test_the_oldest_release_that_is_served(
    trained: Callable[..., tuple[list[Metrics], str]],
) -> None:
    steps, log = trained("k1_in_reward+k3_as_loss,ratio=rollout", steps=3, version="0.9.10")
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert all(m["klplug/active"] == 1 for m in steps)
    assert steps[2]["klplug/k3"] > 0  # the policy has moved; the first step is warm-up
    assert 0.9 < steps[0]["klplug/ess"] < 1 and "vllm_kl" not in steps[0]
    assert "kl_type=k1_in_reward+k3_as_loss,ratio=rollout kl_coef=0.01" in log
    for process in ("the trainer", "a policy actor"):
        assert f"active in {process}" in log


def test_the_references_own_answers_stand_in_for_it(
    trained: Callable[..., tuple[list[Metrics], str]], tmp_path: Path
) -> None:
    """Nothing but a whole run shows that no reference is loaded, and that its actors read them."""
    path = drawn(tmp_path)
    steps, log = trained("js_as_loss", "--klplug.source", str(path), steps=3)
    assert f" source={path}; sets" in log and "ReferenceModelActor" not in log
    assert all(m["klplug/active"] == 1 and "klplug/kl" not in m for m in steps)
    # The policy starts at the reference, up to bfloat16, and its first step is warm-up.
    first, *_, last = (m["klplug/source/forward_kl"] for m in steps)
    assert abs(first) < 0.02 and last != first
    assert 0.9 < steps[0]["klplug/source/weight_mean"] < 1.1


def test_a_teacher_beside_a_reference_of_the_users_own_that_moves_saved_and_resumed(
    trained: Callable[..., tuple[list[Metrics], str]], tmp_path: Path
) -> None:
    """Each step's reference is where the one before ended, a KL of 0; the teacher stays.

    The teacher's engine is built and asked in the reference's own process, which no other test
    starts.
    """
    kl_type = "0.5*k2_as_loss+0.5*k2_as_loss,reference=teacher"
    place = moved(tmp_path)
    words = (
        "--klplug.teacher", str(place),
        "--klplug.ref_model", str(place), "--klplug.ref_update", "reset:1",
        "--ckpt.save_steps", "2", "--ckpt.path", str(tmp_path / "checkpoints"),
    )  # fmt: skip
    half = str(2 * TINY.prompts)
    first, log = trained(kl_type, *words, "--data.max_samples", half, steps=4)
    assert f"ref_model={place}" in log and "ref_update=reset:1" in log and f"teacher={place}" in log
    assert log.count("active in a policy actor") == 1 and [m["step"] for m in first] == [1, 2]
    assert first[0]["klplug/kl_before_update"] > 0.001  # it does not start at the reference
    assert abs(first[1]["klplug/kl_before_update"]) < 1e-6
    assert first[0]["klplug/coef_max"] > 0

    resumed, log = trained(kl_type, *words, "--ckpt.load_enable", steps=4)
    assert "the reference goes on as the checkpoint has it, last moved after step 2" in log
    assert [m["step"] for m in resumed] == [3, 4]
    assert all(abs(m["klplug/kl_before_update"]) < 1e-6 for m in resumed)
    to_teacher = "klplug/0.5xk2_as_loss.reference-teacher/k1"
    assert all(m[to_teacher] > 0.001 for m in [*first, *resumed])
