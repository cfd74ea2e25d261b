"""The command line: what kl_type sets, and what each mistake is told before anything starts.

OpenRLHF's own CLI module runs up to the point where it would start Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from klplug_openrlhf import launcher
from klplug_openrlhf.plan import Plan

from klplug import parse
from recipes import cpu_shim
from tests.hosting.test_folder import another_run
from tests.openrlhf.command_line import settled, spelled


@pytest.fixture
def run() -> Any:
    """Run the launcher with these words; returns OpenRLHF's final args and ray.init's keywords."""

    def go(*words: str) -> tuple[Any, dict[str, Any]]:
        defaults = (
            "--actor.model_name_or_path", "hub/model", "--data.prompt_dataset", "hub/data",
            "--reward.remote_url", "reward.py", "--vllm.num_engines", "1",
            "--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "8",
        )  # fmt: skip
        return settled(launcher.main, [*defaults, *words])

    return go


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


def test_monitor_loads_the_reference_and_has_no_strength(run: Any) -> None:
    args, _ = run("--klplug.kl_type", "monitor")
    assert args.algo.kl.init_coef > 0 and args.algo.kl.use_loss  # what loads and keeps it
    plan = Plan.of(args)
    assert plan is not None and plan.is_active and plan.needs_reference
    assert plan.controller().value == 0


def test_ratio_rollout_turns_the_recording_on(run: Any) -> None:
    kl = ("--klplug.kl_type", "k2_as_loss,ratio=rollout", "--klplug.kl_coef", "0.1")
    args, _ = run(*kl)
    assert args.algo.advantage.is_correction_level == "token"  # the only switch that records
    assert args.klplug.records_for_kl is True
    args, _ = run(*kl, "--algo.advantage.is_correction_level", "token")
    assert args.klplug.records_for_kl is False  # the user wants the correction


def test_the_sampler_as_reference_loads_no_reference_model(run: Any) -> None:
    args, _ = run("--klplug.kl_type", "k2_as_loss,reference=rollout", "--klplug.kl_coef", "0.1")
    assert args.algo.kl.init_coef == 0  # which is what OpenRLHF loads one by
    assert args.algo.kl.use_loss is True and args.klplug.kl_coef == 0.1
    assert args.algo.advantage.is_correction_level == "token"
    both = "k3_as_loss+k2_as_loss,reference=rollout"
    args, _ = run("--klplug.kl_type", both, "--klplug.kl_coef", "0.1")
    assert args.algo.kl.init_coef == 0.1


@pytest.mark.parametrize(
    ("kl_type", "words", "told"),
    [
        (
            "k2_as_loss,horizon=sequence",
            ("--actor.loss_agg_mode", "seq-mean-token-mean"),
            "tilted to long answers",
        ),
        ("k2_as_loss,head=combined", ("--actor.dual_clip", "3"), "--actor.dual_clip 3 clips"),
    ],
)
def test_what_may_not_be_expected_is_said(
    kl_type: str,
    words: tuple[str, ...],
    told: str,
    run: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("--klplug.kl_type", kl_type, "--klplug.kl_coef", "0.1", *words)
    assert told in capsys.readouterr().out
    run("--klplug.kl_type", kl_type, "--klplug.kl_coef", "0.1")
    assert "note:" not in capsys.readouterr().out


UNSERVED: list[tuple[str, tuple[str, ...], list[str]]] = [
        ("k2_as_loss,head=combined", ("--actor.policy_loss_type", "gspo"),
         ["--actor.policy_loss_type is gspo", "head=separate"]),
        ("k2_as_loss,head=clipped", ("--actor.policy_loss_type", "gspo"), ["head=clipped"]),
        ("k2_as_loss,weight=difficulty", ("--rollout.n_samples_per_prompt", "1"),
         ["--rollout.n_samples_per_prompt is 1", "weight=difficulty has no other answers"]),
        ("js_as_loss,reference=posterior", ("--rollout.n_samples_per_prompt", "1"),
         ["--rollout.n_samples_per_prompt is 1", "no other answers to estimate Z from"]),
        ("js_as_loss,reference=posterior", ("--actor.policy_loss_type", "gspo"),
         ["--actor.policy_loss_type is gspo", "no policy loss beside it", "Use ppo"]),
        ("exact_as_loss", ("--ds.ring_attn_size", "2"), ["--ds.ring_attn_size 2", "vocab=exact"]),
        ("exact_as_loss", ("--ds.tensor_parallel_size", "2"), ["--ds.tensor_parallel_size 2"]),
        (
            "k2_as_loss,reference=rollout",
            ("--rollout.top_p", "0.9"),
            ["--rollout.top_p 0.9: the sampler's", "whole distribution"],
        ),
        (
            "k2_as_loss,ratio=rollout,horizon=sequence",
            ("--rollout.top_p", "0.9"),
            ["fades with the answer's length"],
        ),
        ("k2_as_loss,reference=rollout", ("--vllm.num_engines", "0"), ["reference=ref"]),
        (
            "k2_as_loss,reference=rollout",
            ("--klplug.kl_ctrl", "adaptive", "--klplug.kl_target", "0.1"),
            ["--klplug.kl_ctrl is adaptive", "the KL to the reference model"],
        ),
        (
            "k2_as_loss,horizon=sequence,baseline=group",
            ("--rollout.n_samples_per_prompt", "1", "--algo.advantage.estimator", "reinforce"),
            ["--rollout.n_samples_per_prompt is 1", "at least 2"],
        ),
        (
            "k2_as_loss,horizon=sequence,baseline=group+js_as_loss,horizon=sequence,baseline=batch",
            (),
            ["one term as loss"],
        ),
        (
            "exact_as_loss+0.5*k2_as_loss,vocab=topk:8",
            (),
            ["2 divergences over the vocabulary", "vocab=sample"],
        ),
        (
            "k1_in_reward,baseline=batch",
            ("--rollout.n_samples_per_prompt", "1", "--rollout.batch_size", "1"),
            ["--rollout.n_samples_per_prompt is 1", "baseline=batch has no other answers"],
        ),
        (
            "k2_as_loss,horizon=sequence,reference=rollout,baseline=group",
            (),
            ["reference=rollout", "Leave it out"],
        ),
        ("k1_in_reward,baseline=batch", ("--actor.policy_loss_type", "gspo"), ["baseline=batch"]),
        (
            "k1_in_reward,baseline=batch",
            ("--algo.advantage.estimator", "reinforce", "--algo.advantage.gamma", "0.9"),
            ["--algo.advantage.gamma 0.9", "undiscounted"],
        ),
        ("k1_in_reward,baseline=group", ("--algo.advantage.estimator", "gae"), ["gae"]),
        ("k1_in_reward,reward_norm=group", (), ["verl"]),
]  # fmt: skip


@pytest.mark.parametrize(("kl_type", "words", "told"), UNSERVED)
def test_what_openrlhf_cannot_serve_is_refused_by_name(
    kl_type: str,
    words: tuple[str, ...],
    told: list[str],
    run: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = error_of(run, capsys, "--klplug.kl_type", kl_type, "--klplug.kl_coef", "0.1", *words)
    for word in (f"kl_type {parse(kl_type)}", *told):
        assert word in error


def test_a_kl_type_as_the_hosts_own_estimator(run: Any) -> None:
    args, _ = run("--algo.kl.estimator", "k3_as_loss", "--algo.kl.init_coef", "0.02")
    assert args.klplug.kl_type == "k3_as_loss" and args.klplug.kl_coef == 0.02
    assert args.algo.kl.use_loss is True


@pytest.mark.parametrize(
    ("kl_type", "words", "named"),
    [
        ("k2_as_loss", ("--algo.kl.estimator", "k3"), "--algo.kl.estimator k3"),
        ("k2_as_loss", ("--algo.kl.horizon", "100"), "--algo.kl.horizon 100"),
        ("k3_as_loss", ("--algo.kl.unbiased_gradient",), "--algo.kl.unbiased_gradient"),
        ("k2_as_loss", ("--algo.kl.init_coef", "0"), "--algo.kl.init_coef 0.0"),
    ],
)
def test_a_stock_flag_is_overridden_and_named(
    kl_type: str,
    words: tuple[str, ...],
    named: str,
    run: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args, _ = run("--klplug.kl_type", kl_type, *KL[2:], *words)
    assert f"kl_type decides, and overrides {named}\n" in capsys.readouterr().out
    assert (args.algo.kl.estimator, args.algo.kl.init_coef) == (kl_type, 1e-3)
    assert args.algo.kl.use_loss is True


def test_flags_that_agree_are_not_named(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    args, _ = run(*KL, "--algo.kl.use_loss", "--algo.kl.init_coef", "1e-3")
    assert args.klplug.kl_type == "k2_as_loss"
    assert "overrides" not in capsys.readouterr().out


def test_a_stock_coefficient_is_taken(run: Any) -> None:
    for kl_type in ("k2_as_loss", "k1_in_reward"):
        args, _ = run("--klplug.kl_type", kl_type, "--algo.kl.init_coef", "0.02")
        assert args.klplug.kl_coef == args.algo.kl.init_coef == 0.02


def test_none_overrides_a_coefficient(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    args, _ = run("--klplug.kl_type", "none", "--algo.kl.init_coef", "0.02", "--algo.kl.use_loss")
    assert args.algo.kl.init_coef == 0 and args.algo.kl.use_loss is False
    named = "overrides --algo.kl.use_loss, --algo.kl.init_coef 0.02\n"
    assert named in capsys.readouterr().out


def test_whitening_is_said(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kl = ("--klplug.kl_type", "k1_in_reward", "--klplug.kl_coef", "0.1")
    run(*kl, "--algo.advantage.estimator", "reinforce_baseline")
    assert "reinforce_baseline whitens" in capsys.readouterr().out
    run(*kl)
    assert "whitens" not in capsys.readouterr().out


def test_adaptive_controller(run: Any) -> None:
    args, _ = run(*KL, "--klplug.kl_ctrl", "adaptive", "--klplug.kl_target", "0.05")
    assert args.klplug.kl_ctrl == "adaptive" and args.klplug.kl_target == 0.05


MISTAKES: list[tuple[tuple[str, ...], list[str]]] = [
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
        (("--klplug.kl_type", "monitor", "--klplug.kl_coef", "0.1"), ["'monitor' takes no"]),
        (
            ("--klplug.kl_type", "monitor", "--klplug.kl_ctrl", "adaptive"),
            ["kl_ctrl=adaptive", "monitor", "no coefficient to move"],
        ),
        ((*KL, "--algo.kl.estimator", "banana"), ["banana"]),
        ((*KL, "--algo.kl.init_coef", "0.5"), ["--algo.kl.init_coef 0.5", "0.001"]),
        ((*KL, "--algo.kl.target", "0.1"), ["--algo.kl.target", "--klplug.kl_ctrl adaptive"]),
        ((*KL, "--algo.kl.estimator", "k3_as_loss"), ["k3_as_loss", "two formulations"]),
        ((*KL, "--klplug.kl_ctrl", "adaptive"), ["kl_target"]),
        ((*KL, "--klplug.kl_ctrl", "sine"), ["sine", "fixed, adaptive, linear, cosine, pid"]),
        ((*KL, "--klplug.kl_ctrl", "linear", "--klplug.kl_steps", "9"), ["linear needs a kl_end"]),
        ((*KL, "--klplug.kl_ctrl", "cosine", "--klplug.kl_end", "0"), ["cosine needs a kl_steps"]),
        ((*KL, "--klplug.kl_ctrl", "pid"), ["pid needs a kl_target"]),
        ((*KL, "--klplug.kl_ctrl", ""), ["kl_ctrl='' is unknown; allowed: fixed"]),
        ((*KL, "--klplug.ref_model", ""), ["--klplug.ref_model is empty: write a path"]),
        (
            (*KL[:1], "k2_as_loss+k2_as_loss,reference=teacher", *KL[2:], "--klplug.teacher", " "),
            ["--klplug.teacher is empty: write a path"],
        ),
        (
            (*KL[:1], "js_as_loss", *KL[2:], "--klplug.source", ""),
            ["--klplug.source is empty: write a path"],
        ),
        (
            (*KL, "--klplug.kl_ctrl", "pid", "--klplug.kl_target", "1", "--klplug.kl_horizon", "9"),
            ["kl_horizon=9 has no meaning with kl_ctrl=pid", "adaptive"],
        ),
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
        *(
            ((*KL[:1], "js_as_loss,reference=posterior", *KL[2:], "--klplug.kl_ctrl", schedule,
              "--klplug.kl_end", end, "--klplug.kl_steps", "9"),
             ["--klplug.kl_end is 0", "kl_type js_as_loss,reference=posterior", "End above 0"])
            for schedule, end in (("linear", "0"), ("cosine", "0.0"))
        ),
        (
            ("--klplug.kl_type", "none", "--klplug.ref_model", "teacher"),
            ["--klplug.ref_model is teacher", "kl_type none has no KL to a reference model"],
        ),
        (
            (*KL[:1], "k2_as_loss,reference=old", *KL[2:], "--klplug.ref_model", "teacher"),
            ["--klplug.ref_model is teacher", "kl_type k2_as_loss,reference=old"],
        ),
        (
            (*KL[:1], "k2_as_loss,reference=rollout", *KL[2:], "--klplug.ref_model", "teacher"),
            ["--klplug.ref_model is teacher", "kl_type k2_as_loss,reference=rollout"],
        ),
        ((*KL, "--klplug.ref_update", "mean:3"), ["klplug.ref_update=mean:3", "reset:200"]),
        ((*KL, "--klplug.ref_update", "ema:1"), ["ema:1", "the decay is '1'"]),
        (
            (*KL[:1], "k2_as_loss,reference=old", *KL[2:], "--klplug.ref_update", "reset:2"),
            ["--klplug.ref_update is reset:2", "kl_type k2_as_loss,reference=old", "none to move"],
        ),
        (
            (*KL[:1], "k1_in_reward+k2_as_loss", *KL[2:], "--klplug.ref_update", "reset:1"),
            ["--klplug.ref_update is reset:1", "A KL in the reward is measured there, and is 0"],
        ),
        (
            (*KL, "--klplug.ref_update", "reset:1", "--klplug.kl_ctrl", "pid",
             "--klplug.kl_target", "0.1"),
            ["--klplug.ref_update is reset:1", "--klplug.kl_ctrl is pid, and is fed the KL there"],
        ),
        (
            (*KL, "--klplug.ref_update", "reset:2", "--ds.lora.rank", "8"),
            ["--klplug.ref_update is reset:2", "--ds.lora.rank 8 trains an adapter"],
        ),
        (
            (*KL, "--klplug.ref_update", "reset:2", "--ds.load_in_4bit"),
            ["--ds.load_in_4bit True has its weights in 4 bits", "Leave one out"],
        ),
        (
            (*KL, "--klplug.ref_update", "reset:2", "--ds.tensor_parallel_size", "2"),
            ["--ds.tensor_parallel_size 2 cuts its matrices over ranks"],
        ),
        (
            (*KL, "--klplug.source", "own.jsonl"),
            ["--klplug.source is own.jsonl", "k2 is refused", "forward, js, hellinger, tv"],
        ),
        (
            (*KL[:1], "k1_in_reward", *KL[2:], "--klplug.source", "own.jsonl"),
            ["--klplug.source is own.jsonl", "a reward is of the policy's own answers"],
        ),
        (
            (*KL[:1], "js_as_loss", *KL[2:], "--klplug.source", "own.jsonl",
             "--klplug.ref_model", "teacher"),
            ["--klplug.source is own.jsonl, and --klplug.ref_model is teacher", "Leave one out"],
        ),
        (
            (*KL[:1], "js_as_loss", *KL[2:], "--klplug.source", "own.jsonl",
             "--klplug.kl_ctrl", "adaptive", "--klplug.kl_target", "1"),
            ["--klplug.source is own.jsonl", "--klplug.kl_ctrl is adaptive", "linear or cosine"],
        ),
        (
            (*KL[:1], "js_as_loss", *KL[2:], "--klplug.source", "own.jsonl",
             "--ds.ring_attn_size", "2", "--actor.gradient_checkpointing_enable"),
            ["--klplug.source is own.jsonl, with --ds.ring_attn_size 2 and",
             "--actor.gradient_checkpointing_enable. The backward", "Leave one out"],
        ),
        (
            (*KL[:1], "k2_as_loss+k2_as_loss,reference=teacher", *KL[2:]),
            ["reference=teacher needs --klplug.teacher, the path of a second frozen model"],
        ),
        (
            (*KL, "--klplug.teacher", "hub/teacher"),
            ["--klplug.teacher is hub/teacher", "no term with reference=teacher"],
        ),
        (
            (*KL[:1], "k2_as_loss,reference=teacher", *KL[2:], "--klplug.teacher", "hub/teacher"),
            ["no KL to the reference model beside", "Name the teacher as --klplug.ref_model"],
        ),
        (
            ("--klplug.kl_type", "monitor", "--klplug.teacher", "hub/teacher"),
            ["--klplug.teacher is hub/teacher", "kl_type monitor has no term with"],
        ),
        (
            ("--klplug.kl_type", "k2_as_loss+k2_as_loss,reference=teacher", "--klplug.kl_coef", "0",
             "--klplug.teacher", "hub/teacher"),
            ["kl_coef is 0, so kl_type 'k2_as_loss+k2_as_loss,reference=teacher' would do nothing"],
        ),
        (
            (*KL[:1], "js_as_loss", *KL[2:], "--klplug.source", "own.jsonl",
             "--klplug.teacher", "hub/teacher"),
            ["--klplug.teacher is hub/teacher", "no term with reference=teacher"],
        ),
]  # fmt: skip


@pytest.mark.parametrize(("words", "told"), MISTAKES)
def test_mistakes_are_one_clear_line(
    words: tuple[str, ...], told: list[str], run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(run, capsys, *words)
    for word in told:
        assert word in error


def test_a_run_that_saves_needs_a_folder_of_its_own(
    run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = (*KL, "--ckpt.path", str(tmp_path))
    with another_run(tmp_path):
        run(*words)
        for when in ("--ckpt.save_steps", "--eval.steps"):
            error = error_of(run, capsys, *words, when, "1")
            assert f"--ckpt.path {tmp_path}: another run saves its checkpoints there" in error


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


@pytest.mark.slow  # a Ray of its own, whose worker imports the host
@pytest.mark.parametrize("hook", [None, launcher.SETUP_HOOK])
def test_where_ray_is_up_already_its_workers_need_klplug(hook: str | None) -> None:
    """OpenRLHF then starts none, and its actors would train without the KL of such a kl_type."""
    code = f"""
import sys, ray, openrlhf.utils
from klplug_openrlhf import launcher
ray.init(num_cpus=1, include_dashboard=False, runtime_env={{"worker_process_setup_hook": {hook!r}}})
openrlhf.utils.get_strategy = lambda args: sys.exit("trains " + args.klplug.kl_type)
launcher.main()
"""
    words = [
        *("--actor.model_name_or_path", "hub/model", "--reward.remote_url", "reward.py"),
        *("--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "4"),
        *("--data.prompt_dataset", "hub/data", "--vllm.num_engines", "1"),
        *("--klplug.kl_type", "k2_as_loss,reference=rollout", "--klplug.kl_coef", "0.1"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *spelled(words)],
        env={**os.environ, **cpu_shim.environment("openrlhf")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    end = done.stderr.strip().splitlines()[-1]
    if hook is None:
        assert done.returncode == 2 and end.startswith("klplug: error: "), end
        assert "Ray was up before OpenRLHF" in end and launcher.SETUP_HOOK in end
    else:
        assert (done.returncode, end) == (1, "trains k2_as_loss,reference=rollout")
