"""The quickstart on verl: its command, its log, and whole runs through the real thing."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes import cpu_shim
from recipes.quickstart import run, verl
from recipes.quickstart.settings import HERE, TINY, settings
from recipes.shared.processes import HostProcesses
from tests.references import moved
from tests.stored import drawn

ROOT = Path(__file__).resolve().parents[2]


def command(tmp_path: Path, **own: Any) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"question": "1+1?", "answer": "1+1=2\n#### 2"}) + "\n")
    made = settings(host="verl", **own)
    return verl.command(made, TINY, "owner/model", prompts, tmp_path / "policy")


def test_a_kl_type_is_two_overrides_on_the_stock_command(tmp_path: Path) -> None:
    words = command(tmp_path, kl_type="k2_as_loss,ratio=none", kl_coef=0.02)
    assert "verl.trainer.main_ppo" in words
    assert [word for word in words if "kl" in word.partition("=")[0]] == [
        "+klplug.kl_type='k2_as_loss,ratio=none'",
        "+klplug.kl_coef=0.02",
    ]
    assert "+klplug.kl_type=none" in command(tmp_path, kl_type="none")


def test_stock_runs_without_klplug(tmp_path: Path) -> None:
    words = command(tmp_path, kl_type="stock:k3", kl_coef=0.02)
    assert not any("klplug." in word for word in words)
    assert "actor_rollout_ref.actor.kl_loss_type=k3" in words
    assert "algorithm.use_kl_in_reward=True" in command(tmp_path, kl_type="stock:k1")


def test_the_problems_are_verls_rows(tmp_path: Path) -> None:
    import pyarrow.parquet

    command(tmp_path)
    (row,) = pyarrow.parquet.read_table(tmp_path / "policy" / "prompts.parquet").to_pylist()
    assert row["prompt"] == [{"role": "user", "content": "1+1?"}]
    assert row["reward_model"]["ground_truth"].endswith("#### 2")


def test_a_step_of_verls_log() -> None:
    line = (
        "\x1b[36m(TaskRunnerV1 pid=7)\x1b[0m step:12 - actor/kl_loss:np.float64(0.25) - "
        "klplug/k3:1.5e-3 - critic/score/mean:0.5 - response_length/mean:20.5 - "
        "actor/grad_norm:nan"
    )
    metrics = verl.step_metrics(line)
    assert metrics is not None
    assert math.isnan(metrics.pop("actor_grad_norm")) and math.isnan(metrics.pop("actor/grad_norm"))
    assert metrics == {
        "step": 12,
        "actor/kl_loss": 0.25,
        "kl": 0.25,
        "klplug/k3": 1.5e-3,
        "critic/score/mean": 0.5,
        "reward": 0.5,
        "response_length/mean": 20.5,
        "response_length": 20.5,
    }
    assert verl.step_metrics("(TaskRunnerV1 pid=7) Training Progress: 1/3") is None


def test_the_reward_is_the_judge_of_the_evaluation() -> None:
    from recipes.shared.reward import compute_score

    assert compute_score("words", "6*6=36\n#### 36", "reasoning\n#### 36") == 1.0
    assert compute_score("words", "#### 35", "#### 36", extra_info={"index": 0}) == 0.0


# Whole runs: Ray, FSDP2, the reference worker, a rollout server.


def quickstart(out: Path, **options: object) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    words = [
        w for key, value in options.items() for w in (f"--{key.replace('_', '-')}", str(value))
    ]
    done = subprocess.run(
        [sys.executable, "-m", "recipes.quickstart", "--host", "verl", "--out", str(out), *words],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("KLPLUG")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), steps, (out / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.smoke
def test_two_ranks_with_a_kl_in_loss_and_reward(tmp_path: Path) -> None:
    summary, steps, log = quickstart(
        tmp_path / "run", kl_type="k3_in_reward+k3_as_loss", steps=2, ranks=2
    )
    assert summary["klplug_active"] is True
    assert summary["kl_type"] == "k3_in_reward+k3_as_loss"
    assert summary["host"] == "verl" and summary["host_version"] == "0.9.1"
    assert log.count("active in the trainer") == 1
    assert log.count("active in a worker") == 2
    assert len(steps) == 2
    # The first step starts at the reference; the second has moved, and both sides measure it.
    assert abs(steps[0]["klplug/k3"]) < 1e-6
    assert steps[1]["klplug/k3"] > 0
    assert steps[1]["klplug/k3"] == pytest.approx(steps[1]["actor/kl_loss"], rel=1e-3)
    assert steps[1]["klplug/kl"] == pytest.approx(steps[1]["klplug/kl_before_update"], rel=1e-3)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 0


@pytest.mark.slow
def test_a_head_and_a_baseline_over_several_updates(tmp_path: Path) -> None:
    kl_type = "js_as_loss,head=combined+k2_as_loss,horizon=sequence,baseline=group"
    summary, steps, log = quickstart(tmp_path / "run", kl_type=kl_type, steps=2, updates=2)
    assert summary["klplug_active"] is True and summary["kl_type"] == kl_type
    assert f"kl_type={kl_type}" in log and log.count("active in a worker") == 1
    # Of the second update only: the first meets the policy that sampled.
    assert 0 < steps[1]["klplug/ess"] < 1
    assert steps[1]["klplug/k3"] > 0 and math.isfinite(steps[1]["actor/grad_norm"])


@pytest.mark.slow
def test_the_kl_over_the_vocabulary_on_two_ranks(tmp_path: Path) -> None:
    summary, steps, log = quickstart(tmp_path / "run", kl_type="exact_as_loss", steps=2, ranks=2)
    assert summary["klplug_active"] is True
    assert summary["kl_type"] == "k2_as_loss,vocab=exact"
    assert log.count("active in a worker") == 2
    assert "vocab=exact keeps the reference's hidden states" in log
    # The first step starts at the reference; the second has moved.
    first, second = (step["klplug/exact_kl"] for step in steps)
    assert 0 <= first < 1e-6 and second > 10 * first
    assert steps[1]["klplug/exact_bytes"] > 0
    assert math.isfinite(steps[1]["actor/grad_norm"])


@pytest.mark.slow
def test_the_sampler_as_the_reference_runs_without_a_reference_model(tmp_path: Path) -> None:
    kl_type = "k2_as_loss,level=prefix,cap=5,mode=mask,bound=0.5,reference=rollout"
    summary, steps, log = quickstart(tmp_path / "run", kl_type=kl_type, steps=2, updates=2)
    assert summary["klplug_active"] is True and summary["kl_type"] == kl_type
    assert log.count("active in a worker") == 1 and "timing_s/ref" not in log
    # The sampler is the policy up to rounding; the second update of a step leaves it. What is
    # to a reference model is not there, for there is none.
    own = "klplug/k2_as_loss.level-prefix.cap-5.mode-mask.bound-0.5.reference-rollout/k3"
    assert 0 < steps[0][own] < 0.01
    assert not {"klplug/k3", "klplug/kl", "klplug/kl_before_update"} & steps[0].keys()


@pytest.mark.slow
def test_monitor_measures_a_kl_that_nothing_holds(tmp_path: Path) -> None:
    summary, steps, log = quickstart(tmp_path / "run", kl_type="monitor", steps=2)
    assert summary["klplug_active"] is True and summary["kl_type"] == "monitor"
    assert log.count("active in a worker") == 1 and "timing_s/ref" in log
    assert [step["actor/kl_loss"] for step in steps] == [0, 0]
    assert steps[1]["klplug/k3"] > 0 and steps[1]["klplug/kl_before_update"] > 0


@pytest.mark.slow
def test_two_references_over_several_updates_and_a_weight_of_the_whole_step(tmp_path: Path) -> None:
    kl_type = "0.3*k2_as_loss,reference=old+0.7*k2_as_loss,weight=difficulty"
    summary, steps, log = quickstart(tmp_path / "run", kl_type=kl_type, steps=2, updates=2)
    assert summary["klplug_active"] is True and summary["kl_type"] == kl_type
    assert "weight=difficulty (klplug" in log
    weighted = "klplug/0.7xk2_as_loss.weight-difficulty"
    assert all(0 < step[f"{weighted}/sample_weight_mean"] <= 1 for step in steps)
    # Only the second update of a step has left the policy of its start.
    assert steps[1][f"{weighted}/k3"] > 0
    assert 0 < steps[1]["klplug/0.3xk2_as_loss.reference-old/k3"] < steps[1]["klplug/k3"]


@pytest.mark.slow
def test_the_square_root_of_chi2_between_answers(tmp_path: Path) -> None:
    kl_type = "chi2_as_loss,horizon=answer,weight=root"
    summary, steps, _ = quickstart(tmp_path / "run", kl_type=kl_type, steps=2, updates=2)
    assert summary["klplug_active"] is True and summary["kl_type"] == kl_type
    # At the reference the root has no gradient; then 1 / (2 sqrt(chi2)), of a chi2 below 1.
    assert steps[0]["klplug/sample_weight_mean"] == 0
    assert steps[1]["klplug/sample_weight_mean"] > 0.5
    assert steps[1]["klplug/coef_max"] > 0


@pytest.mark.slow
def test_the_reward_acts_through_the_posterior(tmp_path: Path) -> None:
    kl_type = "js_as_loss,reference=posterior"
    summary, steps, _ = quickstart(tmp_path / "run", kl_type=kl_type, steps=2)
    assert summary["klplug_active"] is True and summary["kl_type"] == kl_type
    assert [step["actor/pg_loss"] for step in steps] == [0, 0]
    assert all(step["klplug/coef_max"] > 0 and step["actor/grad_norm"] > 0 for step in steps)
    assert steps[1]["klplug/k3"] > 0  # to ref, which it has left


@pytest.mark.slow
def test_a_stock_run_is_a_stock_run(tmp_path: Path) -> None:
    summary, steps, log = quickstart(tmp_path / "run", kl_type="stock:k3", steps=2)
    assert summary["klplug_active"] is False and len(steps) == 2
    assert (
        "klplug 0" in log and "inactive" in log and "active in" not in log.replace("inactive", "")
    )
    assert steps[1]["kl"] > 0


def two_steps(folder: Path, *more: str, kl_type: str = "k2_as_loss") -> tuple[list[Any], str]:
    """A run of verl's command with more words at its end: its steps, and its log."""
    own, log = folder / "run", folder / "log.txt"
    made = settings(host="verl", steps=2, kl_type=kl_type)
    prompts = folder / "prompts.jsonl"
    run.write_prompts(made, prompts)
    own.mkdir()
    words = [*verl.command(made, made.recipe, HERE / "policy", prompts, own), *more]
    with HostProcesses() as host:
        environment = host.environment(cpu_shim.environment("verl", 1))
        assert host.start(words, environment, folder, log).wait(timeout=900) == 0, log.read_text()
    text = log.read_text(errors="replace")
    return [m for line in text.splitlines() if (m := verl.step_metrics(line)) is not None], text


@pytest.mark.slow
def test_the_references_own_answers_stand_in_for_it(tmp_path: Path) -> None:
    """Nothing but a whole run shows that no reference is loaded, and that its workers read them."""
    path = drawn(tmp_path)
    steps, text = two_steps(tmp_path, f"+klplug.source={path}", kl_type="js_as_loss")
    assert f" source={path}; sets" in text
    updates = [m for m in steps if "klplug/active" in m]
    assert len(updates) == 2 and not any("klplug/kl" in m for m in steps)
    # The policy starts at the reference, up to bfloat16.
    assert abs(updates[0]["klplug/source/forward_kl"]) < 0.02
    assert 0.9 < updates[0]["klplug/source/weight_mean"] < 1.1


@pytest.mark.slow
def test_an_entropy_gate_under_a_pid(tmp_path: Path) -> None:
    """SAFE's two parts: the entropies go through verl's own queue."""
    words = ("+klplug.kl_ctrl=pid", "+klplug.kl_target=1")
    steps, text = two_steps(tmp_path, *words, kl_type="k2_as_loss,weight=entropy_floor")
    assert "weight=entropy_floor (klplug" in text
    # max(1/2, 2 / (H + 0.1)), H being the mean entropy that verl logs.
    for step in steps:
        floor = max(0.5, 2 / (step["actor/entropy"] + 0.1))
        assert step["klplug/sample_weight_mean"] == pytest.approx(floor, rel=1e-2)
    # At the reference, 1 below the target, the error is 0.8 outside the band.
    coefficients = [step["klplug/kl_coef"] for step in steps]
    assert coefficients == pytest.approx([0.01, 0.01 * math.exp(-0.03 * 0.8)], rel=1e-4)


@pytest.mark.slow
def test_a_teacher_beside_a_reference_of_the_users_own_that_moves(tmp_path: Path) -> None:
    """The second step's reference is where the first one ended, a KL of 0; the teacher stays.

    Its log-probs go through verl's own queue, for which other tests have a stand-in.
    """
    kl_type = "0.5*k2_as_loss+0.5*k2_as_loss,reference=teacher"
    place = moved(tmp_path)
    words = (f"teacher={place}", f"ref_model={place}", "ref_update=reset:1")
    steps, text = two_steps(tmp_path, *(f"+klplug.{word}" for word in words), kl_type=kl_type)
    assert all(f" {word}" in text for word in words) and len(steps) == 2
    assert text.count("active in a worker") == 1
    assert steps[0]["klplug/kl_before_update"] > 0.001  # it does not start at the reference
    assert abs(steps[1]["klplug/kl_before_update"]) < steps[0]["klplug/kl_before_update"] / 100
    to_teacher = "klplug/0.5xk2_as_loss.reference-teacher/k1"
    assert all(step[to_teacher] > 0.001 for step in steps)
    assert steps[0]["klplug/coef_max"] > 0
