"""The shell reader beside a real shell: what bash would pass, and what only bash could know."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from klplug.audit import AuditError
from klplug.audit.shell import Script, Word

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.sh"))
# Programs become functions that print their arguments: bash itself says what they would get.
_STUBS = "".join(
    f"{name}() {{ printf '%s\\0' {name} \"$@\"; printf '\\1\\0'; }}\n"
    for name in ("python", "python3", "deepspeed", "ray", "run")
)

SNIPPETS = {
    "quotes": r"""run a.b='x y' "c=d e" f=\"g\" h=i\ j 'it'"'"'s' $'k\tl' """,
    "default": 'run a=${A:-1} b=${B-2} c=${C:-"x y"} d=${D:-${E:-3}}; : ${F:=4}; run f=$F',
    "set": "A=1; B=; run a=${A:-9} b=${B:-9} c=${B-9} d=${A:+8} e=${B:+8}x f=${A}${A}",
    "splitting": 'A=\'one two\'; run $A "$A" x$A; B=\nrun $B "$B" end',
    "array": 'A=(a "b c" d=$((1 + 2))); A+=(e); run "${A[@]}" ${A[@]} "x${A[0]}" ${A[1]}',
    "comments": "run a=1 # not this\n# nor this\nrun 'b # this' c#d",
    "continued end": "run a=1 \\\n  b=2 \\\n",
    "rest": 'f() { run "${@:2}"; }\nf a "b c" d; run "${@:2}" x',
    "continuation": "run a=1 \\\n  b=2 \\\n\tc=3\nrun d=4",
    "heredoc": "read -r -d '' X <<EOF || true\na=1 \\\nb=${B:-2}\nEOF\nrun $X",
    "quoted heredoc": "read -r -d '' X <<'EOF' || true\na=$NOT\nEOF\nrun \"$X\"",
    "cat heredoc": "X=$(cat <<EOF\na=1 b=2\nEOF\n)\nrun $X",
    "arithmetic": "N=4; run a=$((N * 2)) b=$(( (1 + 2) * ${N} )) c=$((7 / 2)) d=$((2 ** 3))",
    "function": 'f() { run first=$1 "$@"; }\nf a "b c"; f',
    "export": "export A=1 B=2; declare C=3; run $A $B $C",
    "append": "A=1; A+=2; run $A",
    "prefix": "A=1; A=2 run a=$A",
    "if": "A=1; if true; then B=1; else B=1; fi; run $A $B",
    "subshell": "A=1; (A=2; run $A); run $A",
    "nested": 'bash() { :; }; A=5; eval "run a=$A"',
    "list": "A=1 && B=2; run $A$B",
    "braces": "run ${A:-{a: 1}} '{b: 2}' [1,2]",
}


def _bash(script: str) -> list[list[str]]:
    done = subprocess.run(
        ["bash", "-c", _STUBS + script], capture_output=True, timeout=20, check=False, env={}
    )
    commands, words = [], []
    for word in done.stdout.decode().split("\0")[:-1]:
        if word == "\1":
            commands.append(words)
            words = []
        else:
            words.append(word)
    return commands


def _read(script: str) -> list[list[Word]]:
    programs = ("python", "python3", "deepspeed", "ray", "run")
    return [list(c.words) for c in Script(script).commands if c.words[0].text in programs]


@pytest.mark.parametrize("script", SNIPPETS.values(), ids=SNIPPETS)
def test_words_are_those_of_bash(script: str) -> None:
    assert [[w.text for w in words] for words in _read(script)] == _bash(script)
    assert not any(w.unknown for words in _read(script) for w in words)


@pytest.mark.parametrize("path", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_scripts_are_read_as_bash_reads_them(path: Path) -> None:
    text = path.read_text().replace("set -x", "").replace("set -euo pipefail", "")
    ours, theirs = _read(text), _bash(text)
    assert len(ours) == len(theirs) == 1
    for word, wanted in zip(ours[0], theirs[0], strict=True):
        # An empty environment has no HOME: what it holds stays as written.
        assert word.text == wanted or (word.unknown and "$HOME" in word.text)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("run a=$(date)", "$(date) is the output of a command"),
        ("run a=`date`", "`date` is the output of a command"),
        ("run a=$B", "$B is not set in the script"),
        ("run a=${B}", "${B} is not set in the script"),
        ("run a=$1", "$1 is not set in the script"),
        ("B=1; run a=${B%x}", "${B%x} is an expansion that only a shell computes"),
        ("run a=$((B + 1))", "$((B + 1)) is arithmetic on what is not known"),
        ("B=1\nif x; then\nB=2\nfi\nrun a=$B", "$B is set in a branch (line 2)"),
        ("[ -f x ] && B=2\nrun a=$B", "$B is set in a branch (line 1)"),
        ("for B in 1 2; do run a=$B; done", "$B is a loop variable (line 1)"),
        ("case $X in a) B=1;; esac\nrun a=$B", "$B is set in a branch (line 1)"),
        ('A=(x); if y; then A+=(z); fi; run "${A[@]}"', "${A[@]} is set in a branch"),
    ],
)
def test_what_only_a_run_could_tell_is_unknown(script: str, reason: str) -> None:
    (words,) = _read(script)
    assert words[-1].unknown[0].startswith(reason)


def test_unknown_parts_leave_the_key_and_the_rest_of_the_word() -> None:
    (words,) = _read("run trainer.name=x_$(date +%s)_y")
    assert words[1].text == "trainer.name=x_$(date +%s)_y"


def test_nothing_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    Script(
        f"touch {mark}; A=$(touch {mark}) B=`touch {mark}`; cat <(touch {mark}); $(touch {mark})"
    )
    assert not mark.exists()


def test_words_know_their_lines() -> None:
    (words,) = _read('A=(\n  a=1\n  b=2\n)\nrun \\\n  c=3 "${A[@]}" \\\n  d=4')
    assert [(w.text, w.line) for w in words] == [
        ("run", 5), ("c=3", 6), ("a=1", 2), ("b=2", 3), ("d=4", 7)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("\\\n  # note\n", "a comment line follows"),
        ("\\ \n", "a blank follows"),
        ("\\\n\n", "an empty line follows"),
    ],
)
def test_a_broken_continuation_is_noticed(between: str, reason: str) -> None:
    script = Script(f"run a.b=1 {between}  c.d=2 \\\n  --e.f 3\necho done\n")
    (cut,) = filter(None, map(script.cut_after, script.commands))
    assert cut.reason.startswith(reason)
    assert [word.text for word in cut.lost] == ["c.d=2", "--e.f 3"]
    # bash drops them too.
    assert _bash(f"run a.b=1 {between}  c.d=2\n") == [["run", "a.b=1"]] or "blank" in reason


def test_a_sound_continuation_is_not_cut() -> None:
    script = Script("run a.b=1 \\\n  c.d=2\n# note\nx.y=3\n")
    assert script.cut_after(script.commands[0]) is None


@pytest.mark.parametrize(
    "script",
    [
        "run 'a=1\nb=2\n",
        'run "a=1\n',
        "run a=$(date\n",
        "A=(1 2\nrun $A\n",
        "if x; then run a\n",
        "A=<HERE>\nrun\n",
    ],
)
def test_what_is_never_closed_is_named(script: str) -> None:
    with pytest.raises(AuditError, match=r"line \d"):
        Script(script)


def test_thousands_of_lines_are_quick() -> None:
    lines = [f'V{i}=${{V{i - 1}:-x}}\nif [ -n "$V{i}" ]; then W{i}=1; fi' for i in range(2000)]
    started = time.process_time()  # the machine may be busy with other things
    words = _read(
        "\n".join(lines) + "\nrun " + " \\\n  ".join(f"a.b{i}=$V{i}" for i in range(2000))
    )
    assert time.process_time() - started < 2
    assert len(words[0]) == 2001
