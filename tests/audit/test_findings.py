"""Every finding: on the shortest script that has it, and absent from one that has not."""

from __future__ import annotations

from pathlib import Path

import pytest

from klplug.audit import RULES, SEVERITIES, Report, audit
from klplug.audit.pages import text

DOCS = Path(__file__).parents[2] / "docs"

_A = "actor_rollout_ref.actor"
_LOSS = f"{_A}.use_kl_loss=True {_A}.kl_loss_coef=0.01 {_A}.kl_loss_type="
_REWARD = "algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=0.01 algorithm.kl_penalty="
_ONCE = f"data.train_batch_size=64 {_A}.ppo_mini_batch_size=64 "
_TWICE = f"data.train_batch_size=64 {_A}.ppo_mini_batch_size=32 "
_GSPO = f"{_A}.policy_loss.loss_mode=gspo "
_BY_ANSWER = f"{_A}.loss_agg_mode=seq-mean-token-mean "
_IS = "algorithm.rollout_correction.rollout_is=token "
_ASYNC = "trainer.v1.trainer_mode=separate_async "
_ADAPTIVE = "algorithm.kl_ctrl.type=adaptive algorithm.kl_ctrl.target_kl=0.1 "


def _verl(settings: str, estimator: str = "grpo", n: int = 8) -> str:
    return (
        f"python -m verl.trainer.main_ppo algorithm.adv_estimator={estimator} "
        f"actor_rollout_ref.rollout.n={n} {_ONCE if '_batch_size' not in settings else ''}"
        f"{settings}"
    )


def _openrlhf(flags: str, estimator: str = "group_norm") -> str:
    return (
        f"python -m openrlhf.cli.train_ppo_ray --algo.advantage.estimator {estimator} "
        f"--rollout.n_samples_per_prompt 4 --rollout.batch_size 32 --train.batch_size 128 {flags}"
    )


_ORL_K1 = "--algo.kl.init_coef 0.01 "
_ORL_K3 = f"{_ORL_K1} --algo.kl.use_loss --algo.kl.estimator k3 "
_GOOD = _verl("+klplug.kl_type=k2_as_loss +klplug.kl_coef=0.01")
_TO_SAMPLER = _GOOD.replace("k2_as_loss", "\\'k2_as_loss,ratio=rollout\\'")
_ENV_VARS = "ray_kwargs.ray_init.runtime_env.env_vars"
_VERL_0_7 = f"{_GOOD} trainer.use_legacy_worker_impl=disable"  # a setting of that release

# id: a script that has it, and one, as near as can be, that has not.
CASES = {
    "command-cut": (
        _verl(f"\\\n {_LOSS}k2 \\\n # off\n {_A}.kl_loss_coef=0.1"),
        _verl(f"\\\n {_LOSS}k2 \\\n {_A}.kl_loss_coef=0.1"),
    ),
    "script-not-read": (f"{_GOOD}\nrun 'a\n", f"{_GOOD}\nrun 'a'\n"),
    "klplug-refuses": (
        _GOOD.replace("+klplug.kl_coef=0.01", ""),
        # An adaptive controller starts from a coefficient, which may be unknown.
        _GOOD.replace("=0.01", "=$(pick) +klplug.kl_ctrl=adaptive +klplug.kl_target=1"),
    ),
    "rejected-setting": (_verl(f"{_LOSS}k2 {_A}.loss_agg_mode=mean"), _verl(f"{_LOSS}k2")),
    "unknown-setting": (_verl(f"{_LOSS}k2 {_A}.kl_los=3"), _verl(f"{_LOSS}k2 +{_A}.kl_los=3")),
    "another-trainer": (_GOOD.replace("verl.trainer", "mine.trainer"), _GOOD),
    "unknown-value": (_verl(f"{_LOSS}$(pick)"), _verl(f"{_LOSS}k2 trainer.project_name=$(pick)")),
    "sourced-script": (f"source env.sh\n{_GOOD}", _GOOD),
    "unreached-setting": (
        f"KL='{_A}.use_kl_loss=True'\n{_GOOD}",
        f"KL='{_A}.use_kl_loss=True'\n{_GOOD} $KL",
    ),
    "config-not-read": (_verl("--config-name mine"), _verl("--config-name ppo_megatron_trainer")),
    "k1-as-loss": (_verl(f"{_LOSS}k1"), _verl(f"{_LOSS}k1+")),
    "k3-in-reward": (_verl(f"{_REWARD}k3"), _verl(f"{_REWARD}k3 {_LOSS}k3", "rloo")),
    "k2-in-reward": (_verl(f"{_REWARD}mse"), _verl(f"{_LOSS}mse")),
    "abs-in-reward": (_verl(f"{_REWARD}abs"), _verl(f"{_LOSS}abs")),
    "forward-kl": (_openrlhf(_ORL_K3), _openrlhf(f"{_ORL_K3} --algo.kl.unbiased_gradient")),
    "abs-as-loss": (_verl(f"{_LOSS}abs"), _verl(f"{_LOSS}abs+")),
    "own-token": (_GOOD, _GOOD.replace("k2_as_loss", "\\'k2_as_loss,horizon=sequence\\'")),
    "passk-in-reward": (_verl(f"{_REWARD}k1", "grpo_passk"), _verl(f"{_LOSS}k2", "grpo_passk")),
    "never-reaches": (
        _verl(f"{_REWARD}k1 algorithm.gdpo_reward_keys=[a,b]", "gdpo"),
        _verl(f"{_LOSS}k2 algorithm.gdpo_reward_keys=[a,b]", "gdpo"),
    ),
    "no-kl": (_verl(""), _GOOD),
    "kl-not-enabled": (_verl(f"{_A}.kl_loss_coef=0.01"), _verl(f"{_A}.kl_loss_coef=0.0")),
    "klplug-not-loaded": (_VERL_0_7, f"export VERL_USE_EXTERNAL_MODULES=klplug_verl\n{_VERL_0_7}"),
    "setting-ignored": (
        _verl(f"{_LOSS}k2 algorithm.kl_ctrl.kl_coef=0.1"),
        _verl(f"{_LOSS}k2 algorithm.kl_ctrl.kl_coef=0"),
    ),
    "zero-coefficient": (
        _openrlhf("--algo.kl.use_loss --algo.kl.init_coef 0"),
        _openrlhf("--algo.kl.init_coef 0"),
    ),
    "negative-coefficient": (
        _verl(f"{_LOSS}k2 {_A}.kl_loss_coef=-0.1"),
        _verl(f"{_LOSS}k2 {_A}.kl_loss_coef=0.1"),
    ),
    "extrapolation": (
        _GOOD.replace("k2_as_loss", "\\'k2_as_loss+-0.5*k2_as_loss,reference=old\\'"),
        _GOOD.replace("k2_as_loss", "\\'k2_as_loss+0.5*k2_as_loss,reference=old\\'"),
    ),
    "no-effect": (
        _openrlhf(f"{_ORL_K1} --algo.kl.unbiased_gradient"),
        _openrlhf(f"{_ORL_K1} --algo.kl.unbiased_gradient --algo.kl.use_loss"),
    ),
    "double-kl": (_verl(f"{_LOSS}k2 {_REWARD}k1"), _verl(f"{_REWARD}k1")),
    "off-policy-uncorrected": (_verl(f"{_TWICE}{_LOSS}k2"), _verl(f"{_ONCE}{_LOSS}k2")),
    "gspo-ratio": (_verl(f"{_TWICE}{_GSPO}{_REWARD}k1"), _verl(f"{_ONCE}{_GSPO}{_REWARD}k1")),
    "rollout-mismatch": (_verl(f"{_IS}{_LOSS}k2"), _verl(f"{_IS}{_REWARD}k1")),
    "stale-samples": (_verl(f"{_ASYNC}{_LOSS}k2"), _verl(f"{_ASYNC}{_IS}{_REWARD}k1")),
    "truncated-sampler": (
        _TO_SAMPLER.replace("grpo ", "grpo actor_rollout_ref.rollout.top_p=0.9 "),
        _TO_SAMPLER.replace("grpo ", "grpo actor_rollout_ref.rollout.temperature=0.9 "),
    ),
    "lora-reference": (
        f"{_GOOD} actor_rollout_ref.model.lora_adapter_path=ckpt/sft",
        f"{_GOOD} actor_rollout_ref.model.lora_rank=32",
    ),
    "reference-dtype": (
        f"{_GOOD} +{_A}.fsdp_config.mixed_precision.param_dtype=fp32",
        f"{_GOOD} +{_A}.fsdp_config.mixed_precision.param_dtype=bfloat16",
    ),
    "short-horizon": (
        _verl(f"{_REWARD}k1 {_ADAPTIVE} algorithm.kl_ctrl.horizon=100"),  # of 512 answers
        _verl(f"{_REWARD}k1 {_ADAPTIVE} algorithm.kl_ctrl.horizon=103"),
    ),
    "dead-zone": (_verl(f"{_LOSS}k3"), _verl(f"{_LOSS}k3+")),
    "before-group-norm": (
        _verl(f"{_REWARD}k1"),
        _verl(f"{_REWARD}k1 algorithm.norm_adv_by_std_in_grpo=False"),
    ),
    "after-group-norm": (_openrlhf(_ORL_K1), _openrlhf(_ORL_K1, "dr_grpo")),
    "mean-with-self": (_openrlhf(_ORL_K1, "dr_grpo"), _openrlhf(_ORL_K1, "rloo")),
    "whitened": (
        _openrlhf(_ORL_K1, "reinforce"),
        _openrlhf(f"{_ORL_K1} --algo.advantage.no_std_norm", "reinforce"),
    ),
    "group-of-one": (_verl(f"{_LOSS}k2", n=1), _verl(f"{_LOSS}k2", n=2)),
    "normaliser-mismatch": (
        _openrlhf(f"{_ORL_K3} --actor.loss_agg_mode seq-mean-token-mean"),
        _openrlhf(_ORL_K3),
    ),
    "length-normalised": (_verl(f"{_BY_ANSWER}{_LOSS}k2"), _verl(f"{_LOSS}k2")),
    "length-bonus": (_verl(f"{_BY_ANSWER}{_LOSS}k1"), _verl(f"{_LOSS}k1")),
    "length-tilt": (
        _openrlhf(f"{_ORL_K1} --actor.policy_loss_type gspo"),
        _openrlhf(f"{_ORL_K3} --actor.policy_loss_type gspo"),
    ),
    "discounted-kl": (
        _verl(f"{_REWARD}k1 algorithm.gamma=0.9", "gae"),
        _verl(f"{_REWARD}k1 algorithm.gamma=0.9", "rloo"),
    ),
    "adaptive-ignored": (_verl(f"{_ADAPTIVE}{_LOSS}k2"), _verl(f"{_ADAPTIVE}{_REWARD}k1")),
    "adaptive-fed-wrong": (
        _openrlhf(f"{_ORL_K3} --algo.kl.target 6"),
        _openrlhf(f"{_ORL_K1} --algo.kl.target 6"),
    ),
    "adaptive-forgotten": (
        _verl(f"{_REWARD}k1 {_ADAPTIVE}"),
        _GOOD + " +klplug.kl_ctrl=adaptive +klplug.kl_target=0.1",
    ),
    "adaptive-target": (
        _verl(f"{_REWARD}k1 {_ADAPTIVE} algorithm.kl_ctrl.target_kl=0"),
        _verl(f"{_REWARD}k1 {_ADAPTIVE}"),
    ),
}


def _audit(tmp_path: Path, script: str) -> Report:
    path = tmp_path / "run.sh"
    path.write_text(script + "\n")
    return audit(path)


def test_openrlhfs_own_controller_is_in_no_checkpoint(tmp_path: Path) -> None:
    for script, kept in (
        (_openrlhf(f"{_ORL_K1} --algo.kl.target 6"), False),
        (_openrlhf(_ORL_K1), True),
        (_openrlhf(f"{_ORL_K1} --algo.kl.target 0"), True),  # there is none
    ):
        found = {f.id for f in _audit(tmp_path, script).findings}
        assert ("adaptive-forgotten" not in found) is kept


def test_every_finding_has_a_case() -> None:
    # Those of a package need a folder: tests/audit/test_releases.py.
    assert set(CASES) == set(RULES) - {"package-beside", "package-not-read"}
    assert len(RULES) >= 15


@pytest.mark.parametrize("id", CASES)
def test_finding_is_there_and_is_not(id: str, tmp_path: Path) -> None:
    has, has_not = CASES[id]
    found = [f for f in _audit(tmp_path, has).findings if f.id == id]
    assert len(found) == 1
    (finding,) = found
    assert finding.severity == RULES[id].severity
    assert finding.message.endswith(".") and "\n" not in finding.message
    assert id not in [f.id for f in _audit(tmp_path, has_not).findings]


@pytest.mark.parametrize("id", RULES)
def test_every_finding_has_a_page(id: str) -> None:
    page = (DOCS / "findings" / f"{id}.md").read_text()
    assert page.startswith(f"# {id}\n")
    assert f"**{RULES[id].severity}**" in page
    for heading in ("## Why", "## What to write instead"):
        assert heading in page
    # The address stands in the package's metadata, from pyproject.toml.
    address = f"github.com/OWNER/klplug/blob/main/docs/findings/{id}.md"
    assert RULES[id].docs == f"https://{address}"
    assert text(id) == page


def test_pages_are_of_findings_that_there_are() -> None:
    pages = {path.stem for path in (DOCS / "findings").glob("*.md")} - {"index"}
    assert pages == set(RULES)


@pytest.mark.parametrize(
    ("before", "after", "loaded"),
    [
        ("", "", False),
        ("# export VERL_USE_EXTERNAL_MODULES=klplug_verl\n", "", False),
        ("export VERL_USE_EXTERNAL_MODULES=another\n", "", False),
        # Of Ray's workers alone: the command's own process is not one.
        ("", f" +{_ENV_VARS}.VERL_USE_EXTERNAL_MODULES=klplug_verl", False),
        ("VERL_USE_EXTERNAL_MODULES=another,klplug_verl ", "", True),
        ("export VERL_USE_EXTERNAL_MODULES=$MODULES\n", "", True),
        ("env VERL_USE_EXTERNAL_MODULES=klplug_verl ", "", True),
        ('ENV=\'{"VERL_USE_EXTERNAL_MODULES": "klplug_verl"}\'\n', "", True),
        ("source env.sh\n", "", True),  # which may set it
    ],
)
def test_what_loads_klplug_before_plugins(
    before: str, after: str, loaded: bool, tmp_path: Path
) -> None:
    path = tmp_path / "run.sh"
    path.write_text(f"{before}{_GOOD}{after}\n")
    found = audit(path, host_version="0.8.0").findings
    assert ("klplug-not-loaded" not in [f.id for f in found]) == loaded
    assert "klplug-not-loaded" not in [f.id for f in audit(path, host_version="0.9.1").findings]


def test_a_full_kl_type_in_verls_own_key_needs_klplug_loaded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = _verl(f"{_LOSS}k2_as_loss").split()
    (finding,) = (f for f in audit(words, host_version="0.8.0").findings if "loaded" in f.id)
    assert finding.setting == f"{_A}.kl_loss_type=k2_as_loss" and "0.8.0" in finding.message
    own = _verl(f"{_LOSS}k2").split()
    assert not any("loaded" in f.id for f in audit(own, host_version="0.8.0").findings)
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "klplug_verl")  # as the command would find it
    assert not any("loaded" in f.id for f in audit(words, host_version="0.8.0").findings)


def test_a_policy_loss_without_a_ratio_corrects_no_reward(tmp_path: Path) -> None:
    gpg = f"{_A}.policy_loss.loss_mode=gpg "
    for batches, expected in ((_TWICE, True), (_ONCE, False)):
        found = _audit(tmp_path, _verl(f"{batches}{gpg}{_REWARD}k1")).findings
        assert ("off-policy-uncorrected" in [f.id for f in found]) == expected


def test_rejected_samples_are_masked_in_the_kl_too(tmp_path: Path) -> None:
    rejects = "algorithm.rollout_correction.rollout_rs=token_k1 "
    found = _audit(tmp_path, _verl(f"{rejects}{_LOSS}k2")).findings
    assert "rollout-mismatch" not in [f.id for f in found]


def test_the_gravest_finding_comes_first(tmp_path: Path) -> None:
    severities = [f.severity for f in _audit(tmp_path, CASES["k3-in-reward"][0]).findings]
    ranks = [SEVERITIES.index(s) for s in severities]
    assert ranks == sorted(ranks, reverse=True)
    assert severities[0] == "error"


def test_a_finding_names_its_setting_and_line(tmp_path: Path) -> None:
    script = "# a\n" + _verl(_LOSS.replace(" ", " \\\n ") + "k1")
    (finding,) = (f for f in _audit(tmp_path, script).findings if f.id == "k1-as-loss")
    assert (finding.setting, finding.line) == (f"{_A}.kl_loss_type=k1", 4)
