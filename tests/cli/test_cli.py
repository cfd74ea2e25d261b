"""The command itself: statuses, the missing extra, JSON, and what importing klplug costs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import klplug
from klplug.cli.app import COMMANDS, EXAMPLES
from tests.cli.conftest import Klplug
from tests.cli.test_report import tensorboard
from tests.cli.test_soup import written


def python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_list_prints_every_kl_type(klplug_command: Klplug) -> None:
    done = klplug_command("list")
    assert done.status == 0
    assert all(name in done.out for name in klplug.kl_types())
    assert "E[k2]" in done.out


def test_list_as_json_is_the_registry(klplug_command: Klplug) -> None:
    listed = json.loads(klplug_command("list", "--json").out)
    expected = [asdict(row) for row in klplug.kl_types().values()]
    assert listed == json.loads(json.dumps(expected))


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("none", {"none"}),
        ("abs", {"abs_as_loss", "abs_in_reward"}),
        ("k1_as_loss", {"k1_as_loss"}),
        ("low_var_kl", {"k3_as_loss", "k3_in_reward", "k3_in_reward+k3_as_loss"}),
    ],
)
def test_list_of_a_name_has_its_rows_alone(
    klplug_command: Klplug, name: str, listed: set[str]
) -> None:
    assert {row["name"] for row in json.loads(klplug_command("list", name, "--json").out)} == listed


def test_list_of_what_is_no_name(klplug_command: Klplug) -> None:
    done = klplug_command("list", "k4_as_loss")
    assert done.status == 2 and "Did you mean 'k2_as_loss'" in done.err


@pytest.mark.parametrize("columns", [40, 60, 120, 139, 140])
def test_list_breaks_no_word_at_any_width(
    klplug_command: Klplug, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = klplug_command("list").out
    assert max(map(len, out.splitlines())) <= columns
    words = set(re.findall(r"[a-z]{2,}", out))
    for row in klplug.kl_types().values():
        assert set(re.findall(r"[a-z]{2,}", f"{row.target} {row.gradient_bias}")) <= words


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_every_help_work(
    klplug_command: Klplug, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    said = " ".join(klplug_command(command, "--help").out.split())
    monkeypatch.chdir(tmp_path)
    Path("train.sh").write_text("python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo\n")
    Path("scripts").mkdir()
    shutil.copy("train.sh", "scripts/one.sh")
    tensorboard(Path("runs/one"))
    Path("train.log").write_text("step:1 - critic/score/mean:0.5\nstep:2 - critic/score/mean:1\n")
    for model in ("sft-1", "sft-2", "base", "sft"):
        written(Path(model), {"a.weight": [1, 2, 3, 4], "b.weight": [5, 6, 7], "empty": []})
    monkeypatch.setattr("klplug.cli.doctor.hosts", dict)  # a Ray for an example is too much
    for example in EXAMPLES[command]:
        assert example in said
        program, *words = shlex.split(example)
        assert program == "klplug" and words[0] == command
        assert klplug_command(*words).status in (0, 1)
        shutil.rmtree("reference", ignore_errors=True)  # the next example makes it anew


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("klplug explain k2", ["k2_as_loss", "k2_in_reward"]),
        ("klplug explain --paper fr", ["frpo"]),
        ("klplug list low_v", ["low_var_kl"]),
        ("klplug ex", ["explain"]),
    ],
)
def test_shell_completion(line: str, offered: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "klplug"],
        env=os.environ
        | {
            "_KLPLUG_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(line.count(" ")),
        },
        capture_output=True,
        text=True,
    )
    assert set(offered) <= set(done.stdout.split()), done.stderr


def test_a_wrong_command_is_status_2(klplug_command: Klplug) -> None:
    done = klplug_command("expalin")
    assert done.status == 2
    assert "expalin" in done.err


def test_the_version(klplug_command: Klplug) -> None:
    assert klplug_command("--version").out == f"klplug {klplug.__version__}\n"


def test_without_the_extra_it_says_what_to_install() -> None:
    for missing in ("typer", "rich"):
        done = python(
            f"import sys; sys.modules[{missing!r}] = None; import klplug.cli as c; c.main()"
        )
        assert done.returncode == 2
        assert missing in done.stderr and "pip install 'klplug[cli]'" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("yaml", ["audit", "SCRIPT"], "cli"),
        ("matplotlib", ["explain", "k2_as_loss", "--png", "c.png"], "report"),
        ("torch", ["explain", "k2_as_loss", "--png", "c.png"], "torch"),
        ("matplotlib", ["report", "RUN"], "report"),
        ("tensorboard", ["report", "RUN"], "report"),
        ("google", ["report", "RUN"], "report"),
    ],
)
def test_without_an_extra_every_command_says_what_to_install(
    missing: str, words: list[str], extra: str, tmp_path: Path
) -> None:
    tensorboard(tmp_path / "RUN")
    (tmp_path / "SCRIPT").write_text("python -m verl.trainer.main_ppo\n")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.modules[{missing!r}] = None; import klplug.cli as c; c.main()",
            *words,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert f"pip install 'klplug[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_klplug_loads_no_torch() -> None:
    done = python(
        "import sys, klplug\n"
        "klplug.parse('k2_as_loss+k1_in_reward'), klplug.kl_types(), klplug.kl_controller\n"
        "assert set(klplug.__all__) <= set(dir(klplug))\n"
        "assert 'torch' not in sys.modules\n"
        "from klplug import *\n"
        "assert policy_loss.__module__ == 'klplug.step' and 'torch' in sys.modules\n"
        "assert hasattr(klplug, 'kl_term') and not hasattr(klplug, 'kl_terms')\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_klplug_loads_nothing_of_the_command_line() -> None:
    done = python(
        "import sys, klplug\n"
        "extra = {'typer', 'rich', 'matplotlib', 'tensorboard', 'yaml', 'klplug.cli'}\n"
        "loaded = extra & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_no_room_for_what_is_printed_is_status_2() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-u", "-m", "klplug", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "klplug: error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_json_is_json_in_any_encoding(encoding: str) -> None:
    pages = "k1-as-loss", "k3-in-reward"  # which have a middle dot and a double bar
    done = subprocess.run(
        [sys.executable, "-m", "klplug", "explain", *pages, "--json"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=True,
    )
    found = json.loads(done.stdout.decode("ascii"))
    assert "E[1 · grad" in found[0]["text"] and "KL(pi‖ref)" in found[1]["text"]


def test_python_m_klplug_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "klplug", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"klplug {klplug.__version__}\n", done.stderr
