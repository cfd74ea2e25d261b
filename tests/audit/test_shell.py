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
    "read without IFS": 'IFS= read -r A B <<< \'x y\'; run "$A" "$B"',
    "read by commas": "IFS=', ' read -r A B <<< 'x , y,z '; run \"$A\" \"$B\"",
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


def _bash(script: str, folder: Path | None = None) -> list[list[str]]:
    words = ["bash", "-c", _STUBS + script]
    done = subprocess.run(words, capture_output=True, timeout=20, check=False, env={}, cwd=folder)
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
        ("B=$(date); run a=${B%x}", "${B%x} is worked out from what is not known"),
        ("run a=${B@Q}", "${B@Q} is worked out from what is not known"),
        ("A=<where it is>; run a=$A", "<where it is> is a placeholder"),
        ("run a=$((B + 1))", "$((B + 1)) is arithmetic on what is not known"),
        ("for B in $(ls); do run a=$B; done", "$B is a loop variable (line 1)"),
        ("while read B; do run a=$B; done < list", "$B is read when the script runs"),
        ("B=1; while ask; do B=$B$B; done; run a=$B", "$B is set in a loop (line 1)"),
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
        ("# note \\\n", "the backslash belongs to a comment"),
        ("$A # note \\\n", "the backslash belongs to a comment"),
        ("\n", "the line has no backslash"),
        ("\\\r\n", "a carriage return follows"),
    ],
)
@pytest.mark.parametrize("setting", ["c.d=2", '"c.d=2"', "'c.d=2'"])
def test_a_broken_continuation_is_noticed(between: str, reason: str, setting: str) -> None:
    script = Script(f"run a.b=1 {between}  {setting} \\\n  --e.f 3\necho done\n")
    (cut,) = filter(None, map(script.cut_after, script.commands))
    assert cut.reason.startswith(reason)
    assert [word.text for word in cut.lost] == ["c.d=2", "--e.f 3"]
    # bash drops them too.
    (ran,) = _bash(f"run a.b=1 {between}  c.d=2\n")
    assert ran[:2] == ["run", "a.b=1"] and "c.d=2" not in ran


def test_a_sound_continuation_is_not_cut() -> None:
    script = Script("run a.b=1 \\\n  c.d=2\n# note\nx.y=3\n")
    assert script.cut_after(script.commands[0]) is None
    script = Script("run 'a # b' \\\n  c.d=2\n")
    assert script.cut_after(script.commands[0]) is None


@pytest.mark.parametrize(
    "script",
    [
        "run 'a=1\nb=2\n",
        'run "a=1\n',
        "run a=$(date\n",
        "A=(1 2\nrun $A\n",
        "if x; then run a\n",
        "case x in a) run\n",
        "run ${A\n",
        "f() { run a\n",
        "cat <(run\n",
        "run `date\n",
        "(( 1 +\n",
        "[[ -n a\n",
        ") run\n",
        "if x; then run; done\n",
    ],
)
def test_what_is_never_closed_is_named(script: str) -> None:
    with pytest.raises(AuditError, match=r"line \d"):
        Script(script)


def test_what_stands_before_a_broken_line_is_read() -> None:
    # bash reads and runs a line at a time, and stops at the one it cannot read.
    script = "run a\nrun 'b\n"
    read = Script(script)
    assert [[w.text for w in c.words] for c in read.commands] == _bash(script) == [["run", "a"]]
    assert "line 2 (a quote ' that is never closed)" in str(read.broken)


def test_thousands_of_lines_are_quick() -> None:
    lines = [f'V{i}=${{V{i - 1}:-x}}\nif [ -n "$V{i}" ]; then W{i}=1; fi' for i in range(2000)]
    started = time.process_time()  # the machine may be busy with other things
    words = _read(
        "\n".join(lines) + "\nrun " + " \\\n  ".join(f"a.b{i}=$V{i}" for i in range(2000))
    )
    assert time.process_time() - started < 2
    assert len(words[0]) == 2001


# Conditions that are not decided.


def _ways(script: str, bears: str = "") -> list[list[list[str]]]:
    commands = [c for c in Script(script).commands if c.words[0].text == "run"]
    return [
        [[w.text for w in words] for words in c.alternatives(lambda text: bears in text)]
        for c in commands
    ]


@pytest.mark.parametrize(
    ("script", "ways"),
    [
        ("B=1\nif x; then B=2; fi\nrun a=$B", [["run", "a=1"], ["run", "a=2"]]),
        ("[ -f x ] && B=2 || B=3\nrun a=$B", [["run", "a=3"], ["run", "a=2"]]),
        (
            'A=(x); if grep -q y; then A+=(z); fi; run "${A[@]}" end',
            [["run", "x", "end"], ["run", "x", "z", "end"]],
        ),
        # One condition, two variables: two ways, not four.
        (
            "if [ -f x ]; then A=1 B=2; else A=3 B=4; fi; run $A $B",
            [["run", "3", "4"], ["run", "1", "2"]],
        ),
        (
            "if [ -f x ]; then A=1; else A=2; fi; if [ $A = 1 ]; then B=$A; else B=9; fi; run $A$B",
            [["run", "29"], ["run", "11"]],
        ),
        (
            "case $(uname) in a) B=1;; b) B=2;; *) B=3;; esac; run $B",
            [["run", "3"], ["run", "1"], ["run", "2"]],
        ),
        # Whoever runs it gets past what would end it.
        ("[ -f x ] || exit 1; A=1; run $A", [["run", "1"]]),
        ("if [ $# -lt 1 ]; then echo usage; exit 1; fi; run a", [["run", "a"]]),
        (
            "f() { if [ -f x ]; then B=1; return; fi; B=2; }; f; run $B",
            [["run", "2"], ["run", "1"]],
        ),
    ],
)
def test_a_condition_that_is_not_decided_keeps_both(script: str, ways: list[list[str]]) -> None:
    assert _ways(script) == [ways]


def test_only_what_bears_on_the_question_makes_another_command() -> None:
    script = "if [ -f x ]; then A=1; fi; if [ -f y ]; then B=2; fi; run a=$A b=$B"
    assert len(_ways(script)[0]) == 4
    assert len(_ways(script, "b=")[0]) == 2


def test_too_many_conditions_make_the_words_unknown() -> None:
    lines = [f"if ask; then A{n}=1; else A{n}=2; fi" for n in range(8)]
    (command,) = (
        c
        for c in Script("\n".join([*lines, "run " + " ".join(f"$A{n}" for n in range(8))])).commands
        if c.words[0].text == "run"
    )
    (words,) = command.alternatives()
    assert all("conditions that are not decided" in w.unknown[0] for w in words[1:])
    assert not words[0].unknown


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('run a "$@"', ["run", "a"]),
        ("run a $EXTRA ${MORE} b", ["run", "a", "b"]),
        ('ARGS="a $EXTRA b"; run $ARGS', ["run", "a", "b"]),
        ('run "${EXTRA[@]}" a', ["run", "a"]),
        ('while [[ $# -gt 0 ]]; do case $1 in --n) N=$2; shift;; esac; shift; done; run ${N:-3}',
         ["run", "3"]),
        ("while getopts n: o; do N=$OPTARG; done; run ${N:-3}", ["run", "3"]),
        ("E=vllm; if [ $E = vllm ]; then N=8; else N=1; fi; run $N", ["run", "8"]),
    ],
)  # fmt: skip
def test_what_nobody_passes_is_none(script: str, words: list[str]) -> None:
    assert _ways(script) == [[words]]
    assert _bash(script) == [words]


def test_a_branch_that_somebody_must_ask_for_is_read_and_said() -> None:
    script = 'if [ "${MODE:-train}" = train ]; then run a; else run b; fi; [ -n "$1" ] && run c'
    read = [(c.words[1].text, c.reached) for c in Script(script).commands]
    assert read == [("a", True), ("b", False), ("c", False)]
    assert _bash(script) == [["run", "a"]]


def test_settings_that_reach_no_command_are_found() -> None:
    script = Script(
        "UNUSED=(a.b=1 --c.d 2)\nrun x.y=3 \\\n  # comment.in=between\n  z.w=4\n"
        'run "$(date)" k.l=5\n'
    )
    assert [(w.text, w.line) for w in script.unreached()] == [("a.b", 1), ("--c.d", 1), ("z.w", 4)]


@pytest.mark.parametrize("made", ['"${L[@]}"', '"${L[*]}"', '"${L[@]}" "${L[*]}"'])
def test_an_array_that_doubles_in_a_loop_is_too_long_to_be_read(made: str) -> None:
    script = f'L=(a b)\nfor I in {{1..60}}; do L+=({made}); done\nrun "${{L[@]}}"'
    (command,) = Script(script).commands
    assert any("too long" in why for word in command.words for why in word.unknown)


def test_a_text_that_is_too_long_to_be_read_makes_words_where_nothing_quotes_it() -> None:
    script = "A=' x=1'\nfor I in {1..15}; do A=$A$A; done\nrun $A"
    assert len(_bash(script)[0]) == 1 + 2**15
    (command,) = Script(script).commands
    assert any("too long" in why for word in command.words for why in word.unknown)


# Other files.


def test_a_sourced_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "common.sh").write_text("N=4\nf() { run f $1; }\n")
    script = 'DIR=$(cd "$(dirname "$0")" && pwd)\nsource "$DIR/common.sh"\nf $N\n. gone.sh\n'
    read = Script(script, tmp_path)
    assert [w.text for w in read.commands[-1].words] == ["run", "f", "4"]
    assert read.sourced == [4]


def test_a_sourced_file_has_the_arguments_that_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "args.sh").write_text('if [[ $1 != slurm ]]; then run "$@"; fi; run $#\n')
    script = "set -- x\n. ./args.sh slurm 'b c'\nrun \"$@\"\nsource ./args.sh\nrun end"
    read = [[w.text for w in c.words] for c in Script(script, tmp_path).commands if c.reached]
    assert read == _bash(script, tmp_path) and ["run", "2"] in read


@pytest.mark.parametrize(
    "line",
    [
        "bash project/a/b/c/d/inner.sh",  # from the checkout's root
        'R=${R:-/workspace/project}; bash "$R/a/b/c/d/inner.sh" x',
        "source /workspace/project/a/b/c/d/inner.sh",
    ],
)
def test_a_file_of_the_same_checkout_is_found(tmp_path: Path, line: str) -> None:
    folder = tmp_path / "project" / "a" / "b" / "c" / "d"
    folder.mkdir(parents=True)
    (folder / "inner.sh").write_text("run\n")
    read = Script(line, folder).commands
    assert [w.text for c in read for w in c.words] == ["run"]
    # A file of that name alone is another.
    read = Script("bash /workspace/project/e/inner.sh", folder).commands
    assert read[0].words[0].text == "bash"


def test_a_script_that_sources_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "self.sh"
    path.write_text("source self.sh\nbash self.sh\nrun a\nf() { f; f; }\nf\n")
    assert "run" in [c.words[0].text for c in Script(path.read_text(), tmp_path).commands]


def test_a_script_for_another_shell_has_what_is_exported(tmp_path: Path) -> None:
    (tmp_path / "inner.sh").write_text("run $A $B $1\n")
    script = "export A=1; B=2; bash inner.sh x; bash -c 'run $A$B'; C=3 bash -c 'run $C'"
    read = [[w.text for w in c.words] for c in Script(script, tmp_path).commands]
    assert read == [["run", "1", "x"], ["run", "1$B"], ["run", "3"]]


# Of OpenSSH, what bears on its command: its words go to a new shell as one text, or its input does.
_SSH = """
ssh() {
    while [[ $1 == -* ]]; do [[ $1 == -[ip] ]] && shift; shift; done; shift
    (($#)) || set -- "$(cat)"
    env -i "$BASH" -c "$(declare -f python python3 deepspeed ray run); $*"
}
"""


@pytest.mark.parametrize(
    "script",
    [
        "K=1\nssh -p 22 -tt node <<EOF\ncd /tmp\nK=2; run a=$K b=\\$K\nEOF\nrun c=$K",
        "export K=1\nssh node <<'EOF'\nrun a=${K:-9}\nEOF",
        'for H in a b; do ssh -i key $H "K=2; run $H \\$K"; done',
        "ssh node 'run a=1' < /dev/null",
    ],
)
def test_what_ssh_runs_is_read(script: str) -> None:
    assert [[w.text for w in words] for words in _read(script)] == _bash(_SSH + script)
    assert _bash(_SSH + script)


@pytest.mark.parametrize(
    "script", ["ssh node 'cat > f' <<EOF\nrun a=1\nEOF", "ssh -fN node", "ssh node uptime"]
)
def test_what_ssh_does_not_run_is_not_read(script: str) -> None:
    assert not _read(script)


@pytest.mark.parametrize(
    "asks",
    [
        'if [ -z "$X" ] || [ -z "$Y" ]; then exit 1; fi',
        '[ -n "$X" ] && [ -n "$Y" ] || exit 1',
        'if [ $# -lt 1 ] || [ -z "$2" ]; then exit 1; fi',
        '[ -z "$X" ] && echo "X=?" >&2 && exit 1',
        'if ! { [ -n "$X" ] && [ -n "$Y" ]; }; then exit 1; fi',
    ],
)
def test_a_script_that_asks_for_variables_is_given_them(asks: str) -> None:
    """As bash goes on where somebody sets them."""
    script = f"{asks}\nrun a=1"
    given = _bash(f"X=1; Y=2; set -- a b\n{script}")
    assert [[w.text for w in words] for words in _read(script)] == given == [["run", "a=1"]]
    assert not _bash(script)


def test_a_script_that_always_ends_is_read_no_further() -> None:
    script = 'X=1\nif [ -z "$X" ] || [ -z "" ]; then exit 1; fi\nrun a=1'
    assert not _read(script) and not _bash(script)
