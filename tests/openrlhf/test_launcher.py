"""The command line: what kl_type sets, and what each mistake is told before anything starts.

OpenRLHF's own CLI module runs up to the point where it would start Ray.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from klplug_openrlhf import launcher


class Reached(Exception):
    """OpenRLHF's train() asked for Ray: the settings are final."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the launcher with these words; returns OpenRLHF's final args and ray.init's keywords."""
    import ray

    model, data = tmp_path / "model", tmp_path / "train.jsonl"
    model.mkdir()
    data.write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")

    def go(*words: str) -> tuple[SimpleNamespace, dict[str, Any]]:
        caught: dict[str, Any] = {}

        def init(*args: Any, **kwargs: Any) -> None:
            caught["init"] = kwargs
            frame = sys._getframe()
            while frame is not None and frame.f_code.co_name != "train":
                frame = frame.f_back  # type: ignore[assignment]
            caught["args"] = frame.f_locals["args"]
            raise Reached

        # Set through monkeypatch, so that the launcher's own wrapping is undone afterwards.
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", PARSE_ARGS)
        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        defaults = (
            "--actor.model_name_or_path", str(model), "--data.prompt_dataset", str(data),
            "--data.input_key", "question", "--data.label_key", "answer",
            "--reward.remote_url", "reward.py", "--vllm.num_engines", "1",
            "--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "8",
        )  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["klplug", *defaults, *words])
        with pytest.raises(Reached):
            launcher.main()  # SystemExit goes through to the test
        return caught["args"], caught["init"]

    return go


PARSE_ARGS = argparse.ArgumentParser.parse_args


def error_of(run: Any, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        run(*words)
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("klplug: error: ") and len(error.strip().splitlines()) == 1
    return error


KL = ("--klplug.kl_type", "k2_as_loss", "--klplug.kl_coef", "1e-3")


def test_one_key_decides(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    args, init = run(*KL)
    assert args.algo.kl.use_loss is True
    assert args.algo.kl.estimator == "k2_as_loss"
    assert args.algo.kl.init_coef == 1e-3
    assert args.klplug.kl_type == "k2_as_loss" and args.klplug.kl_coef == 1e-3
    assert args.algo.advantage.is_correction_level == "off"
    assert init["runtime_env"]["worker_process_setup_hook"] == launcher.SETUP_HOOK
    # OpenRLHF's own environment for its workers stays.
    assert init["runtime_env"]["env_vars"]["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"] == "1"
    out = capsys.readouterr().out
    assert "kl_type=k2_as_loss kl_coef=0.001" in out and "--algo.kl.use_loss=True" in out


def test_aliases_and_options_are_canonical(run: Any) -> None:
    args, _ = run("--klplug.kl_type", "low_var_kl_as_loss, cap=5.0", "--klplug.kl_coef", "0.1")
    assert args.klplug.kl_type == args.algo.kl.estimator == "k3_as_loss,cap=5"


def test_none_loads_no_reference(run: Any) -> None:
    args, _ = run("--klplug.kl_type", "none")
    assert args.algo.kl.init_coef == 0 and args.algo.kl.use_loss is False


def test_ratio_rollout_turns_the_recording_on(run: Any) -> None:
    kl = ("--klplug.kl_type", "k2_as_loss,ratio=rollout", "--klplug.kl_coef", "0.1")
    args, _ = run(*kl)
    assert args.algo.advantage.is_correction_level == "token"  # the only switch that records
    assert args.klplug.records_for_kl is True
    args, _ = run(*kl, "--algo.advantage.is_correction_level", "token")
    assert args.klplug.records_for_kl is False  # the user wants the correction


def test_a_kl_type_as_the_hosts_own_estimator(run: Any) -> None:
    args, _ = run("--algo.kl.estimator", "k3_as_loss", "--algo.kl.init_coef", "0.02")
    assert args.klplug.kl_type == "k3_as_loss" and args.klplug.kl_coef == 0.02
    assert args.algo.kl.use_loss is True


def test_flags_that_agree_are_fine(run: Any) -> None:
    args, _ = run(
        *KL,
        "--algo.kl.use_loss",
        "--algo.kl.estimator",
        "k2",
        "--algo.kl.init_coef",
        "1e-3",
        "--algo.kl.unbiased_gradient",
    )
    assert args.klplug.kl_type == "k2_as_loss"


def test_whitening_is_said(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kl = ("--klplug.kl_type", "k1_in_reward", "--klplug.kl_coef", "0.1")
    run(*kl, "--algo.advantage.estimator", "reinforce_baseline")
    assert "reinforce_baseline whitens" in capsys.readouterr().out
    run(*kl)
    assert "whitens" not in capsys.readouterr().out


def test_adaptive_controller(run: Any) -> None:
    args, _ = run(*KL, "--klplug.kl_ctrl", "adaptive", "--klplug.kl_target", "0.05")
    assert args.klplug.kl_ctrl == "adaptive" and args.klplug.kl_target == 0.05


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), ["--klplug.kl_type is missing", "k2_as_loss"]),
        (("--klplug.kl_type", "k2_as_los", "--klplug.kl_coef", "1"), ["Did you mean"]),
        (("--klplug.kl_type", "k3", "--klplug.kl_coef", "1"), ["k3_as_loss", "k3_in_reward"]),
        (("--algo.kl.estimator", "low_var_kl"), ["k3_as_loss", "k3_in_reward"]),
        (("--klplug.kl_type", "k2_as_loss,caps=3", "--klplug.kl_coef", "1"), ["caps", "'cap'"]),
        (("--klplug.kl_type", "k2_as_loss"), ["needs a kl_coef"]),
        (("--klplug.kl_type", "k2_as_loss", "--klplug.kl_coef", "-1"), ["-1", "positive"]),
        (("--klplug.kl_type", "k2_as_loss", "--klplug.kl_coef", "nan"), ["nan", "finite"]),
        (("--klplug.kl_type", "k2_as_loss", "--klplug.kl_coef", "0"), ["do nothing", "none"]),
        (("--klplug.kl_type", "none", "--klplug.kl_coef", "0.1"), ["takes no kl_coef"]),
        (
            ("--klplug.kl_type", "k1_in_reward", "--klplug.kl_coef", "1", "--algo.kl.use_loss"),
            ["--algo.kl.use_loss", "--klplug.kl_type k1_in_reward"],
        ),
        ((*KL, "--algo.kl.estimator", "k3"), ["--algo.kl.estimator k3", "k2_as_loss"]),
        ((*KL, "--algo.kl.estimator", "banana"), ["banana"]),
        ((*KL, "--algo.kl.init_coef", "0.5"), ["--algo.kl.init_coef 0.5", "0.001"]),
        ((*KL, "--algo.kl.target", "0.1"), ["--algo.kl.target", "--klplug.kl_target"]),
        ((*KL, "--algo.kl.horizon", "100"), ["--algo.kl.horizon", "--klplug.kl_horizon"]),
        (
            ("--klplug.kl_type", "k3_as_loss", "--klplug.kl_coef", "1",
             "--algo.kl.unbiased_gradient"),
            ["--algo.kl.unbiased_gradient", "k2_as_loss"],
        ),
        ((*KL, "--klplug.kl_ctrl", "adaptive"), ["kl_target"]),
        ((*KL, "--klplug.kl_ctrl", "pid"), ["pid", "fixed, adaptive"]),
        ((*KL, "--klplug.kl_target", "0.1"), ["kl_target", "adaptive"]),
        (
            (*KL[:1], "k1_in_reward", *KL[2:], "--actor.loss_agg_mode", "seq-mean-token-mean",
             "--algo.advantage.estimator", "reinforce_baseline"),
            ["reinforce_baseline", "seq-mean-token-mean", "group_norm"],
        ),
        (
            (*KL[:1], "k2_as_loss,ratio=rollout", *KL[2:], "--vllm.num_engines", "0"),
            ["--vllm.num_engines", "ratio=old"],
        ),
        ((*KL, "--actor.model_name_or_path", "./no/such/model"), ["no such path", "no/such/model"]),
        ((*KL, "--data.prompt_dataset", "./none.jsonl"), ["no such path", "none.jsonl"]),
        ((*KL, "--data.input_key", "problem"), ["'problem'", "question, answer"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_line(
    words: tuple[str, ...], told: list[str], run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(run, capsys, *words)
    for word in told:
        assert word in error


def test_an_empty_data_file_is_named(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty" in error_of(run, capsys, *KL, "--eval.dataset", str(empty))


def test_klplug_disable_stops_the_launcher(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KLPLUG_DISABLE", "1")
    assert "KLPLUG_DISABLE" in error_of(run, capsys, *KL)


def test_help_shows_both(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        run("--help")
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert "--klplug.kl_type" in out and "--algo.kl.use_loss" in out


def test_a_setup_hook_of_the_users_own_is_not_overwritten(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = {"runtime_env": {"worker_process_setup_hook": "mine.setup"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert "mine.setup" in error_of(run, capsys, *KL)
    job["runtime_env"]["worker_process_setup_hook"] = launcher.SETUP_HOOK
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    _, init = run(*KL)
    assert "worker_process_setup_hook" not in init["runtime_env"]  # the job's own is enough
