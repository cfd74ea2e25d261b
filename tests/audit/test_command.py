"""Files, command lines and releases: what is read, what is refused, and what the command prints."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from klplug.audit import AuditError, Report, audit
from klplug.audit.command import audits
from klplug.audit.errors import NoCommand
from klplug.audit.shell import Script
from klplug.audit.tables import versions
from klplug.audit.verdict import gradient_of
from klplug.spec import parse

_VERL = ["python", "-m", "verl.trainer.main_ppo", "algorithm.adv_estimator=grpo"]
_LOSS = ["actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.rollout.n=8"]
_ORL = ["python", "-m", "openrlhf.cli.train_ppo_ray"]

# The issue's own words for what --json holds.
KEYS = {
    *("host", "host_version", "gradient", "scope", "updates_per_rollout", "corrected", "beta"),
    *("beta_absolute", "beta_relative", "dead_zone", "terms", "kl_type", "recommended"),
    "findings",
}


def _write(tmp_path: Path, text: str, name: str = "run.sh") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


# What is read.


def test_a_command_line_and_a_script_have_one_report(tmp_path: Path) -> None:
    words = [*_VERL, *_LOSS]
    script = audit(_write(tmp_path, " ".join(words) + "\n"))
    said = [(change.delete, change.add) for change in script.edits]
    assert said == [(change.delete, change.add) for change in audit(words).edits]
    assert dataclasses.replace(audit(words), line=1, edits=script.edits) == dataclasses.replace(
        script, findings=tuple(dataclasses.replace(f, line=None) for f in script.findings)
    )


def test_json_has_the_keys_and_plain_values() -> None:
    document = audit([*_VERL, *_LOSS]).to_json()
    assert set(document) >= KEYS
    assert set(document["findings"][0]) >= {"id", "severity", "message", "setting", "line"}
    again = json.loads(json.dumps(document, allow_nan=False))
    assert again == document
    assert document["dead_zone"][0][0] is None and document["dead_zone"][0][1] < -2.6


def test_a_report_is_frozen() -> None:
    report = audit(_VERL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.gradient = "reverse"  # type: ignore[misc]
    assert isinstance(report, Report)


def test_a_verl_config_file(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "defaults:\n  - ppo_trainer\n  - _self_\n"
        "algorithm:\n  adv_estimator: grpo\n"
        "actor_rollout_ref:\n  actor:\n    use_kl_loss: true\n    kl_loss_coef: 1e-3\n"
        "    kl_loss_type: k2\n",
        "grpo.yaml",
    )
    report = audit(path)
    assert (report.host, report.gradient, report.beta) == ("verl", "reverse", 0.001)
    (finding,) = (f for f in report.findings if f.id == "off-policy-uncorrected")
    assert finding.setting is None  # nobody wrote a batch size
    assert {f.line for f in report.findings if f.id == "own-token"} == {10}


def test_an_openrlhf_config_file(tmp_path: Path) -> None:
    nested = _write(
        tmp_path,
        "algo:\n  kl:\n    use_loss: true\n    estimator: k2\n    init_coef: 0.02\n"
        "  advantage:\n    estimator: group_norm\nrollout:\n  n_samples_per_prompt: 8\n",
        "nested.yaml",
    )
    flat = _write(
        tmp_path,
        "use_kl_loss: true\nkl_estimator: k2\ninit_kl_coef: 0.02\n"
        "advantage_estimator: group_norm\nn_samples_per_prompt: 8\n",
        "flat.yml",
    )
    for path in (nested, flat):
        report = audit(path)
        assert (report.host, report.gradient, report.beta) == ("openrlhf", "reverse", 0.02)


def test_of_an_openrlhf_config_with_several_runs_nothing_is_known(tmp_path: Path) -> None:
    text = "advantage_estimator: gae\nsweep:\n  - {init_kl_coef: [0, 0.1], kl_estimator: k3}\n"
    report = audit(_write(tmp_path, text, "sweep.yaml"))
    assert report.gradient is report.beta is None
    assert report.unknown["gradient"] == ("sweep has settings of several runs",)


def test_the_config_file_that_a_command_names(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    _write(
        tmp_path / "conf",
        "actor_rollout_ref:\n  actor:\n    use_kl_loss: true\n    kl_loss_type: k1\n"
        "own:\n  key: 1\n",
        "mine.yaml",
    )
    command = " ".join(_VERL)
    for place in ('"$PWD/conf"', "conf"):
        script = f"{command} --config-path={place} --config-name mine\n"
        report = audit(_write(tmp_path, script))
        assert report.gradient == "zero"
        assert not {"config-not-read", "rejected-setting"} & {f.id for f in report.findings}
    # The command's own override comes last.
    script += script.strip() + " actor_rollout_ref.actor.kl_loss_type=k2\n"
    assert audit(_write(tmp_path, script), command=2).gradient == "reverse"


def test_settings_that_refer_to_others() -> None:
    own = ["data.train_batch_size=64", "actor_rollout_ref.actor.ppo_mini_batch_size=32"]
    assert audit([*_VERL, *own]).updates_per_rollout == 2
    own[1] = "actor_rollout_ref.actor.ppo_mini_batch_size=${data.train_batch_size}"
    assert audit([*_VERL, *own]).updates_per_rollout == 1


def test_a_mapping_sets_its_keys() -> None:
    report = audit([*_VERL, "+klplug={kl_type: js_as_loss, kl_coef: 0.5}"])
    assert (report.kl_type, report.recommended, report.beta) == ("js_as_loss", "js_as_loss", 0.5)
    assert not [f for f in report.findings if f.id == "rejected-setting"]


def test_an_advantage_of_somebodys_own_is_unknown() -> None:
    words = [*_VERL[:-1], "algorithm.adv_estimator=mine", "algorithm.use_kl_in_reward=True"]
    report = audit(words)
    assert (report.gradient, report.beta, report.beta_relative) == (None, 0.001, None)
    assert "mine" in report.unknown["gradient"][0]


@pytest.mark.parametrize("name", ["low_var_kl", "kl"])
def test_the_last_of_two_settings_counts(name: str) -> None:
    words = [*_VERL, *_LOSS, "actor_rollout_ref.actor.kl_loss_type=k2"]
    report = audit([*words, f"actor_rollout_ref.actor.kl_loss_type={name}"])
    assert report.gradient == {"low_var_kl": "forward", "kl": "zero"}[name]


def test_abbreviated_flags_are_argparses() -> None:
    report = audit([*_ORL, "--algo.kl.init", "0.5", "--algo.kl.use_l"])
    assert (report.beta, report.scope) == (0.5, "token")


def test_several_commands_in_one_file(tmp_path: Path) -> None:
    path = _write(tmp_path, f"{' '.join(_VERL)}\n{' '.join(_ORL)}\n")
    assert [audit(path, command=c).host for c in (1, 2)] == ["verl", "openrlhf"]
    assert audit(path).commands == 2
    assert audit(path, host="openrlhf").line == 2
    with pytest.raises(AuditError, match="command 3 of 2"):
        audit(path, command=3)


@pytest.mark.parametrize(
    "line",
    [
        "pkill -9 -f verl.trainer.main_ppo || true",
        "kill -9 $(pgrep -f openrlhf.cli.train_ppo_ray)",
        "ps aux | grep verl.trainer.main_ppo | grep -v grep",
        "cp verl/trainer/main_ppo.py /tmp/backup/",
        "sudo /usr/bin/sed -i s/a/b/ verl/trainer/main_ppo.py",
        "ssh node git diff recipe/dapo/main_dapo.py",
    ],
)
def test_a_program_that_names_a_trainer_does_not_start_it(tmp_path: Path, line: str) -> None:
    command = " ".join([*_VERL, *_LOSS])
    (report,) = audits(_write(tmp_path, f"{line}\nconda run -n git {command}\n"))
    assert report.line == 2
    with pytest.raises(NoCommand):
        audits(_write(tmp_path, f"{line}\n"))


def test_a_command_that_somebody_must_ask_for_says_so(tmp_path: Path) -> None:
    asked, plain = (f"{' '.join(_VERL)} trainer.nnodes={n}" for n in (1, 2))
    text = f'if [ -n "$BIG" ]; then\n{asked}\nelse\n{plain}\nfi\n'
    reports = audits(_write(tmp_path, text))
    # The one that runs comes first.
    assert [(report.line, report.reached) for report in reports] == [(4, True), (2, False)]
    assert audit(_VERL).reached


def test_a_file_is_read_once_whatever_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def script(source: str, folder: Path | None = None) -> Script:
        read.append(source)
        return Script(source, folder)

    monkeypatch.setattr("klplug.audit.command.Script", script)
    path = _write(tmp_path, f"{' '.join(_VERL)}\n" * 7)
    assert [report.command for report in audits(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert len(read) == 1


# Releases.


def test_flat_flags_are_of_an_older_release() -> None:
    flat = audit([*_ORL, "--use_kl_loss", "--init_kl_coef", "0.1", "--kl_estimator", "k2"])
    assert (flat.host_version, flat.version_from) == ("0.9.10", "guessed")
    assert audit([*_ORL, "--algo.kl.use_loss"]).host_version == versions("openrlhf")[0]


def test_a_release_can_be_given() -> None:
    plus = [*_VERL, *_LOSS, "actor_rollout_ref.actor.kl_loss_type=k3+"]
    old, new = audit(plus, host_version="0.7.1"), audit(plus, host_version="0.9.1")
    assert (old.gradient, new.gradient) == ("none", "reverse")
    assert "NotImplementedError" in next(
        f.message for f in old.findings if f.id == "rejected-setting"
    )
    assert audit(plus, host_version="0.8.3").host_version == "0.8.3"


@pytest.mark.parametrize("version", ["0.1", "newest", ""])
def test_an_unknown_release_is_refused(version: str) -> None:
    with pytest.raises(AuditError, match=r"not known; there are tables for 0\.9\.1"):
        audit(_VERL, host_version=version)


# What is not known.


def test_what_hangs_on_the_unknown_is_marked(tmp_path: Path) -> None:
    command = f"{' '.join([*_VERL, *_LOSS])} actor_rollout_ref.actor."
    type_unknown = audit(_write(tmp_path, f"{command}kl_loss_type=$KL\n"))
    assert type_unknown.gradient is None and type_unknown.kl_type is None
    assert type_unknown.unknown["gradient"] == ("$KL is not set in the script",)
    assert type_unknown.updates_per_rollout == 4
    coef_unknown = audit(_write(tmp_path, f"{command}kl_loss_coef=$(pick)\n"))
    assert (coef_unknown.gradient, coef_unknown.beta) == ("forward", None)
    assert "$(pick)" in coef_unknown.unknown["beta"][0]
    assert "nan" not in json.dumps(coef_unknown.to_json()).lower()
    group_unknown = audit(_write(tmp_path, f"{command}kl_loss_type=k2 {_LOSS[1][:-1]}$N\n"))
    assert group_unknown.beta_relative == "0.001 * N/(N-1) * sigma"
    anything = audit(_write(tmp_path, f"{command}kl_loss_type=k2 $(extra)\n"))
    assert anything.gradient is None and anything.updates_per_rollout is None


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        ("actor_rollout_ref.actor.use_kl_loss=True", False),
        ("algorithm.use_kl_in_reward=True", True),
        ("+klplug.kl_type='k2_as_loss,ratio=rollout'", True),
    ],
)
def test_whether_the_rollout_engine_is_corrected_for(kl: str, expected: bool) -> None:
    words = [*_VERL, "algorithm.rollout_correction.rollout_is=token", "+klplug.kl_coef=1", kl]
    assert audit(words).rollout_corrected is expected
    bare = audit([w for w in words if "correction" not in w])
    assert bare.rollout_corrected is ("rollout'" in kl)


@pytest.mark.parametrize(
    "kl_type", ["exact_as_loss", "k2_as_loss,vocab=topk:8", "js_as_loss,vocab=exact"]
)
def test_over_the_vocabulary_a_tokens_own_kl_needs_no_weight(kl_type: str) -> None:
    """docs/exact.md, whose table the oracle holds: OLDPREF, as with a ratio for each token."""
    asynchronous = "trainer.v1.trainer_mode=colocate_async"
    corrects = "algorithm.rollout_correction.rollout_is=token"
    words = [*_VERL, "actor_rollout_ref.rollout.n=8", asynchronous, corrects, "+klplug.kl_coef=1"]
    report = audit([*words, f"+klplug.kl_type='{kl_type}'"])
    ids = {finding.id for finding in report.findings}
    assert report.updates_per_rollout == 4 and report.corrected and report.rollout_corrected
    assert not {"off-policy-uncorrected", "stale-samples", "rollout-mismatch"} & ids
    # What is summed up over later tokens has one.
    whole = audit([*words, f"+klplug.kl_type='{kl_type},horizon=sequence,ratio=none'"])
    assert not whole.corrected and not whole.rollout_corrected


def test_the_kl_of_the_top_tokens_is_no_whole_kl() -> None:
    report = audit([*_VERL, "+klplug.kl_type='k2_as_loss,vocab=topk:8'", "+klplug.kl_coef=1"])
    assert report.gradient == "neither" and "a lower bound" in str(report.target)
    assert report.recommended == report.kl_type  # it was chosen


_RECORDS = "actor_rollout_ref.rollout.calculate_log_probs"
_CORRECTION = "algorithm.rollout_correction"


@pytest.mark.parametrize(
    ("version", "records", "weighed"),
    [  # its default: verl's trainer/config/rollout/rollout.yaml
        ("0.9.1", [], True),
        ("0.9.1", [f"{_RECORDS}=False"], False),
        ("0.8.0", [], False),
        ("0.8.0", [f"{_RECORDS}=True"], True),
    ],
)
def test_without_the_samplers_log_probs_nothing_corrects_for_it(
    version: str, records: list[str], weighed: bool
) -> None:
    # compute_rollout_correction_and_add_to_batch where rollout_log_probs are in the batch.
    words = [*_VERL, *_LOSS, f"{_CORRECTION}.rollout_is=token", *records]
    ids = {finding.id for finding in audit(words, host_version=version).findings}
    assert ("rollout-mismatch" in ids) == weighed
    # apply_bypass_mode raises where they are not.
    bypass = audit([*_VERL, *_LOSS, f"{_CORRECTION}.bypass_mode=True", *records])
    rejected = [f.message for f in bypass.findings if f.id == "rejected-setting"]
    assert bool(rejected) == (f"{_RECORDS}=False" in records)


# losses.py: `if config.use_kl_loss`. Hydra makes a bool of true and false alone.
@pytest.mark.parametrize(
    ("value", "on"),
    [("None", True), ("off", True), ("1", True), ("false", False), ("null", False), ("0", False)],
)
def test_a_switch_is_what_python_takes_for_true(value: str, on: bool) -> None:
    words = [*_VERL, f"actor_rollout_ref.actor.use_kl_loss={value}"]
    assert audit(words).gradient == ("forward" if on else "none")


def test_what_is_taken_out_is_unknown() -> None:
    name = "actor_rollout_ref.actor.kl_loss_type"
    report = audit([*_VERL, *_LOSS, f"{name}=k1", f"~{name}"])
    assert report.unknown["gradient"] == (f"~{name} takes it out",)
    assert audit([*_VERL, *_LOSS, f"~{name}", f"+{name}=k1"]).gradient == "zero"


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["-c", "job"], ["--info=all"], ["--help"]])
def test_a_command_that_prints_its_settings_trains_nothing(flag: list[str]) -> None:
    with pytest.raises(NoCommand):
        audit([*_VERL, *_LOSS, *flag])
    # --package takes a value, and does nothing else.
    assert "rejected-setting" not in [f.id for f in audit([*_VERL, "-p", "actor"]).findings]


def test_gpg_multiplies_by_what_only_the_run_knows() -> None:
    # core_algos.compute_gpg_outcome_advantage: alpha = answers / those with a score.
    words = [*_VERL[:-1], "algorithm.adv_estimator=gpg", *_LOSS]
    assert audit(words).beta_relative == "0.00114286 / alpha"
    reward = audit([*words, "algorithm.use_kl_in_reward=True", f"{_LOSS[0][:-4]}False"])
    assert (reward.beta_absolute, reward.beta_relative) == ("0.000875 * alpha", 0.001)


def test_the_text_of_an_unknown_value_is_not_judged(tmp_path: Path) -> None:
    script = f'{" ".join(_VERL)} trainer.experiment_name=$(basename "${{M,,}}")-x\n'
    assert "rejected-setting" not in [f.id for f in audit(_write(tmp_path, script)).findings]


# Bad input.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hello\n", "no training command"),
        ("", "no training command"),
        ("python -m openrlhf.cli.train_dpo --x 1\n", "train_dpo is not audited"),
        ("python -m verl.trainer.sft_trainer x=1\n", "sft_trainer is not audited"),
        ("python -m verl.trainer.main_ppo 'a=1\n", "line 1"),
    ],
)
def test_a_file_that_is_no_training_command(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AuditError, match=message):
        audit(_write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "not valid YAML on line 2"),
        ("a: &a {b: *a}\n", "nested without end"),
        ("a: &a {run: python -m verl.trainer.main_ppo, b: *a}\n", "nested without end"),
        ("- 1\n", "is a mapping"),
        ("model: x\nlr: 1\n", "its keys are lr, model"),
        # Other trainers' files, and one of verl's groups: a name or two are the hosts' as well.
        ("lr: 1\nmax_epochs: 9\nseed: 1\n", "its keys are lr, max_epochs, seed"),
        ("temperature: 1\ngamma: 0.9\ntop_p: 1\n", "its keys are gamma, temperature, top_p"),
        ("init_kl_coef: 0.1\nadap_kl_ctrl: true\ncliprange: 0.2\n", "its keys are adap_kl_ctrl"),
        ("use_kl_loss: true\nkl_loss_type: low_var_kl\n", "its keys are kl_loss_type"),
        ("algorithm: ppo\nseed: 1\n", "its keys are algorithm, seed"),
        ("algorithm: {name: PPO, gamma: 0.9}\n", "its keys are algorithm"),
    ],
)
def test_a_yaml_that_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AuditError, match=message):
        audit(_write(tmp_path, text, "config.yaml"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="No such file"):
        audit(tmp_path / "nowhere.sh")
    with pytest.raises(AuditError, match="directory"):
        audit(tmp_path)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\x7fELF\0\0")
    with pytest.raises(AuditError, match="not a text file"):
        audit(binary)
    with pytest.raises(AuditError, match="host 'trl' is not known; there is openrlhf, verl"):
        audit(_VERL, host="trl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*_VERL, "nonsense"], "'nonsense' is not a key=value override"),
        ([*_VERL, "of two\nlines"], r"'of two\nlines' is not a key"),
        ([*_VERL, *_LOSS, "actor_rollout_ref.actor.kl_loss_type=full"], "NotImplementedError"),
        ([*_VERL, *_LOSS, "actor_rollout_ref.actor.kl_loss_type=k4"], "kl_penalty knows kl, k1"),
        ([*_VERL, *_LOSS, "actor_rollout_ref.actor.kl_loss_coef=much"], "takes a number"),
        ([*_VERL, "actor_rollout_ref.rollout.n=0"], "a whole number of at least 1"),
        ([*_VERL, "+klplug.kl_type=k2_as_loss,ratio=none"], "in klplug.kl_type Hydra takes"),
        ([*_ORL, "k2", "--algo.kl.use_loss"], "'k2' is a word that belongs to no flag"),
        ([*_ORL, "--train.batch_size", "0"], "a whole number of at least 1"),
        ([*_VERL, "actor_rollout_ref.actor.loss_agg_mode=mean"], "takes token-mean"),
        ([*_ORL, "--algo.kl.estimator", "k4"], "takes k1, k2, k3"),
        ([*_ORL, "--algo.kl.use_loss", "True"], "takes no value"),
        ([*_ORL, "--algo.kl.init_coef"], "needs a value"),
        ([*_ORL, "--rollout.n_samples_per_prompt", "8", "9"], "takes one value"),
        ([*_ORL, "--algo.advantage.estimator", "rloo"], "more than one answer per prompt"),
    ],
)
def test_what_the_host_would_refuse_is_a_finding(words: list[str], message: str) -> None:
    reasons = [f.message for f in audit(words).findings if f.id == "rejected-setting"]
    assert any(message in reason for reason in reasons)


@pytest.mark.parametrize(
    ("words", "version", "name"),
    [
        ([*_VERL, "data.train_batch=3"], "0.9.1", "data.train_batch"),
        ([*_ORL, "--algo.kl.estima", "k1", "--kl"], "0.11.2", "kl"),
    ],
)
def test_an_unknown_setting_is_refused_by_a_release_that_is_named(
    words: list[str], version: str, name: str
) -> None:
    def said(id: str, **release: str) -> list[str]:
        return [f.message for f in audit(words, **release).findings if f.id == id]  # type: ignore[arg-type]

    (message,) = said("rejected-setting", host_version=version)
    assert f"{version} has no setting {name}." in message
    (message,) = said("unknown-setting")
    assert f"has {name}:" in message and not said("rejected-setting")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*_VERL, "+klplug.kl_type=k4_as_loss", "+klplug.kl_coef=1"], "k4_as_loss"),
        ([*_VERL, "+klplug.kl_type=k2_as_loss"], "needs a kl_coef"),
        ([*_VERL, "+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=0"], "would do nothing"),
        ([*_VERL, "+klplug.kl_type=none", "+klplug.kl_coef=1"], "takes no kl_coef"),
        (["python", "-m", "klplug_openrlhf"], "kl_type is missing"),
        (["klplug_openrlhf", "--klplug.kl_type", "k2_as_loss"], "needs a kl_coef"),
    ],
)
def test_what_klplug_would_refuse_is_a_finding(words: list[str], message: str) -> None:
    report = audit(words)
    reasons = [f.message for f in report.findings if f.id == "klplug-refuses"]
    assert len(reasons) == 1 and message in reasons[0]
    assert report.fails("error")


_ASKS = ["+klplug.kl_type=k1_in_reward", "+klplug.kl_coef=1"]


def _refused(tmp_path: Path, *words: str) -> bool:
    report = audit(_write(tmp_path, " ".join([*_VERL[:3], *words]) + "\n"))
    return "klplug-refuses" in [f.id for f in report.findings]


def test_a_refusal_that_hangs_on_the_unknown_is_not_said(tmp_path: Path) -> None:
    estimator = "algorithm.adv_estimator="
    assert _refused(tmp_path, *_ASKS, f"{estimator}reinforce_plus_plus")
    assert not _refused(tmp_path, *_ASKS, f"{estimator}$ADV")
    assert not _refused(tmp_path, *_ASKS, f"{estimator}reinforce_plus_plus", "$(extra)")
    # One that hangs on another value is.
    assert _refused(
        tmp_path, *_ASKS[:1], "+klplug.kl_coef=$BETA", f"{estimator}reinforce_plus_plus"
    )


def test_advice_deletes_what_it_decides_and_keeps_the_rest(tmp_path: Path) -> None:
    words = [*_VERL, *_LOSS, "actor_rollout_ref.actor.kl_loss_coef=0.02", "trainer.nnodes=2"]
    after = ("+klplug.kl_type=k2_as_loss", "+klplug.kl_coef=0.02")
    assert audit(words).after == (*_VERL, _LOSS[1], "trainer.nnodes=2", *after)
    script = _write(tmp_path, "set -e\n" + " \\\n  ".join(words) + "\n")
    assert audit(script).after == audit(words).after
    assert audit(_VERL).after is None  # no KL, and so nothing to change
    config = "algorithm: {adv_estimator: grpo}\nactor_rollout_ref: {actor: {use_kl_loss: true}}\n"
    assert audit(_write(tmp_path, config, "run.yaml")).after is None  # no command


def test_advice_is_what_the_host_serves() -> None:
    reward = "algorithm.use_kl_in_reward=True"
    whitened = [*_VERL[:3], "algorithm.adv_estimator=reinforce_plus_plus", reward]
    assert audit([*_VERL, reward]).recommended == "k1_in_reward"
    assert audit(whitened).recommended == "k1_in_reward,reward_norm=group"
    # Whitened, and past the KL: neither order of the reward is served.
    assert audit([*_VERL[:3], "algorithm.adv_estimator=gdpo", reward]).recommended == "k2_as_loss"


_TO_TEACHER = "k2_as_loss,reference=teacher"


@pytest.mark.parametrize(
    "words",
    [
        [*_VERL, f"+klplug.kl_type='{_TO_TEACHER}'", "+klplug.kl_coef=1"],  # none is named
        [*_VERL, f"+klplug.kl_type='{_TO_TEACHER}'", "+klplug.kl_coef=1", "+klplug.teacher=a/b"],
        f"python -m klplug_openrlhf --klplug.kl_type {_TO_TEACHER} --klplug.kl_coef 1 "
        "--klplug.teacher a/b".split(),
    ],
)
def test_where_nothing_near_it_would_start_the_refusal_is_the_advice(words: list[str]) -> None:
    report = audit(words)
    assert report.findings[0].id == "klplug-refuses"
    assert (report.instead, report.edits, report.after) == ((), (), None)


def test_a_sum_of_klplugs_own_is_named_whole_and_nothing_better_is_known() -> None:
    """beta is beside the string, and each factor in it."""
    kl_type = "1.5*k2_as_loss+-0.5*k2_as_loss,reference=old"
    report = audit([*_VERL, f"+klplug.kl_type='{kl_type}'", "+klplug.kl_coef=0.01"])
    assert (report.kl_type, report.recommended, report.beta) == (kl_type, kl_type, 0.01)
    assert [term.beta_absolute for term in report.terms] == pytest.approx([0.015, -0.005])


def test_a_kl_to_the_sampler_is_none_to_the_reference() -> None:
    for kl_type, words in (
        ("forward_as_loss,reference=rollout", "KL(rollout||pi)"),
        ("js_as_loss,reference=old", "JS(pi, old)"),
        ("abs_as_loss,reference=teacher", "total variation"),
    ):
        (term,) = parse(kl_type).terms
        gradient, target = gradient_of(term)
        assert gradient == "neither" and words in target
        assert not re.search(r"\bref\b", target)
    (term,) = parse("k1_as_loss,reference=old").terms
    assert gradient_of(term) == ("zero", "zero")


def test_a_bounded_coefficient_is_that_of_no_kl() -> None:
    """docs/derivations.md: of one token the gradient is a Huber-like divergence's, not the KL's."""
    for kl_type in ("k2_as_loss,bound=2", "k3_as_loss,bound=2", "k1_in_reward,bound=2"):
        (term,) = parse(kl_type).terms
        gradient, target = gradient_of(term)
        assert gradient == "neither" and target.endswith("held between -2 and 2")
    (term,) = parse("k1_as_loss,bound=0.5").terms
    assert gradient_of(term) == ("zero", "zero")
    (term,) = parse("k2_as_loss,bound=none").terms
    assert gradient_of(term)[0] == "reverse"


def test_a_divergence_to_the_posterior_has_the_raw_reward_in_it() -> None:
    kl_type = "js_as_loss,reference=posterior"
    own = [f"+klplug.kl_type='{kl_type}'", "+klplug.kl_coef=0.1"]
    report = audit([*_VERL, "actor_rollout_ref.rollout.n=4", *own])
    assert (report.kl_type, report.recommended, report.beta) == (kl_type, kl_type, 0.1)
    (term,) = report.terms
    assert (term.gradient, term.scope) == ("neither", "sequence")
    assert term.target == "grad 2 JS(pi, p) between whole answers, p = ref exp(r/kl_coef)/Z"
    assert (term.beta_absolute, term.beta_relative) == (0.1, 0.1)
