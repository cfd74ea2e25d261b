"""``klplug audit``: statuses, text and JSON."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from klplug.audit import audit
from klplug.audit.command import audits, read
from klplug.cli.audit import changed
from tests.audit.verdicts import SCRIPTS
from tests.cli.conftest import Done, Klplug

COMMAND = ["python", "-m", "verl.trainer.main_ppo", "actor_rollout_ref.actor.use_kl_loss=True"]


def test_statuses_and_text(klplug_command: Klplug) -> None:
    clean = klplug_command("audit", "-v", SCRIPTS / "verl-rloo.sh")
    assert (clean.status, clean.err) == (0, "")
    assert "reverse KL" in clean.out and "No findings." in clean.out
    found = klplug_command("audit", "--verbose", SCRIPTS / "verl-grpo.sh")
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


@pytest.mark.parametrize("option", ["--diff", "--fix"])
def test_a_command_line_is_nothing_to_edit(klplug_command: Klplug, option: str) -> None:
    done = klplug_command("audit", option, "--", *COMMAND)
    assert (done.status, done.out) == (2, "")
    assert done.err == f"klplug: error: {option} is for files: a command line is none\n"


def test_an_empty_word_is_no_file(klplug_command: Klplug, folder: Path) -> None:
    """As an unset variable is in quotes. As a path it would be the working folder."""
    for words in ([""], ["good.sh", ""]):
        done = klplug_command("audit", *words)
        assert (done.status, done.out) == (2, "")
        assert done.err == "klplug: error: '': No such file or directory\n"
    assert klplug_command("audit", "--", *COMMAND, "").status == 1


@pytest.mark.parametrize("form", ["text", "json", "github", "sarif"])
def test_a_file_whose_name_is_no_text(klplug_command: Klplug, tmp_path: Path, form: str) -> None:
    for name in (b"\xff.sh", b"other.sh"):
        (tmp_path / os.fsdecode(name)).write_text(" ".join(COMMAND) + "\n")
    done = klplug_command("audit", "--format", form, tmp_path)
    assert done.status == 1 and done.err == ""
    assert ("%FF.sh" if form == "sarif" else r"\udcff.sh") in done.out


def test_a_command_line_that_was_quoted(klplug_command: Klplug) -> None:
    done = klplug_command("audit", " ".join(COMMAND))
    assert done.status == 2
    assert "after --, unquoted" in done.err


@pytest.mark.parametrize("name", [path.stem for path in sorted(SCRIPTS.glob("*.sh"))])
def test_every_report_can_be_shown(klplug_command: Klplug, name: str) -> None:
    out = klplug_command("audit", "-v", SCRIPTS / f"{name}.sh").out
    assert "gradient" in out and "updates" in out
    assert not any(word in out for word in ("None", "nan", "{"))


def test_a_default_is_called_one(klplug_command: Klplug) -> None:
    out = klplug_command("audit", "-v", "--", *COMMAND).out
    assert "the default actor_rollout_ref.actor.kl_loss_type=low_var_kl" in out
    assert "the default actor_rollout_ref.actor.use_kl_loss" not in out


def test_what_is_unknown_is_shown(klplug_command: Klplug, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    script.write_text(" ".join(COMMAND) + " actor_rollout_ref.actor.kl_loss_type=$KL\n")
    assert "Gradient unknown: $KL is not set" in klplug_command("audit", script).out
    out = klplug_command("audit", "-v", script).out
    assert "gradient      unknown: $KL is not set in the script" in out


@pytest.mark.parametrize("options", [[], ["-v"]], ids=["short", "long"])
def test_docs_show_what_the_command_prints(
    klplug_command: Klplug, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    root = SCRIPTS.parents[2]
    monkeypatch.chdir(root)
    monkeypatch.setenv("COLUMNS", "100")
    out = klplug_command("audit", *options, "tests/audit/scripts/verl-grpo.sh").out
    printed = "\n".join(line.rstrip() for line in out.splitlines())
    assert printed in (root / "docs" / "audit.md").read_text()


# As a linter.

GOOD = "python -m verl.trainer.main_ppo +klplug.kl_type=k2_as_loss +klplug.kl_coef=0.1 "
GOOD += "actor_rollout_ref.rollout.n=8 algorithm.adv_estimator=grpo"
_A = "actor_rollout_ref.actor"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One script of each kind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "good.sh").write_text(f"{GOOD}\n")
    (tmp_path / "sub" / "bad.sh").write_text(f"# k3\n{' '.join(COMMAND)} \\\n {_A}.ppo_epochs=2\n")
    (tmp_path / "sub" / "none.sh").write_text("echo nothing\n")
    (tmp_path / "sub" / "data.txt").write_text("no script\n")
    return tmp_path


def test_the_first_line_is_verdict_and_edit(klplug_command: Klplug, folder: Path) -> None:
    lines = klplug_command("audit", "sub/bad.sh").out.splitlines()
    assert lines[0].startswith("sub/bad.sh:2  k3_as_loss,ratio=none: gradient of the forward KL, ")
    assert "Line 2: delete use_kl_loss=True; add +klplug.kl_type=k2_as_loss" in lines[0]
    assert lines[1].startswith("sub/bad.sh:2: forward-kl k3 as a loss follows")
    assert any(line.startswith("sub/bad.sh:3: off-policy-uncorrected") for line in lines)
    assert len(lines) == len({line.split(" ", 2)[1] for line in lines[1:]}) + 1  # said once each


@pytest.mark.parametrize(
    ("arguments", "judged", "status"),
    [
        (["good.sh", "sub/bad.sh"], 2, 1),
        (["."], 2, 1),
        (["good.sh", "sub/none.sh"], 1, 0),
        (["sub/*.sh"], 1, 1),
        (["**/good.sh"], 1, 0),
        (["good.sh", "nowhere.sh", "sub/bad.sh"], 2, 2),
    ],
)
def test_many_files(
    klplug_command: Klplug, folder: Path, arguments: list[str], judged: int, status: int
) -> None:
    done = klplug_command("audit", *arguments)
    assert done.status == status
    assert sum("  " in line for line in done.out.splitlines()) == judged
    passed = 1 if any(a in (".", "sub/*.sh", "sub/none.sh") for a in arguments) else 0
    assert ("have no training command" in done.err) == bool(passed)
    assert ("nowhere.sh: No such file" in done.err) == (status == 2)


def test_a_script_of_another_trainer_is_counted_and_a_framework_is_named(
    klplug_command: Klplug, folder: Path
) -> None:
    (folder / "sft.sh").write_text("python -m verl.trainer.fsdp_sft_trainer data.x=1\n")
    done = klplug_command("audit", "good.sh", "sft.sh")
    assert (done.status, done.err) == (0, "1 of 2 files have no training command\n")
    alone = klplug_command("audit", "sft.sh")
    assert alone.status == 2
    assert alone.err.startswith(
        "klplug: error: sft.sh: verl.trainer.fsdp_sft_trainer is not audited"
    )
    (folder / "trl.sh").write_text("trl grpo --beta 0.1\n")
    (folder / "open.sh").write_text("echo 'open\n")
    for name, words in (("trl.sh", "a run of TRL"), ("open.sh", "a shell would not read")):
        both = klplug_command("audit", "good.sh", name)
        assert both.status == 2 and both.err.startswith(f"klplug: error: {name}: {words}")


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("sub/none.sh", "no training command"),
        ("empty", "a folder without shell scripts"),
        ("*.zsh", "no file has such a name"),
        ("train.py", "Python is not read"),
    ],
)
def test_alone_what_cannot_be_read_is_an_error(
    klplug_command: Klplug, folder: Path, argument: str, words: str
) -> None:
    (folder / "empty").mkdir()
    (folder / "train.py").write_text("def config():\n    return {}\n")
    done = klplug_command("audit", argument)
    assert (done.status, done.out) == (2, "") and words in done.err


def test_a_folder_that_is_not_there_is_named(klplug_command: Klplug, folder: Path) -> None:
    done = klplug_command("audit", "sub", "gone")
    assert (done.status, done.err) == (2, "klplug: error: gone: No such file or directory\n")


def test_standard_input(
    klplug_command: Klplug, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(content: bytes) -> Done:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        return klplug_command("audit", "-")

    command = " ".join(COMMAND).encode()
    # An author's name in Latin-1 is no reason to stop.
    for content in (command, b"# Jos\xe9\n" + command):
        done = given(content)
        line = 1 + content.count(b"\n")
        assert done.status == 1 and done.out.startswith(f"-:{line}  k3_as_loss")
    binary = given(b"\x7fELF\0")
    assert (binary.status, binary.err) == (2, "klplug: error: -: not a text file\n")


def test_what_is_no_regular_file_is_not_waited_for(klplug_command: Klplug, folder: Path) -> None:
    done = klplug_command("audit", "/dev/null")
    assert (done.status, done.out) == (2, "")
    assert done.err == "klplug: error: /dev/null: not a regular file; - reads standard input\n"
    # A shell's <(...) ends.
    assert "no training command" in klplug_command("audit", _opened(folder / "sub/none.sh")).err
    os.mkfifo(folder / "pipe.sh")
    (folder / "gone.sh").symlink_to("nowhere")
    inside = klplug_command("audit", ".")
    assert inside.err.splitlines()[0] == ".: 2 of 5 are not regular files"
    assert (inside.status, len(inside.out.splitlines()) > 2) == (1, True)
    both = klplug_command("audit", "good.sh", "pipe.sh")
    assert (both.status, both.err) == (
        2,
        "klplug: error: pipe.sh: not a regular file; - reads standard input\n",
    )


def _opened(path: Path) -> str:
    """A pipe that holds a file's content, named as bash names <(cat FILE)."""
    reads, writes = os.pipe()
    os.write(writes, path.read_bytes())
    os.close(writes)
    return f"/dev/fd/{reads}"


def test_every_command_of_a_file_is_judged(klplug_command: Klplug, folder: Path) -> None:
    (folder / "two.sh").write_text(f"{GOOD}\n{' '.join(COMMAND)}\n")
    both = klplug_command("audit", "--json", "two.sh")
    runs = json.loads(both.out)["runs"]
    assert both.status == 1
    assert [(run["file"], run["line"], run["gradient"]) for run in runs] == [
        ("two.sh", 1, "reverse"),
        ("two.sh", 2, "forward"),
    ]
    assert klplug_command("audit", "--command", "1", "two.sh").status == 0


def test_annotations_for_github(klplug_command: Klplug, folder: Path) -> None:
    out = klplug_command("audit", "--format", "github", "sub/bad.sh").out
    assert out.startswith("::warning file=sub/bad.sh,line=2,title=forward-kl::k3 as a loss")
    # The runner's own escapes: actions/toolkit, core/src/command.ts, escapeProperty.
    (folder / "a, b:100%.sh").write_text((folder / "sub/bad.sh").read_text())
    out = klplug_command("audit", "--format", "github", "a, b:100%.sh").out
    assert out.startswith("::warning file=a%2C b%3A100%25.sh,line=2,title=forward-kl::")


def test_sarif(klplug_command: Klplug, folder: Path) -> None:
    document = json.loads(klplug_command("audit", "--format", "sarif", ".").out)
    (run,) = document["runs"]
    assert document["version"] == "2.1.0"
    first = next(r for r in run["results"] if r["ruleId"] == "forward-kl")
    assert first["level"] == "warning"
    place = first["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "sub/bad.sh" and place["region"]["startLine"] == 2
    (folder / "a b").mkdir()
    (folder / "a b" / "bad.sh").write_text((folder / "sub/bad.sh").read_text())
    for asked, uri in (("a b", "a%20b/bad.sh"), (folder / "a b", (folder / "a b").as_uri())):
        other = json.loads(klplug_command("audit", "--format", "sarif", asked).out)
        location = other["runs"][0]["results"][0]["locations"][0]["physicalLocation"]
        assert location["artifactLocation"]["uri"].startswith(uri)
    used = {result["ruleId"] for result in run["results"]}
    assert used == {rule["id"] for rule in run["tool"]["driver"]["rules"]}


# The edit of the script.

ARRAY = f"""#!/bin/bash
# caf\u00e9
KL=(
  {_A}.use_kl_loss=True   # on
  {_A}.kl_loss_type=low_var_kl
)
python -m verl.trainer.main_ppo \\
  algorithm.adv_estimator=grpo "${{KL[@]}}" \\
\tactor_rollout_ref.rollout.n=8 \\
  {_A}.kl_loss_coef=0.01
echo done
"""
AFTER = """#!/bin/bash
# caf\u00e9
KL=(
     # on
)
python -m verl.trainer.main_ppo +klplug.kl_type=k2_as_loss +klplug.kl_coef=0.01 \\
  algorithm.adv_estimator=grpo "${KL[@]}" \\
\tactor_rollout_ref.rollout.n=8
echo done
"""


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_fix_edits_those_words_and_no_others(
    klplug_command: Klplug, tmp_path: Path, ending: str
) -> None:
    script = tmp_path / "train.sh"
    # No line goes on after a backslash and a carriage return.
    before, wanted = (t.replace("\\\n", "") if ending == "\r\n" else t for t in (ARRAY, AFTER))
    script.write_bytes(before.replace("\n", ending).encode())
    shown = klplug_command("audit", "--diff", script)
    assert script.read_bytes() == before.replace("\n", ending).encode()
    assert shown.status == 0 and shown.out.startswith(f"--- a{script}\n+++ b{script}\n")
    assert f" {_A}.kl_loss_coef=0.01{ending}" in shown.out
    assert klplug_command("audit", "--fix", script).status == 0
    kept = script.read_bytes().decode().replace(ending, "\n")
    assert [line.split() for line in kept.splitlines()] == [
        line.split() for line in wanted.splitlines()
    ]
    assert klplug_command("audit", script).status == 0
    # Nothing is left to do.
    assert klplug_command("audit", "--diff", script).out == ""


def test_a_carriage_return_after_a_backslash_ends_the_command(
    klplug_command: Klplug, tmp_path: Path
) -> None:
    script = tmp_path / "train.sh"
    script.write_bytes(f"{_TRAIN} \\\r\n  {_ON}=0.01\r\n".encode())
    done = klplug_command("audit", script)
    assert done.status == 1
    assert "train.sh:2: command-cut" in done.out and "a carriage return follows" in done.out


@pytest.mark.parametrize("last", ["\n", "\r\n", ""])
@pytest.mark.parametrize("name", ["train.sh", "my runs/caf\u00e9 1.sh"])
def test_git_applies_the_diff(
    klplug_command: Klplug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, last: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(f"set -x{last or chr(10)}{_TRAIN} {_ON}=0.01{last}".encode())
    shown = klplug_command("audit", "--diff", path).out.encode()
    Path("given.diff").write_bytes(shown)
    before = path.read_bytes()
    subprocess.run(["git", "apply", "given.diff"], check=True)
    applied = path.read_bytes()
    path.write_bytes(before)
    klplug_command("audit", "--fix", path)
    assert applied == path.read_bytes() != before


@pytest.mark.parametrize("name", ["openrlhf-gspo", "verl-dr-grpo", "verl-rloo-both-k3"])
def test_what_is_fixed_is_clean(klplug_command: Klplug, tmp_path: Path, name: str) -> None:
    script = tmp_path / "train.sh"
    script.write_bytes((SCRIPTS / f"{name}.sh").read_bytes())
    before = audit(script)
    assert klplug_command("audit", "--fix", script).status == 0
    after = audit(script)
    assert after.kl_type == before.recommended and not after.fails("warning")
    assert after.beta == before.terms[0].beta


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("verl-gspo", "rollout-mismatch would stay"),
        ("verl-reinforce-plus-plus", "klplug has no edit for this command"),
    ],
)
def test_what_cannot_be_fixed_has_a_reason(
    klplug_command: Klplug, tmp_path: Path, name: str, words: str
) -> None:
    script = tmp_path / "train.sh"
    text = (SCRIPTS / f"{name}.sh").read_bytes()
    script.write_bytes(text)
    done = klplug_command("audit", "--fix", script)
    assert done.status == 1 and words in done.err
    assert script.read_bytes() == text


_ON = f"{_A}.use_kl_loss=True {_A}.kl_loss_coef"
_TRAIN = "python -m verl.trainer.main_ppo"
_K = "+klplug.kl_type=k2_as_loss +klplug.kl_coef"


@pytest.mark.parametrize(
    ("script", "edited"),
    [
        (f"x=0.01\n{_TRAIN} {_ON}=$x\n", f"x=0.01\n{_TRAIN} {_K}=$x\n"),
        (f"x=0.01\n{_TRAIN} {_ON}=${{x}} a=$b\n", f"x=0.01\n{_TRAIN} {_K}=${{x}} a=$b\n"),
        (f'{_TRAIN} {_ON}="${{X:-0.01}}"\n', f'{_TRAIN} {_K}="${{X:-0.01}}"\n'),
        (f"{_TRAIN} {_ON}=$X\n", None),  # nobody knows it, and that would stay
        (
            f"x=0.01\n{_TRAIN} {_A}.use_kl_loss=True '{_A}'\".kl_loss_coef=$x\"\n",
            None,  # the word is put together of two
        ),
        (
            f'x=0.01\n{_TRAIN} {_A}.use_kl_loss=True "{_A}.kl_loss_coef=${{x}}"\n',
            f'x=0.01\n{_TRAIN} +klplug.kl_type=k2_as_loss "+klplug.kl_coef=${{x}}"\n',
        ),
        # In an array: what the variable is where the array is made.
        (
            f'x=0.01\nA=({_ON}=$x)\n{_TRAIN} "${{A[@]}}"\n',
            f'x=0.01\nA=()\n{_TRAIN} {_K}=$x "${{A[@]}}"\n',
        ),
        (f'x=0.01\nA=({_ON}=$x)\nx=9\n{_TRAIN} "${{A[@]}}"\n', None),
        (f'A=({_ON}=$X)\n{_TRAIN} "${{A[@]}}"\n', None),
        # A switch that a variable holds may be another tomorrow.
        (f"on=True\n{_TRAIN} {_A}.use_kl_loss=$on {_A}.kl_loss_coef=0.1\n", None),
        (
            "x=0.01\npython -m openrlhf.cli.train_ppo_ray --algo.kl.use_loss "
            "--algo.kl.estimator k3 --algo.kl.init_coef $x --train.max_epochs 1\n",
            "x=0.01\npython -m klplug_openrlhf --klplug.kl_type k2_as_loss "
            "--klplug.kl_coef $x --train.max_epochs 1\n",
        ),
    ],
)
def test_a_coefficient_that_a_variable_holds_stays_that_variable(
    klplug_command: Klplug, tmp_path: Path, script: str, edited: str | None
) -> None:
    path = tmp_path / "train.sh"
    path.write_text(script)
    done = klplug_command("audit", "--fix", path)
    assert path.read_text() == (script if edited is None else edited)
    assert done.status == (1 if edited is None else 0)
    assert edited is not None or "not edited: " in done.err


@given(
    name=st.sampled_from([path.stem for path in sorted(SCRIPTS.glob("*.sh"))]),
    ends=st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=80, max_size=80),
    closed=st.booleans(),
    comments=st.dictionaries(st.integers(0, 3), st.binary(max_size=12), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_lines_that_the_diff_does_not_name_stay_byte_for_byte(
    name: str, ends: list[bytes], closed: bool, comments: dict[int, bytes]
) -> None:
    lines = (SCRIPTS / f"{name}.sh").read_bytes().splitlines()
    for at, comment in sorted(comments.items()):
        lines.insert(at, b"# " + re.sub(rb"[\0\r\n]", b"", comment))
    content = b"".join(line + end for line, end in zip(lines, ends, strict=False))
    content = content if closed else content.rstrip(b"\r\n")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "train.sh"
        path.write_bytes(content)
        text = read(path)
        shown = io.TextIOWrapper(io.BytesIO(), newline="")
        with redirect_stdout(shown), redirect_stderr(io.StringIO()):
            changed(path, text, audits(path), False, {})
            changed(path, text, audits(path), True, {})
        after = path.read_bytes()
    gone, come = _named(shown.buffer.getvalue().decode(errors="replace"))
    before, now = (re.findall(rb"[^\n]*\n|[^\n]+", whole) for whole in (content, after))
    assert [line for at, line in enumerate(before) if at not in gone] == [
        line for at, line in enumerate(now) if at not in come
    ]


def _named(diff: str) -> tuple[set[int], set[int]]:
    """The lines that a unified diff takes away and adds, counted from 0."""
    gone, come = set[int](), set[int]()
    old = new = 0
    for line in diff.split("\n")[2:]:
        if match := re.match(r"@@ -(\d+)\S* \+(\d+)", line):
            old, new = int(match[1]) - 1, int(match[2]) - 1
        elif line.startswith("-"):
            gone.add(old)
            old += 1
        elif line.startswith("+"):
            come.add(new)
            new += 1
        elif not line.startswith("\\"):  # "No newline at end of file"
            old, new = old + 1, new + 1
    return gone, come


def test_a_line_to_edit_that_is_no_text_is_a_reason(klplug_command: Klplug, tmp_path: Path) -> None:
    path = tmp_path / "train.sh"
    content = f"{_TRAIN} {_ON}=0.1 a=".encode() + b"\xff\n"
    path.write_bytes(content)
    done = klplug_command("audit", "--fix", path)
    assert done.status == 2 and "line 1 is edited, and is no UTF-8" in done.err
    assert path.read_bytes() == content


def test_words_that_two_commands_share_stay(klplug_command: Klplug, tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    train = 'python -m verl.trainer.main_ppo "${KL[@]}"'
    text = f"KL=({_A}.use_kl_loss=True)\n{train}\n{train} {_A}.kl_loss_coef=0.1\n"
    script.write_text(text)
    done = klplug_command("audit", "--fix", script)
    assert done.status == 1 and "shares these words with the command on line 3" in done.err
    assert script.read_text() == text


def test_the_hook_of_pre_commit_is_a_command_that_there_is(klplug_command: Klplug) -> None:
    (hook,) = yaml.safe_load((SCRIPTS.parents[2] / ".pre-commit-hooks.yaml").read_text())
    program, *arguments = hook["entry"].split()
    assert program == "klplug"
    done = klplug_command(*arguments, SCRIPTS / "verl-rloo.sh", SCRIPTS / "verl-remax.sh")
    assert done.status == 0


def test_a_release_without_a_table_says_by_which_it_is_read(klplug_command: Klplug) -> None:
    words = [
        "--",
        "python",
        "-m",
        "verl.trainer.main_ppo",
        "actor_rollout_ref.actor.use_kl_loss=True",
    ]
    done = klplug_command("audit", "--host-version", "9.9.9", *words)
    assert done.status == 1
    assert "verl 9.9.9 is not known here: read by the defaults of 0.9.1" in done.err
    assert klplug_command("audit", "--host-version", "0.9.1", *words).err == ""
