"""Older releases by their own rules, and a host's package beside the script.

The rules were read in the wheels: verl 0.2 to 0.6 ``trainer/ppo/ray_trainer.py`` (``fit``) and
``core_algos.py`` (``kl_penalty``); OpenRLHF 0.4 to 0.8 ``models/utils.py`` and ``trainer/``.
"""

from __future__ import annotations

import ast
import ctypes
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
from klplug_openrlhf import sources as openrlhf
from klplug_verl import sources

from klplug.audit import Report, audit
from klplug.audit.source import calls, digest, function, taken, tree
from klplug.audit.tables import given, stored, versions

_A = "actor_rollout_ref.actor"
_VERL = "python3 -m verl.trainer.main_ppo"
_LOSS = f"{_A}.use_kl_loss=True"
_ORL = "python3 -m openrlhf.cli.train_ppo_ray --init_kl_coef 0.01"
_GROUP = "--advantage_estimator rloo --n_samples_per_prompt 4"


def _audit(tmp_path: Path, text: str, version: str | None = None) -> Report:
    path = tmp_path / "run.sh"
    path.write_text(text + "\n")
    return audit(path, host_version=version)


def _ids(report: Report) -> set[str]:
    return {finding.id for finding in report.findings}


@pytest.mark.parametrize(
    ("version", "settings", "gradient", "beta"),
    [
        ("0.2.0.post2", "", "reverse", 0.001),
        ("0.3.0.post1", "algorithm.kl_ctrl.kl_coef=0.05", "reverse", 0.05),
        ("0.3.0.post1", _LOSS, "forward", 0.001),
        ("0.3.0.post1", "algorithm.kl_penalty=low_var_kl", "neither", 0.001),
        ("0.3.0.post1", f"{_LOSS} {_A}.kl_loss_type=mse", "reverse", 0.001),
        ("0.4.1", "", "none", 0.0),
        ("0.4.1", "algorithm.use_kl_in_reward=True", "reverse", 0.001),
        ("0.6.1", f"{_LOSS} {_A}.kl_loss_type=k2", "reverse", 0.001),
    ],
)
def test_verl(tmp_path: Path, version: str, settings: str, gradient: str, beta: float) -> None:
    report = _audit(tmp_path, f"{_VERL} {settings}", version)
    assert (report.gradient, report.beta) == (gradient, beta)
    # klplug has hooks from 0.7 on; what is advised is a name that the release knows.
    assert report.after is None
    assert not any("k3+" in write for _, write in report.instead)


def test_names_that_a_release_does_not_know(tmp_path: Path) -> None:
    command = f"{_VERL} {_LOSS} {_A}.kl_loss_type="
    for version, name, knows in (
        ("0.3.0.post1", "k2", False),
        ("0.4.1", "k2", True),
        ("0.5.0", "k3+", False),
        ("0.6.1", "k3+", False),
        ("0.8.0", "k3+", True),
    ):
        assert ("rejected-setting" not in _ids(_audit(tmp_path, command + name, version))) == knows


def test_a_smaller_batch_than_the_mini_batch(tmp_path: Path) -> None:
    command = f"{_VERL} data.train_batch_size=64"
    assert "rejected-setting" not in _ids(_audit(tmp_path, command, "0.2.0.post2"))
    assert "rejected-setting" in _ids(_audit(tmp_path, command, "0.3.0.post1"))


def test_a_plus_before_a_key_that_is_there_tells_the_release(tmp_path: Path) -> None:
    # trainer.val_before_train is a key since 0.4; before, it is added.
    report = _audit(tmp_path, f"{_VERL} +trainer.val_before_train=False")
    assert (report.host_version, report.gradient) == ("0.3.0.post1", "reverse")
    assert _audit(tmp_path, f"{_VERL} trainer.val_before_train=False").gradient == "none"
    twice = _audit(tmp_path, f"{_VERL} +{_LOSS}", "0.9.1")
    assert any("takes no '+'" in finding.message for finding in twice.findings)


@pytest.mark.parametrize(
    ("version", "flags", "gradient", "dead_zone"),
    [
        ("0.4.6", "", "reverse", False),
        ("0.5.9.post1", "--use_kl_estimator_k3", "neither", False),
        ("0.7.5", "--use_kl_loss --kl_estimator k3", "forward", False),
        ("0.8.11", "--use_kl_loss --kl_estimator k3", "forward", True),
        ("0.7.5", "--use_kl_loss --kl_estimator k2", "reverse", False),
    ],
)
def test_openrlhf(tmp_path: Path, version: str, flags: str, gradient: str, dead_zone: bool) -> None:
    report = _audit(tmp_path, f"{_ORL} {flags}", version)
    assert (report.gradient, bool(report.dead_zone)) == (gradient, dead_zone)
    assert report.after is None and "rejected-setting" not in _ids(report)


def test_openrlhf_whitens_rloo_up_to_0_7(tmp_path: Path) -> None:
    command = f"{_ORL} {_GROUP}"
    assert "whitened" in _ids(_audit(tmp_path, command, "0.7.5"))
    assert "whitened" not in _ids(_audit(tmp_path, command, "0.8.11"))


_ALONE = "deepspeed --module openrlhf.cli.train_ppo --init_kl_coef 0.01"


@pytest.mark.parametrize("version", ["0.4.6", "0.5.9.post1"])
def test_openrlhfs_trainer_without_ray(tmp_path: Path, version: str) -> None:
    # cli/train_ppo.py, trainer/ppo_trainer.py, NaiveExperienceMaker: the same KL in the reward.
    for flags, gradient in (("", "reverse"), ("--use_kl_estimator_k3", "neither")):
        report = _audit(tmp_path, f"{_ALONE} {flags}", version)
        assert (report.gradient, report.beta, report.after) == (gradient, 0.01, None)
        # Its parser: rollout_batch_size 512 over train_batch_size 128; with Ray it is 1024.
        assert report.updates_per_rollout == 4
        assert "rejected-setting" not in _ids(report)
    assert _audit(tmp_path, _ORL, version).updates_per_rollout == 8


def test_a_release_without_that_trainer_is_not_guessed(tmp_path: Path) -> None:
    assert _audit(tmp_path, _ALONE).host_version == "0.5.9.post1"
    report = _audit(tmp_path, _ALONE, "0.9.10")
    assert any("has no trainer without Ray" in finding.message for finding in report.findings)


def test_a_flag_whose_variable_is_set_outside_needs_no_value(tmp_path: Path) -> None:
    for value in ("$KEY", "${KEY}", '"$KEY"', "$KEY --packing_samples"):
        report = _audit(tmp_path, f'FLAGS="--use_wandb {value}"\n{_ORL} $FLAGS', "0.6.4")
        assert "rejected-setting" not in _ids(report) and report.beta == 0.01
    assert "rejected-setting" in _ids(_audit(tmp_path, f"{_ORL} --use_wandb", "0.6.4"))
    coef = _audit(tmp_path, f"{_ORL} --kl_target $KL --init_kl_coef $KL", "0.6.4")
    assert coef.beta is None and coef.unknown["beta"] == ("$KL is not set in the script",)


def test_openrlhf_0_6_drops_the_kl_loss_of_packed_samples(tmp_path: Path) -> None:
    # trainer/ray/ppo_actor.py, training_step_actor: torch.tensor([each_kl.mean() for ...]).
    loss = f"{_ORL} --use_kl_loss --kl_estimator k3"
    for version, flags, gradient in (
        ("0.6.4", "--packing_samples", "none"),
        ("0.6.4", "", "forward"),
        ("0.7.5", "--packing_samples", "forward"),
    ):
        report = _audit(tmp_path, f"{loss} {flags}", version)
        assert report.gradient == gradient
        assert ("never-reaches" in _ids(report)) == (gradient == "none")
    # In the reward it is applied.
    assert _audit(tmp_path, f"{_ORL} --packing_samples", "0.6.4").gradient == "reverse"


def test_a_release_is_read_by_the_table_of_its_minor() -> None:
    for asked, table in (
        ("0.2.0", "0.2.0.post2"),
        ("0.4.0", "0.4.1"),
        ("0.7.0", "0.7.1"),
        ("0.9.1", "0.9.1"),
    ):
        assert given("verl", asked).version == table
    assert given("openrlhf", "0.11.1").version == "0.11.1"


def test_tables_are_small() -> None:
    folder = Path(__file__).parents[2] / "adapters"
    assert sum(path.stat().st_size for path in folder.glob("*/tables/*.json")) < 200_000
    for host in ("verl", "openrlhf"):
        assert all(stored(host, version).defaults for version in versions(host))


# A package beside the script. Its code is written here; releases' own is in tests/verl.

_CONFIG = """
data: {train_batch_size: 64}
actor_rollout_ref:
  actor: {use_kl_loss: false, kl_loss_coef: 0.5, kl_loss_type: low_var_kl,
          ppo_mini_batch_size: 64, ppo_epochs: 1}
  rollout: {n: 1, n_agent: 1}
algorithm: {adv_estimator: gae, kl_penalty: kl, kl_ctrl: {type: fixed, kl_coef: 0.25}}
"""


def _package(tmp_path: Path, files: dict[str, str], at: str = "verl") -> None:
    for name, text in {"trainer/config/ppo_trainer.yaml": _CONFIG, **files}.items():
        path = tmp_path / at / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("at", ["verl", "verl/verl", "src/verl"])
def test_its_config_has_the_defaults(tmp_path: Path, at: str) -> None:
    _package(tmp_path, {}, at)
    folder = tmp_path / "examples" / "grpo"
    folder.mkdir(parents=True)
    report = _audit(folder, f"python3 -m verl.trainer.main_ppo {_A}.kl_loss_coef=0.1")
    assert (report.version_from, report.gradient, report.beta) == ("beside", "reverse", 0.25)
    assert any(f.id == "package-beside" and at in f.message for f in report.findings)
    loss = _audit(folder, f"python3 -m verl.trainer.main_ppo {_LOSS}")
    assert (loss.gradient, loss.beta) == ("forward", 0.5)
    # A release that is asked for is that release.
    assert _audit(folder, "python3 -m verl.trainer.main_ppo", "0.9.1").gradient == "none"


def test_search_r1_counts_answers_by_n_agent(tmp_path: Path) -> None:
    _package(tmp_path, {})
    grpo = f"python3 -m verl.trainer.main_ppo algorithm.adv_estimator=grpo {_LOSS}"
    alone = _audit(tmp_path, grpo)
    group = _audit(tmp_path, f"{grpo} actor_rollout_ref.rollout.n_agent=5")
    assert "group-of-one" in _ids(alone) - _ids(group)


def test_a_kl_of_its_own_is_unknown_and_named(tmp_path: Path) -> None:
    code = "def kl_penalty(logprob, ref_logprob, kl_penalty):\n    return ref_logprob - logprob\n"
    _package(tmp_path, {"trainer/ppo/core_algos.py": code})
    report = _audit(tmp_path, "python3 -m verl.trainer.main_ppo")
    assert report.gradient is None and report.after is None
    assert report.unknown["gradient"] == (
        "verl/trainer/ppo/core_algos.py: kl_penalty is no release's, for kl",
    )


def test_a_copy_of_another_name_is_the_package_that_its_trainer_lies_in(tmp_path: Path) -> None:
    code = "def kl_penalty(logprob, ref_logprob, kl_penalty):\n    return ref_logprob - logprob\n"
    _package(tmp_path, {"trainer/ppo/core_algos.py": code}, "mine")
    (tmp_path / "ours" / "cli").mkdir(parents=True)
    (tmp_path / "ours" / "models").mkdir()
    (tmp_path / "ours" / "cli" / "train_ppo_ray.py").write_text(
        "parser.add_argument('--init_kl_coef', type=float, default=0.5)\n"
    )
    models = tmp_path / "ours" / "models" / "utils.py"
    models.write_text("def compute_approx_kl(a, b):\n    return b - a\n")
    ours = f"ours.cli.train --{_ORL_MARK}=1"
    for command, changed in (
        (f"mine.trainer.main {_LOSS}", "mine/trainer/ppo/core_algos.py: kl_penalty"),
        # A coefficient that is not known may not be zero.
        (f"{ours} --init_kl_coef $KL", "ours/models/utils.py: compute_approx_kl"),
        (ours, "ours/models/utils.py: compute_approx_kl"),
    ):
        report = _audit(tmp_path, f"python3 -m {command}")
        assert report.version_from == "beside" and report.gradient is None
        assert report.unknown["gradient"][0].startswith(f"{changed} is no release's")
    # With the first file of a host, and none of its code, it may be anybody's.
    models.unlink()
    assert _audit(tmp_path, f"python3 -m {command}").version_from != "beside"


_ORL_MARK = "micro_rollout_batch_size"


@pytest.mark.parametrize(("read", "gradient"), [("", "none"), (" - kl", None)])
def test_what_a_reward_of_its_own_does_with_the_kl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str, gradient: str | None
) -> None:
    files = {
        "cli/train_ppo_ray.py": "parser.add_argument('--init_kl_coef', type=float, default=0.5)\n"
        "parser.add_argument('--use_kl_loss', action='store_true')\n"
        "parser.add_argument('--kl_estimator', default='k1')\n",
        "models/utils.py": "def compute_approx_kl(a, b):\n    return a - b\n"
        f"def compute_reward(r, kl_coef, kl, mask):\n    return (r{read}) * mask\n",
    }
    for name, text in files.items():
        path = tmp_path / "openrlhf" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    module = tree(tmp_path / "openrlhf" / "models" / "utils.py")
    assert module is not None
    estimator = function(module, "compute_approx_kl")
    assert estimator is not None
    monkeypatch.setitem(openrlhf._ESTIMATORS, digest(estimator), "0.7.5")
    reward = _audit(tmp_path, _ORL)
    assert reward.gradient == gradient
    assert ("never-reaches" in _ids(reward)) == (gradient == "none")
    # A KL in the loss is no matter of the reward's.
    assert _audit(tmp_path, f"{_ORL} --use_kl_loss --kl_estimator k3").gradient == "forward"


def test_a_loss_that_reads_the_reference_in_its_own_way_is_unknown(tmp_path: Path) -> None:
    # FlowRL: no kl_penalty, and log(pi/ref) in its objective.
    actor = "def update_policy(self, data):\n    self.flow(data['ref_log_prob'])\n"
    _package(tmp_path, {"workers/actor/dp_actor.py": actor})
    report = _audit(tmp_path, f"python3 -m verl.trainer.main_ppo {_LOSS}")
    assert report.gradient is None
    said = "verl/workers/actor/dp_actor.py: a loss of ref_log_prob is no release's"
    assert report.unknown["gradient"] == (said,)
    # One that never reads it has no KL loss.
    (tmp_path / "mine").mkdir()
    _package(tmp_path / "mine", {"workers/actor/dp_actor.py": actor.replace("ref_", "old_")})
    dropped = _audit(tmp_path / "mine", f"python3 -m verl.trainer.main_ppo {_LOSS}")
    assert dropped.gradient == "none" and "never-reaches" in _ids(dropped)


_MORE_ESTIMATORS = """
def kl_penalty(logprob, ref_logprob, kl_penalty):
    if kl_penalty == "kl":
        return logprob - ref_logprob
    if kl_penalty in ["own", "other"]:
        return torch.exp(logprob - ref_logprob) - 1
    if kl_penalty == "low_var_kl":
        kl = ref_logprob - logprob
        ratio = torch.exp(kl)
        kld = (ratio - kl - 1).contiguous()
        return torch.clamp(kld, min=-10, max=10)
    if kl_penalty == "mse":
        return (logprob - ref_logprob).square()
    raise NotImplementedError
"""


@pytest.mark.parametrize(
    ("name", "gradient"),
    # mse lacks its half, and own is nobody's.
    [("kl", "zero"), ("low_var_kl", "forward"), ("mse", None), ("own", None)],
)
def test_of_a_changed_function_the_branch_that_a_run_takes_decides(
    tmp_path: Path, name: str, gradient: str | None
) -> None:
    _package(tmp_path, {"trainer/ppo/core_algos.py": _MORE_ESTIMATORS})
    loss = f"python3 -m verl.trainer.main_ppo {_A}.use_kl_loss=True {_A}.kl_loss_type={name}"
    report = _audit(tmp_path, loss)
    assert report.gradient == gradient
    # The k1 in the reward that this run has without a KL loss.
    assert _audit(tmp_path, "python3 -m verl.trainer.main_ppo").gradient == "reverse"


def test_a_copy_that_was_read_is_a_release_until_its_own_setting_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = "self.config.loss(kl_penalty(a, b))"
    actor = f"def update_policy(self):\n    if self.config.use_kl_loss:\n        x = {block}\n"
    _package(tmp_path, {"workers/actor/dp_actor.py": actor})
    module = tree(tmp_path / "verl/workers/actor/dp_actor.py")
    assert module is not None
    (place,) = calls(module, "kl_penalty")
    row = {digest(place): (sources.ADDED, ("data.sft_files",))}
    monkeypatch.setattr(sources, "_LOSS_UNLESS", row)
    command = f"python3 -m verl.trainer.main_ppo {_LOSS}"
    assert _audit(tmp_path, command).gradient == "forward"
    assert _audit(tmp_path, f"{command} data.sft_files=null").gradient == "forward"
    with_answers = _audit(tmp_path, f"{command} data.sft_files=more.parquet")
    assert with_answers.gradient is None
    assert "where data.sft_files=more.parquet" in with_answers.unknown["gradient"][0]


def test_a_name_is_found_in_every_form_of_its_condition() -> None:
    module = ast.parse(_MORE_ESTIMATORS)
    whole = function(module, "kl_penalty")
    assert whole is not None
    alone = ast.parse("def kl_penalty(l, r, k):\n    return l - r\n")
    other = ast.parse(
        "def kl_penalty(logprob, ref_logprob, unused=1):\n    return logprob - ref_logprob\n"
    )
    kl = digest(taken(whole, "kl_penalty", "kl"))
    same, differs = function(other, "kl_penalty"), function(alone, "kl_penalty")
    assert same is not None and differs is not None
    assert digest(same) == kl != digest(differs)
    assert digest(taken(whole, "kl_penalty", "own")) == digest(taken(whole, "kl_penalty", "other"))


def test_a_trainer_that_never_applies_it(tmp_path: Path) -> None:
    trainer = "def fit(batch):\n    # apply_kl_penalty(batch)\n    pass\n"
    _package(tmp_path, {"trainer/ppo/ray_trainer.py": trainer})
    report = _audit(tmp_path, "python3 -m verl.trainer.main_ppo")
    assert report.gradient == "none"


def test_nothing_of_it_is_run_and_a_broken_one_is_said(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    _package(tmp_path, {"trainer/ppo/core_algos.py": f"open({str(mark)!r}, 'w')\n"})
    assert _audit(tmp_path, "python3 -m verl.trainer.main_ppo").version_from == "beside"
    assert not mark.exists()
    other = tmp_path / "other"
    _package(other, {"trainer/ppo/core_algos.py": "def (\n"})
    broken = _audit(other, "python3 -m verl.trainer.main_ppo")
    assert broken.version_from != "beside"
    (said,) = (finding for finding in broken.findings if finding.id == "package-not-read")
    assert said.message.startswith(
        f"The package beside this script can't be read: {other / 'verl'}: no Python on line 1: "
    )
    flags = other / "openrlhf" / "cli" / "train_ppo_ray.py"
    flags.parent.mkdir(parents=True)
    flags.write_text(
        f"open({str(mark)!r}, 'w')\n"
        "parser.add_argument('--init_kl_coef', type=float, default=0.5)\n"
        "parser.add_argument('--use_kl_loss', action='store_true')\n"
    )
    report = _audit(other, "python3 -m openrlhf.cli.train_ppo_ray")
    assert (report.version_from, report.beta) == ("beside", 0.5)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"trainer/config/ppo_trainer.yaml": "a: [1\n"}, "verl: "),
        ({"trainer/config/ppo_trainer.yaml": "[1]\n"}, "verl: "),
        ({"trainer/ppo/ray_trainer.py": "a = '\0'\n"}, "verl: no Python "),
    ],
)
def test_a_package_that_is_no_package_is_said(
    tmp_path: Path, files: dict[str, str], words: str
) -> None:
    _package(tmp_path, files)
    report = _audit(tmp_path, "python3 -m verl.trainer.main_ppo")
    (said,) = (finding for finding in report.findings if finding.id == "package-not-read")
    assert f"can't be read: {tmp_path}/{words}" in said.message and "\n" not in said.message
    assert report.version_from in ("installed", "guessed")
    # Whoever names a release does not ask for the package.
    named = _audit(tmp_path, "python3 -m verl.trainer.main_ppo", "0.9.1")
    assert "package-not-read" not in _ids(named)


def test_a_pipe_beside_a_script_is_not_waited_for(tmp_path: Path) -> None:
    configs = tmp_path / "verl" / "trainer" / "config"
    _package(tmp_path, {"trainer/config/_generated_ppo_trainer.yaml": _CONFIG})
    for pipe in (tmp_path / "common.sh", configs / "_generated_ppo_x_trainer.yaml"):
        os.mkfifo(pipe)
        # Whoever opens it reads this, and does not hang.
        Thread(target=pipe.write_text, args=("a: [\n",), daemon=True).start()
    report = _audit(tmp_path, "source common.sh\npython3 -m verl.trainer.main_ppo data.x=$N")
    assert report.version_from == "beside"
    assert {"sourced-script", "package-beside"} <= _ids(report)


@pytest.mark.parametrize("closed", ["verl", "verl/trainer/config/ppo_trainer.yaml"])
def test_a_package_that_may_not_be_opened_is_said(tmp_path: Path, closed: str) -> None:
    _package(tmp_path, {})
    script = tmp_path / "run.sh"
    script.write_text("python3 -m verl.trainer.main_ppo\n")
    (tmp_path / closed).chmod(0)
    asked = "import sys; from klplug.audit import audit; r = audit(sys.argv[1]);"
    show = "print([f.message for f in r.findings if f.id == 'package-not-read'])"
    words = [sys.executable, "-c", f"{asked} {show}", str(script)]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=_nobody, check=False)
    (tmp_path / closed).chmod(0o755)
    assert "Permission denied" in done.stdout, done.stderr


def _nobody() -> None:
    """Root may open everything; in a child of its own it gives that up."""
    if os.getuid() == 0:
        ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
        ctypes.CDLL(None).prctl(24, 2)  # CAP_DAC_READ_SEARCH
