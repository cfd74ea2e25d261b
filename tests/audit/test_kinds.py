"""Kinds of public commands: other entry points, frameworks, and configurations not there.

What each trainer does with a KL was read in its source: verl 0.9.1's experimental trainers and
distillation losses, and the trainers of verl-recipe.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from klplug.audit import AuditError, Report, audit
from klplug.audit.frameworks import frameworks

_A = "actor_rollout_ref.actor"
_V = "python3 -m verl.trainer.main_ppo"
_GRPO = f"algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8 {_A}.use_kl_loss=True"


def _audit(tmp_path: Path, text: str, name: str = "run.sh") -> Report:
    path = tmp_path / name
    path.write_text(text + "\n")
    return audit(path)


def _ids(report: Report) -> set[str]:
    return {finding.id for finding in report.findings}


@pytest.mark.parametrize(
    "trainer",
    [
        "-m my_tools.trainer.main_ppo",
        "-m recipe.dapo.src.main_dapo",
        "-m rllm.train_agent",
        "my_project/train.py",
        "${HERE}/train.py",
    ],
)
def test_a_trainer_of_a_fork_is_read_and_named(tmp_path: Path, trainer: str) -> None:
    report = _audit(tmp_path, f"torchrun --nproc 8 python3 {trainer} {_GRPO}")
    assert (report.gradient, report.host, report.after) == ("forward", "verl", None)
    (said,) = (f for f in report.findings if f.id == "another-trainer")
    assert trainer.split()[-1] in said.message
    # What the host itself has is still advised.
    assert any("kl_loss_type=k3+" in write for _, write in report.instead)


def _kl(kl_type: str) -> str:
    return f"{_V} +klplug.kl_coef=0.1 \"+klplug.kl_type='{kl_type}'\""


_O = "python -m klplug_openrlhf --klplug.kl_coef 0.1 --klplug.kl_type"


@pytest.mark.parametrize(
    "command",
    [
        f"{_V} {_GRPO.replace('n=8', 'n=8,16')} -m",  # Hydra's sweep
        f"{_V} {_GRPO} 'data.train_batch_size=[8]'",
        f"{_V} algorithm.kl_ctrl.type=adaptive algorithm.kl_ctrl.horizon=long",
        f"{_kl('js_as_loss,reference=posterior')} actor_rollout_ref.rollout.n=.inf",
        f"{_kl('k2_as_loss,weight=difficulty')} actor_rollout_ref.rollout.n=nan",
        f"{_kl('k2_as_loss,ratio=rollout')} actor_rollout_ref.rollout.top_p=x",
        f"{_kl('k2_as_loss,ratio=rollout')} actor_rollout_ref.rollout.top_k=x",
        f"{_kl('exact_as_loss')} {_A}.ulysses_sequence_parallel_size=x",
        f"{_kl('k1_in_reward')} algorithm.adv_estimator=gae algorithm.gamma=x",
        f"{_O} k2_as_loss --algo.kl.init_coef x",
        f"{_O} k2_as_loss --rollout.batch_size x",
        f"{_O} k2_as_loss,head=combined --actor.dual_clip x",
        f"{_O} exact_as_loss --ds.ring_attn_size x",
        f"{_O} k2_as_loss,ratio=rollout --rollout.top_p x",
        f"{_O} k1_in_reward,baseline=group --algo.advantage.estimator reinforce "
        "--algo.advantage.gamma x",
    ],
)
def test_what_should_be_a_number_is_left_to_the_host_to_refuse(
    tmp_path: Path, command: str
) -> None:
    """No row of a refusal or a note that reads it knows anything."""
    assert _audit(tmp_path, command).host in ("verl", "openrlhf")


_MARKED = "--micro_rollout_batch_size 1 --init_kl_coef 0.01"
_FLOW = "--agents '{\"0\": {}}' --workflow_func_path flows/debate.py"


@pytest.mark.parametrize(
    "started",
    [
        "python3 -m mine.cli.multi_agent_train_ppo_ray",
        "ray job submit -- python train_ppo_ray.py",
        "deepspeed --module openrlhf.cli.train_own_ray",
        "torchrun --standalone mine/train.py",
        # A file that one of its flags names does not start it.
        f"python3 -m mine.cli.multi_agent_train_ppo_ray {_FLOW}",
    ],
)
def test_a_trainer_that_takes_openrlhfs_flags_is_read_and_named(
    tmp_path: Path, started: str
) -> None:
    report = _audit(tmp_path, f"{started} --own 1 {_MARKED} --use_kl_loss --kl_estimator k3")
    assert (report.host, report.gradient, report.beta) == ("openrlhf", "forward", 0.01)
    assert report.after is None and not {"rejected-setting", "unknown-setting"} & _ids(report)
    (said,) = (f for f in report.findings if f.id == "another-trainer")
    assert said.message.startswith(started.partition(f" {_FLOW}")[0].split()[-1])


def test_what_no_openrlhf_has_of_it_is_not_known(tmp_path: Path) -> None:
    started = f"python3 -m mine.train {_MARKED}"
    own = _audit(tmp_path, f"{started} --kl_estimator mine")
    assert own.unknown["gradient"] == ("kl_estimator=mine is not one of OpenRLHF's own",)
    advantages = f"{started} --advantage_estimator mine"
    assert _audit(tmp_path, advantages).gradient is None
    assert _audit(tmp_path, f"{advantages} --use_kl_loss --kl_estimator k2").gradient == "reverse"
    known = f"{started} --advantage_estimator flash_reinforce"  # of OpenRLHF 0.11
    assert _audit(tmp_path, known).gradient == "reverse"


@pytest.mark.parametrize(
    "trainer", ["recipe.r1.main_eval", "my_tools.main_generation", "my_tools.infer"]
)
def test_what_trains_nothing_is_passed_over(tmp_path: Path, trainer: str) -> None:
    with pytest.raises(AuditError, match="no training command"):
        _audit(tmp_path, f"python3 -m {trainer} {_GRPO}")


@pytest.mark.parametrize(
    "trainer",
    [
        "verl.experimental.fully_async_policy.fully_async_main",
        "verl.experimental.one_step_off_policy.main_ppo",
    ],
)
def test_an_asynchronous_trainer_has_stale_samples(tmp_path: Path, trainer: str) -> None:
    report = _audit(tmp_path, f"python3 -m {trainer} {_GRPO}")
    assert (report.gradient, report.after) == ("forward", None)
    assert {"stale-samples", "another-trainer"} <= _ids(report)
    assert not {"rejected-setting", "unknown-setting"} & _ids(report)


def _refusals(report: Report) -> list[str]:
    return [f.message for f in report.findings if f.id == "rejected-setting"]


# verl 0.9.1: experimental/fully_async_policy/fully_async_rollouter.py asserts that the batch is 0,
# and takes require_batches mini-batches at once.
def test_a_trainer_that_fetches_has_no_batch(tmp_path: Path) -> None:
    command = (
        "python3 -m verl.experimental.fully_async_policy.fully_async_main "
        f"--config-path=config --config-name=fully_async_ppo_trainer {_GRPO} "
        f"data.train_batch_size=0 {_A}.ppo_mini_batch_size=32"
    )
    once = _audit(tmp_path, command)
    assert (once.gradient, once.updates_per_rollout) == ("forward", 1)
    assert not {"rejected-setting", "config-not-read"} & _ids(once)
    more = _audit(tmp_path, f"{command} async_training.require_batches=4 {_A}.ppo_epochs=2")
    assert more.updates_per_rollout == 8


_SMALL = f"{_GRPO} data.train_batch_size=8 {_A}.ppo_mini_batch_size=16"


# workers/config/actor.py, validate; before 0.6 trainer/ppo/ray_trainer.py, _validate_config.
def test_a_batch_below_the_mini_batch_stops_verls_own_trainer(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    for trainer, more, stops in (
        ("verl.trainer.main_ppo", "", True),
        ("verl.trainer.main_ppo", f"{_A}.use_dynamic_bsz=True", False),
        ("verl.trainer.main_ppo", f"{_A}.use_dynamic_bsz=$(any)", False),
        ("my_tools.main_ppo", "", False),
    ):
        path.write_text(f"python3 -m {trainer} {_SMALL} {more}\n")
        said = _refusals(audit(path, host_version="0.9.1"))
        named = "ppo_mini_batch_size=16 must not exceed data.train_batch_size=8"
        assert any(named in message for message in said) == stops
    # A release that is guessed may be 0.2, which makes one update of what there is.
    assert not _refusals(_audit(tmp_path, f"python3 -m verl.trainer.main_ppo {_SMALL}"))


def test_an_estimator_of_a_fork_is_unknown(tmp_path: Path) -> None:
    report = _audit(tmp_path, f"python3 -m recipe.mine.main_mine {_GRPO} {_A}.kl_loss_type=mine")
    assert report.gradient is None and not _refusals(report)
    assert "kl_loss_type=mine is not one of verl's own" in report.unknown["gradient"][0]
    own = _audit(tmp_path, f"python3 -m verl.trainer.main_ppo {_GRPO} {_A}.kl_loss_type=mine")
    assert "NotImplementedError" in _refusals(own)[0]


def test_a_config_is_looked_for_beside_its_trainer(tmp_path: Path) -> None:
    # Hydra takes --config-path from the folder of the module; `defaults` lie beside the file.
    config = tmp_path / "mine" / "trainer" / "config"
    config.mkdir(parents=True)
    (config / "base.yaml").write_text(
        "defaults: [ppo_megatron_trainer, _self_]\n"
        "actor_rollout_ref: {actor: {use_kl_loss: true, kl_loss_type: mse, kl_loss_coef: 0.5}}\n"
    )
    (config / "run.yaml").write_text(
        "defaults:\n  - base\n  - _self_\nactor_rollout_ref: {actor: {kl_loss_coef: 0.25}}\n"
    )
    script = tmp_path / "examples" / "run.sh"
    script.parent.mkdir()
    script.write_text(
        "python3 -m mine.trainer.main_ppo --config-path=config --config-name=run "
        "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8\n"
    )
    report = audit(script)
    assert (report.gradient, report.beta) == ("reverse", 0.25)
    (config / "base.yaml").write_text("defaults: [run]\n")
    with pytest.raises(AuditError, match=r"run\.yaml: its defaults lead back to itself"):
        audit(script)


def test_prime_drops_a_kl_in_the_reward(tmp_path: Path) -> None:
    asked = "algorithm.adv_estimator=rloo algorithm.use_kl_in_reward=True algorithm.kl_penalty=kl"
    report = _audit(tmp_path, f"python3 -m recipe.prime.main_prime {asked}")
    assert report.gradient == "none" and "never-reaches" in _ids(report)
    assert report.fails("error")
    usual = _audit(tmp_path, f"python3 -m recipe.dapo.main_dapo {asked}")
    assert usual.gradient == "reverse" and "never-reaches" not in _ids(usual)


@pytest.mark.parametrize(
    ("asked", "stage"),
    [
        ("+klplug.kl_type=k1_in_reward +klplug.kl_coef=0.1", "k1_in_reward is in the reward"),
        ("+klplug.kl_type=k2_as_loss,weight=positive +klplug.kl_coef=0.1", "weight=positive"),
        ("algorithm.use_kl_in_reward=True", "a KL in the reward"),
        ("+klplug.kl_type=k2_as_loss +klplug.kl_coef=0.1", ""),
        (f"{_A}.use_kl_loss=True", ""),
    ],
)
def test_what_hangs_on_a_recipes_fit_is_said_not_to_be_known(
    tmp_path: Path, asked: str, stage: str
) -> None:
    asked = asked.replace("k2_as_loss,weight=positive", "'\"k2_as_loss,weight=positive\"'")
    grpo = "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8"
    report = _audit(tmp_path, f"python3 -m recipe.mine.main_mine {grpo} {asked}")
    said = [f.message for f in report.findings if f.id == "another-trainer"]
    assert said == [
        "Whether recipe.mine.main_mine has a fit of its own is not known. klplug would not start "
        f"one: {stage}."
    ] * bool(stage)
    known = _audit(tmp_path, f"python3 -m recipe.dapo.main_dapo {grpo} {asked}")
    assert "another-trainer" not in _ids(known)
    assert ("klplug-refuses" in _ids(known)) == (bool(stage) and "klplug" in asked)


# verl-recipe sppo/dp_actor.py: compute_sppo_loss.
@pytest.mark.parametrize("recipe", ["spin", "sppo"])
def test_a_loss_of_its_own_is_unknown(tmp_path: Path, recipe: str) -> None:
    report = _audit(tmp_path, f"python3 -m recipe.{recipe}.main_{recipe} {_GRPO}")
    assert report.gradient is None and "loss of its own" in report.unknown["gradient"][0]


@pytest.mark.parametrize(
    "named", ['--config-name "$1" "${@:2}"', '--config-path="$SOMEWHERE" --config-name=mine']
)
def test_what_an_unread_config_decides_is_unknown(tmp_path: Path, named: str) -> None:
    command = f"python3 -m verl.trainer.main_ppo {named} algorithm.adv_estimator=grpo"
    report = _audit(tmp_path, command)
    assert report.gradient is None and report.kl_type is None
    assert "is not read" in report.unknown["gradient"][0]
    # What the command itself says is known, whatever the file says.
    said = (
        f"{_A}.use_kl_loss=True {_A}.kl_loss_type=k2 algorithm.use_kl_in_reward=False "
        "distillation.enabled=False distillation.distillation_loss.loss_mode=k3 "
        "distillation.distillation_loss.use_policy_gradient=False "
        "distillation.distillation_loss.use_task_rewards=True algorithm.gamma=1 "
        "algorithm.norm_adv_by_std_in_grpo=True"
    )
    assert _audit(tmp_path, f"{command} {said}").gradient == "reverse"


def test_a_config_group_is_no_setting(tmp_path: Path) -> None:
    groups = "model_engine=megatron hydra/job_logging=disabled optim@critic.optim=adam"
    report = _audit(tmp_path, f"python3 -m verl.trainer.main_ppo {groups} {_GRPO}")
    assert report.gradient == "forward"
    assert not {"rejected-setting", "unknown-setting"} & _ids(report)


def test_a_cut_command_is_an_error_and_said_once(tmp_path: Path) -> None:
    command = f"python3 -m verl.trainer.main_ppo data.train_files=a \\ # yours\n  {_GRPO}"
    report = _audit(tmp_path, command.replace(" actor_", " \\\n  actor_"))
    assert report.findings[0].id == "command-cut" and report.fails("error")
    assert "rejected-setting" not in _ids(report)


_D = "distillation.distillation_loss"


@pytest.mark.parametrize(
    ("settings", "gradient", "kl_type"),
    [
        (f"{_D}.loss_mode=k1", "zero", "k1_as_loss,ratio=none"),
        ("", "forward", "k3_as_loss,ratio=none"),  # verl's default
        (f"{_D}.loss_mode=k2", "reverse", "k2_as_loss,ratio=none"),
        (f"{_D}.loss_mode=k1 {_D}.use_policy_gradient=True", "reverse", "k2_as_loss"),
        (f"{_D}.loss_mode=k3 {_D}.use_policy_gradient=True", "neither", "k3_in_reward"),
    ],
)
def test_the_loss_of_distillation_is_a_kl(
    tmp_path: Path, settings: str, gradient: str, kl_type: str
) -> None:
    report = _audit(
        tmp_path,
        "python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo distillation.enabled=True "
        f"{_D}.use_task_rewards=False {settings}",
    )
    assert (report.gradient, report.kl_type, report.beta) == (gradient, kl_type, 1.0)
    (said,) = (f for f in report.findings if f.id == "another-trainer")
    assert "teacher" in said.message and report.after is None


def test_distillation_alone_drops_the_kl_to_the_reference(tmp_path: Path) -> None:
    report = _audit(
        tmp_path,
        f"python3 -m verl.trainer.main_ppo {_GRPO} distillation.enabled=True "
        f"{_D}.loss_mode=k2 {_D}.use_task_rewards=False",
    )
    assert "never-reaches" in _ids(report)
    assert [term.kl_type for term in report.terms] == ["k2_as_loss,ratio=none"]


_FLAGS = (
    "python3 -m openrlhf.cli.train_ppo_ray --rollout.n_samples_per_prompt 8 --algo.kl.use_loss "
    "--algo.kl.init_coef 0.001 --rollout.batch_size 128 "
)


@pytest.mark.parametrize(
    ("flags", "updates", "blamed"),
    [
        ("--train.batch_size 128 --train.max_epochs 1", 8, "train.batch_size=128"),
        ("--train.batch_size 1024 --train.max_epochs 2", 2, "train.max_epochs=2"),
    ],
)
def test_the_setting_that_makes_more_than_one_update(
    tmp_path: Path, flags: str, updates: int, blamed: str
) -> None:
    report = _audit(tmp_path, _FLAGS + flags)
    assert report.updates_per_rollout == updates
    (finding,) = (f for f in report.findings if f.id == "off-policy-uncorrected")
    assert finding.setting == blamed


# Other frameworks.

OTHERS = {
    "EasyR1": "python3 -m verl.trainer.main config=a.yaml algorithm.kl_coef=0.01",
    "ROLL": "python examples/start_rlvr_pipeline.py --config_name a",
    "slime": "ray job submit -- python3 train.py --num-rollout 300 --use-kl-loss",
    "SkyRL": "uv run -m skyrl_train.entrypoints.main_base trainer.algorithm.use_kl_loss=true",
    "NeMo-RL": "uv run examples/run_grpo_math.py loss_fn.reference_policy_kl_penalty=0",
    "ms-swift": "swift rlhf --rlhf_type grpo --beta 0.04",
    "TRL": "trl grpo --beta 0.1",
    "open-instruct": "python open_instruct/grpo_fast.py --beta 0.01",
    "AReaL": "python3 -m areal.launcher.local examples/gsm8k.py --config a.yaml",
    "prime-rl": "uv run rl @ configs/a.toml",
}


def test_every_framework_has_a_case() -> None:
    assert {row.title for row in frameworks()} == set(OTHERS)


@pytest.mark.parametrize("title", OTHERS)
def test_another_framework_is_named_and_has_no_verdict(tmp_path: Path, title: str) -> None:
    row = next(row for row in frameworks() if row.title == title)
    with pytest.raises(AuditError) as error:
        _audit(tmp_path, f"set -x\n{OTHERS[title]}")
    assert f"a run of {title}" in str(error.value)
    assert row.kl in str(error.value) and row.source in str(error.value)


def test_a_config_of_another_framework_is_named(tmp_path: Path) -> None:
    text = (
        "algorithm: {adv_estimator: grpo, kl_penalty: low_var_kl, kl_coef: 0.01}\n"
        "worker: {actor: {global_batch_size: 128}, rollout: {n: 5}}"
    )
    with pytest.raises(AuditError, match="EasyR1"):
        _audit(tmp_path, text, "config.yaml")


@pytest.mark.parametrize(
    ("settings", "gradient"),
    [
        (f"{_A}.use_kl_loss=True", "forward"),
        ("trainer.nnodes=1", "none"),
        ("algorithm.use_kl_in_reward=True", None),
    ],
)
def test_an_advantage_of_a_forks_own_bears_on_a_kl_in_the_reward_alone(
    tmp_path: Path, settings: str, gradient: str | None
) -> None:
    report = _audit(
        tmp_path, f"python3 -m verl.trainer.main_ppo algorithm.adv_estimator=mine {settings}"
    )
    assert report.gradient == gradient
    assert report.beta_absolute is None and "recommended" in report.unknown
