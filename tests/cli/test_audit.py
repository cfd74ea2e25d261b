"""``klplug audit``: statuses, text and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from klplug.audit import audit
from tests.audit.verdicts import SCRIPTS
from tests.cli.conftest import Klplug

COMMAND = ["python", "-m", "verl.trainer.main_ppo", "actor_rollout_ref.actor.use_kl_loss=True"]


def test_statuses_and_text(klplug_command: Klplug) -> None:
    clean = klplug_command("audit", SCRIPTS / "verl-rloo.sh")
    assert (clean.status, clean.err) == (0, "")
    assert "reverse KL" in clean.out and "No findings." in clean.out
    found = klplug_command("audit", SCRIPTS / "verl-grpo.sh")
    assert found.status == 1
    for words in ("forward KL", "log(pi/ref) below -2.61", "line 19", "+klplug.kl_type=k2_as_loss"):
        assert words in found.out
    unread = klplug_command("audit", "nowhere.sh")
    assert (unread.status, unread.out) == (2, "")
    assert unread.err == "klplug: error: nowhere.sh: No such file or directory\n"


@pytest.mark.parametrize(("at", "status"), [("info", 1), ("error", 0), ("never", 0)])
def test_fail_on_moves_the_threshold(klplug_command: Klplug, at: str, status: int) -> None:
    script = SCRIPTS / "verl-grpo.sh"
    assert klplug_command("audit", "--fail-on", at, script).status == status


def test_a_command_line_as_json(klplug_command: Klplug) -> None:
    done = klplug_command("audit", "--json", "--", *COMMAND)
    assert done.status == 1
    assert json.loads(done.out) == audit(COMMAND).to_json()


def test_a_command_line_that_was_quoted(klplug_command: Klplug) -> None:
    done = klplug_command("audit", " ".join(COMMAND))
    assert done.status == 2
    assert "after --, unquoted" in done.err


@pytest.mark.parametrize("name", [path.stem for path in sorted(SCRIPTS.glob("*.sh"))])
def test_every_report_can_be_shown(klplug_command: Klplug, name: str) -> None:
    out = klplug_command("audit", SCRIPTS / f"{name}.sh").out
    assert "gradient" in out and "updates" in out
    assert not any(word in out for word in ("None", "nan", "{"))


def test_a_default_is_called_one(klplug_command: Klplug) -> None:
    out = klplug_command("audit", "--", *COMMAND).out
    assert "the default actor_rollout_ref.actor.kl_loss_type=low_var_kl" in out
    assert "the default actor_rollout_ref.actor.use_kl_loss" not in out


def test_what_is_unknown_is_shown(klplug_command: Klplug, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(" ".join(COMMAND) + " actor_rollout_ref.actor.kl_loss_type=$KL\n")
    out = klplug_command("audit", script).out
    assert "gradient      unknown: $KL is not set in the script" in out


def test_docs_show_what_the_command_prints(
    klplug_command: Klplug, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = SCRIPTS.parents[2]
    monkeypatch.chdir(root)
    monkeypatch.setenv("COLUMNS", "100")
    out = klplug_command("audit", "tests/audit/scripts/verl-grpo.sh").out
    printed = "\n".join(line.rstrip() for line in out.splitlines())
    assert printed in (root / "docs" / "audit.md").read_text()
