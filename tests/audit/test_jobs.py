"""A job's YAML holds a command as a shell script, a list of words, or a list of commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from klplug.audit import AuditError, Report, audit
from klplug.audit.command import audits
from klplug.audit.edits import edited

LOSS = "actor_rollout_ref.actor.use_kl_loss=True"
TYPE = "actor_rollout_ref.actor.kl_loss_type=low_var_kl"
COEF = "actor_rollout_ref.actor.kl_loss_coef"
WORDS = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=8", LOSS, TYPE)
BROKEN = " \\\n      ".join(("python3 -m verl.trainer.main_ppo", *WORDS, f"{COEF}=0.02"))
ONE_LINE = " ".join(("python3 -m verl.trainer.main_ppo", *WORDS, f"{COEF}=0.02"))

SKYPILOT = f"""\
resources: {{accelerators: H100:8}}
setup: pip install verl
run: |
  cd verl
  if [ "$SKYPILOT_NODE_RANK" == "0" ]; then
    {BROKEN}
  fi
"""
RAY = f"apiVersion: ray.io/v1\nkind: RayJob\nspec:\n  entrypoint: {ONE_LINE}\n"
FOLDED = "kind: RayJob\nspec:\n  entrypoint: >\n    " + ONE_LINE.replace(" ", "\n    ", 3) + "\n"
DSTACK = "type: task\ncommands:\n  - KL=0.02\n  - " + ONE_LINE.replace("=0.02", "=$KL") + "\n"
SHELL = f'a: 1\n---\nspec:\n- command: ["/bin/bash", "-c"]\n  args:\n  - |\n    {BROKEN}\n'
POD = """\
spec:
  containers:
  - name: verl
    command: [python3, -m, verl.trainer.main_ppo]
    args:
""" + "".join(f"    - {word}\n" for word in (*WORDS, f"{COEF}=0.02"))


def _write(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _said(report: Report) -> tuple[object, ...]:
    return report.kl_type, report.beta, report.gradient, report.updates_per_rollout


@pytest.mark.parametrize("text", [SKYPILOT, RAY, FOLDED, DSTACK, SHELL, POD])
def test_a_job_is_read_as_the_command_that_it_holds(tmp_path: Path, text: str) -> None:
    report = audit(_write(tmp_path, text))
    assert _said(report) == _said(audit(_write(tmp_path, ONE_LINE, "same.sh")))
    assert report.kl_type == "k3_as_loss,ratio=none" and report.beta == 0.02


@pytest.mark.parametrize("text", [SKYPILOT, RAY, SHELL, POD])
def test_a_finding_has_its_line_of_the_file(tmp_path: Path, text: str) -> None:
    report = audit(_write(tmp_path, text))
    (line,) = {f.line for f in report.findings if f.id == "forward-kl"}
    assert line is not None and TYPE in text.splitlines()[line - 1]
    assert report.line is not None and "python3" in text.splitlines()[report.line - 1]


def test_an_edit_of_a_block_is_one_of_the_file(tmp_path: Path) -> None:
    after = edited(SKYPILOT, audit(_write(tmp_path, SKYPILOT)).edits)
    was, now = yaml.safe_load(SKYPILOT), yaml.safe_load(after)
    assert {**now, "run": ""} == {**was, "run": ""}
    assert "klplug.kl_type=k2_as_loss" in now["run"] and LOSS not in now["run"]
    assert _said(audit(_write(tmp_path, after)))[:2] == ("k2_as_loss", 0.02)


@pytest.mark.parametrize("text", [RAY, FOLDED, DSTACK, POD])
def test_what_yaml_writes_in_another_way_is_not_edited(tmp_path: Path, text: str) -> None:
    with pytest.raises(AuditError, match="does not stand literally"):
        edited(text, audit(_write(tmp_path, text)).edits)


def test_a_value_that_the_cluster_puts_in_is_unknown(tmp_path: Path) -> None:
    report = audit(_write(tmp_path, POD.replace("=0.02", "=$(KL)")))
    assert report.beta is None and "$(KL)" in report.unknown["beta"][0]
    steps = f"jobs: {{a: {{steps: [{{run: '{ONE_LINE.replace('0.02', '${{ matrix.kl }}')}'}}]}}}}\n"
    report = audit(_write(tmp_path, steps))
    assert report.kl_type == "k3_as_loss,ratio=none" and report.beta is None


def test_each_script_of_a_file_is_judged(tmp_path: Path) -> None:
    flags = "--algo.kl.init_coef 0.1 --algo.kl.use_loss --algo.kl.estimator k2"
    other = f"python -m openrlhf.cli.train_ppo_ray {flags}"
    path = _write(tmp_path, f"steps:\n- run: {ONE_LINE}\n- run: |\n    {other}\n")
    assert [report.host for report in audits(path)] == ["verl", "openrlhf"]
    assert [report.host for report in audits(path, host="openrlhf")] == ["openrlhf"]
    assert len(audits(_write(tmp_path, f"a: &a {{run: '{ONE_LINE}'}}\nb: *a\n"))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "on: {push: {paths: ['verl/**', verl/trainer/main_ppo.py]}}\n",
        "program: verl/trainer/main_ppo.py\nmethod: grid\n",
        "run: |\n  # python3 -m verl.trainer.main_ppo\n  true\n",
    ],
)
def test_a_trainer_that_is_only_named_is_not_judged(tmp_path: Path, text: str) -> None:
    with pytest.raises(AuditError):
        audit(_write(tmp_path, text))
