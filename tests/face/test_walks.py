"""Two walks of a first-time user: wheel to edited script, and clone to report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import klplug
from tests.bare import ROOT, bare, run, wheel
from tests.conftest import NAMED

__all__ = ["bare", "wheel"]


def test_from_the_wheel_to_an_edited_script(bare: Path) -> None:
    """Bare Python, pip install 'klplug[cli]': audit, the edit applied, explain of what changed."""
    script = bare / "grpo.sh"
    shutil.copy(ROOT / "docs" / "examples" / "grpo.sh", script)

    found = run(bare, "-m", "klplug", "audit", script.name)
    assert found.returncode == 1
    assert "k3_as_loss,ratio=none: gradient of the forward KL" in found.stdout
    assert "add +klplug.kl_type=k2_as_loss +klplug.kl_coef=0.001" in found.stdout

    shown = run(bare, "-m", "klplug", "audit", "--diff", script.name)
    assert "-    actor_rollout_ref.actor.kl_loss_type=low_var_kl \\" in shown.stdout.splitlines()
    assert "low_var_kl" in script.read_text()  # a diff changes nothing

    run(bare, "-m", "klplug", "audit", "--fix", script.name)
    words = bash_words(script)
    assert "+klplug.kl_type=k2_as_loss" in words and "+klplug.kl_coef=0.001" in words
    assert not any("kl_loss" in word for word in words)
    assert "actor_rollout_ref.rollout.n=5" in words

    again = json.loads(run(bare, "-m", "klplug", "audit", "--json", script.name).stdout)
    assert again["kl_type"] == "k2_as_loss"
    assert not run(bare, "-m", "klplug", "audit", "--diff", script.name).stdout

    explained = run(bare, "-m", "klplug", "explain", "low_var_kl", "k2_as_loss", "--json")
    *_, before, after = json.loads(explained.stdout)
    assert before["rows"][0]["target"] == klplug.kl_types()["k3_as_loss"].target
    assert after["kl_type"] == "k2_as_loss"


def bash_words(script: Path) -> list[str]:
    """The words that bash passes to the script's command."""
    prelude = 'python3() { printf "%s\\n" "$@"; }\n'
    done = subprocess.run(
        ["bash", "-c", prelude + script.read_text()], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(not NAMED, reason="no host was named")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_from_a_clone_to_a_report(tmp_path: Path) -> None:
    """Clone, quickstart, report, README's own loop; with this checkout's environment."""
    done = subprocess.run(
        [ROOT / "tests" / "face" / "walk_b.sh", tmp_path / "clone", NAMED[0], "2"],
        env=os.environ | {"ENVIRONMENTS": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("walk b: done\n")
    assert re.search(r"^next:$", done.stdout, re.MULTILINE)
    page = (tmp_path / "clone" / "report" / "report.html").read_text()
    assert "k2_as_loss" in page
