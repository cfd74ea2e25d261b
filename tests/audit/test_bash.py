"""What the audit reads in a script beside what bash passes: generated scripts, in one box."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from klplug.audit import AuditError
from klplug.audit.shell import Command, Script
from tests.audit.box import bash, bash_without_a_box, namespaces
from tests.audit.corpus import same
from tests.audit.generated import script

HOW_MANY = 2000

_TOO_MUCH = ("it hangs on", "too much", "it is too long")
_FILES = "which files"
TOO_MANY = "more ways than are told apart"
NAMES_FILES = "a pattern names files"


def disagreement(read: Sequence[Command], ran: Sequence[tuple[str, ...]]) -> str | None:
    """Where what was read is not what ran, if there is no run that was read and is the real one."""
    commands = [c for c in read if c.reached and c.words[0].text == "run"]
    ways = [command.alternatives() for command in commands]
    unknown = [word for way in ways for words in way for word in words if word.unknown]
    if any(why.startswith(_TOO_MUCH) for word in unknown for why in word.unknown):
        return TOO_MANY
    if any(why.startswith(_FILES) for word in unknown for why in word.unknown):
        return NAMES_FILES
    if unknown:
        return f"unknown: {unknown}"
    texts = [{tuple(word.text for word in words) for words in way} for way in ways]
    # How many of bash's commands may have been met, after each that was read.
    met = {0}
    for command, possible in zip(commands, texts, strict=True):
        after = {at + 1 for at in met if at < len(ran) and ran[at] in possible}
        if not command.sure:
            after |= met
        if not after:
            at = max(met)
            real = ran[at] if at < len(ran) else None
            return f"read {[w.text for w in command.words]}; bash {real}"
        met = after
    return None if len(ran) in met else f"not read: {ran[max(met)]}"


def test_generated_scripts_are_read_as_bash_reads_them() -> None:
    made = [script(seed) for seed in range(HOW_MANY)]
    if namespaces():
        ran = bash(made, quick=True)
    else:
        warnings.warn("no namespaces here: generated scripts are run without a box", stacklevel=1)
        ran = bash_without_a_box(made)
    wrong, skipped = [], 0
    for text, real in zip(made, ran, strict=True):
        try:
            found = disagreement(Script(text).commands, real.commands)
        except AuditError as error:
            found = str(error)
        if real.status:  # stopped by the box, which has not all the memory there is
            found = TOO_MANY
        skipped += found in (TOO_MANY, NAMES_FILES)
        if found not in (None, TOO_MANY, NAMES_FILES):
            wrong.append((text, found))
    assert skipped < HOW_MANY / 50
    if wrong:
        text, found = min(wrong, key=lambda pair: len(pair[0]))
        pytest.fail(f"{len(wrong)} of {len(made)} scripts; the shortest:\n{text}\n{found}")


EMPTY = [
    'run "${M[@]:1}""${C}"', 'run "${M:-}""${M[@]:1}"', 'run "$C""${M[@]}"', 'run "${M[@]}"""',
    'run "${M[@]}"$C', 'run $C"${M[@]}"', 'run "$@""$C"', 'run "$@"', 'run "$@$C"',
    'run "${C}${M[@]}"', 'run "${M[@]}""${N[@]}"', 'run "${M[@]}""${M[*]}"', 'run ""${M[@]}',
    'L=("${M[@]:1}""${C}"); run "${L[@]}"', 'run "a${M[@]}" "${M[@]:-d e}" "${M[@]+x}"',
    'M=(""); run "${M[@]}"', 'M=(a "b c"); run "x${M[@]}y""z" "${M[@]}""" ""',
    'M=(a b); run "${M[@]}${C}" "${M[@]/a/}" ${M[@]}"${C}"',
    'f() { run "$@" "$*" "${@:2}" "$1"; }; f; f a "" b',
    # What is not set is nothing, and what it joins is set.
    'B="b c${M[1]}"; run "${B:-x}" "${B+y}"', 'A="${M[1]}"; run "${A-x}" "${A:-y}" "${A+z}"',
    'L=("${M[1]}"k); run "${L:-x}" "${L+y}"', 'A=a; A+="${M[3]}"; run ${A:-x}',
    'run "${M[1]-x}" "${M[1]:-y}" "${M[1]+z}" "${M[1]}"', 'f() { run "${1:-d}$2"; }; f "" b',
]  # fmt: skip


@pytest.mark.parametrize("text", EMPTY)
def test_what_is_empty_is_read_as_bash_reads_it(text: str) -> None:
    text = f"set --; C=; M=(); N=()\n{text}"
    (real,) = bash([text], quick=True) if namespaces() else bash_without_a_box([text])
    assert disagreement(Script(text).commands, real.commands) is None


# Kinds that generated scripts were read wrongly in. A program whose name has a slash is looked for.
ENDS = [
    'f() { A={a: 1}"/ x"; }; f || run failed', 'f() { A={a: 1}p/q.sh; }; f || run failed',
    'A="no such/program"; "$A" || run failed', '"no such/program" && run done; run end',
]  # fmt: skip


@pytest.mark.parametrize("text", ENDS)
def test_a_name_that_no_program_has_is_not_taken_to_succeed(text: str) -> None:
    (real,) = bash([text], quick=True) if namespaces() else bash_without_a_box([text])
    assert disagreement(Script(text).commands, real.commands) is None


NAMES = [
    'N=5; N\u4e2a=7; run "\u5171$N\u4e2a" $N\u3001b "\u00a5$\u5143" ${N}\u4e2a',
    'set --; N=5; run $((N+1))\u4e2a "${N:-x}\u4e2a" $1\u4e2a "$#\u4e2a"; \u00e9=1; run "$\u00e9"',
]  # fmt: skip


@pytest.mark.parametrize("text", NAMES)
def test_a_name_ends_where_its_letters_are_no_more_ascii(text: str) -> None:
    (real,) = bash([text], quick=True) if namespaces() else bash_without_a_box([text])
    assert disagreement(Script(text).commands, real.commands) is None


FORMS = [
    "for ((I = 0; I < 2; I++)) { run $I; }\nf() { for I; { run $I; }; }; f a b",
    # What is read is gone.
    "while read -r A B; do run $A $B; done <<E\nk2 0.001\nk1 0.1 c\n\n'q' \\x\nE\nrun $? \"$A\"",
    "while IFS=, read A; do run \"$A\"; done <<< $'a b\\\\\nc\nd'",
    "{ read A; run $A; read A B; run $A $B; read A; run $? \"$A\"; } <<< $'1 2\n3 4 5'",
    "{ read A; mapfile -t L; run \"${L[@]}\"; read A || run end; } <<< $'1 2\n3 4\n5'",
    "{ read -d: A; run \"$A\"; read -rd ';' A; run \"$A\"; "
    "read -ra L; run \"${L[1]}\"; } <<< 'a b:\\\\c;d e'",
    "{ read -d , A; run \"$A\"; while read -d , A || [ -n \"$A\" ]; "
    "do run \"$A\"; done; } <<< 'x y,z,u'",
    "f() { read A; run \"$A\"; }; { f; (f); f; "
    "X=$(echo a; echo b); run \"$X\"; f; } <<< $'1\n2\n3'",
    "printf '%s\\n' a 'b c' | while read -r A; "
    "do run \"$A\"; done; echo 'x y' | { read A B; run $B; }",
    "{ echo a; echo b >&2; echo c; } | { read A; read B; run $A $B; }; echo $(echo a | cat) | cat",
    "for A in a b; do { read B; run $A $B; } <<< \"$A$A\"; done; read A <<< ''; run $? \"$A\"",
    "run $(cat <<E\na  b\nE\n) \"$(cat <<< 'a  b')\"; IFS=$'\\n'; "
    "for I in $(cat <<E\nk2 1\nk1 2\nE\n); do run $I; done",
    # What is written to a file may be read.
    "echo 'a b' > f; echo c >> f; while read A; "
    "do run \"$A\"; done < f; echo d > ./f; read A < f; run $A",
    "f() { echo \"$1\" > $2; echo $2; }; (f 1 g); A=$(f 2 h); read B < g; read C < $A; run $B $C",
    "f() { echo x; [ -d /etc ] && return; echo y; }; "
    "f > g; read A < g; run \"$A\"; A=$(f); run \"$A\"",
    # An empty pattern that is held to an end.
    "A=abc E= B=(a '' c); run \"${A/#/x}\" \"${A/%/y}\" \"${E/#/x}\" \"${A/#$E/z}\" \"${A//}\"",
    "B=(a '' c); run \"${B[@]/#/p.}\" ${B[@]/%/.s} \"${B[*]/#/+}\"",
    # An element that is unset.
    "L=(1 2 3); unset 'L[2]' \"L[-1]\"; L+=(x); run \"${L[@]}\" ${#L[@]} \"${L[1]}\"; unset 'L[7]'",
    "L=(a b); I=1; unset \"L[$I]\"; run \"${L[@]}\"; unset 'L[I-1]'; run ${#L[@]}; L+=(c); run $L",
    "A=s B=t; unset 'A[0]' 'B[1]'; run \"${A-gone}\" $B; "
    "L=(a b); unset 'L[@]'; run ${#L[@]} \"${L-gone}\"",
    "declare -A M=([a]=1 [b]=2 [c]=3); K=a; unset \"M[$K]\" 'M[c]'; "
    "run ${#M[@]} \"${M[@]}\" \"${M[a]-gone}\"",
    "f() { run f; }; unset -f f; f; g() { run g; }; "
    "unset g; g; g=1; g() { run h; }; unset g; g; run \"$g\"",
    "L=(a); unset L; run ${#L[@]} \"${L[@]}\" end; "
    "L+=(b); run \"${L[@]}\"; unset L; L[0]=c; run $L",
    # Another name.
    "f() { local -n R=$1; R+=(x 'y z'); "
    "run \"${R[@]}\" ${!R} ${#R[@]} $R; }; L=(a); f L; run \"${L[@]}\"",
    "f() { local -n R=$1 S=B; R=new S+=$2; local L=own; "
    "run $R $L; }; B=b A= L=; f A c; run \"$A\" \"$B\" \"$L\"",
    "declare -n R=A; A=1; R=2; run $A; (( R += 3 )); run $A; "
    "unset R; run \"${A-gone}\"; R=5; run $A; unset -n R",
    "declare -n R; R=A; R=5; run $A \"${!R}\"; f() { local -n R=$1; "
    "R=$2; }; g() { local V; f V x; run $V; }; g",
    "f() { local -n R=$1; [ -d /etc ] && return; R=x; }; A=a; f A; run $A; f B; run \"${B-gone}\"",
    "declare -n R=A; for I in 1 2; do R+=$I; done; run $A; if [ -d /etc ]; then R=y; fi; run $A",
    "shopt -s extglob\nrun !(x) @(a|b c)d\ncase ab in +(a|b)) run case ;; esac; run end",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMS)
def test_forms_are_read_as_bash_reads_them(text: str) -> None:
    (real,) = bash([text], quick=True) if namespaces() else bash_without_a_box([text])
    assert real.commands
    assert disagreement(Script(text).commands, real.commands) is None


def test_which_files_a_pattern_of_a_loop_names_is_not_known() -> None:
    (read,) = Script("for I in a*b; do run $I; done").commands
    assert read.words[1].unknown == ("which files a*b names is not known",)


SHIFTS = [
    'f() { shift; run s $? "$@"; shift 2; run t $? "$@"; }; f a; f a b c; f; f a "" ""',
    "f() { shift || run none; shift 3 && run $#; }; f; f a b; f a b c d",
]


@pytest.mark.parametrize("text", SHIFTS)
def test_where_there_are_too_few_arguments_none_is_shifted(text: str) -> None:
    (real,) = bash([text], quick=True) if namespaces() else bash_without_a_box([text])
    assert disagreement(Script(text).commands, real.commands) is None


def test_a_quoted_pattern_of_a_loop_names_no_files() -> None:
    text = 'set --; A="*"; for I in "$A ${A}/$A"b "x?" \'[a]*\' \\* a; do run "$I"; done; run "$I"'
    (real,) = bash([text], quick=True) if namespaces() else bash_without_a_box([text])
    assert disagreement(Script(text).commands, real.commands) is None


def test_the_script_that_slurm_is_to_wrap_is_read() -> None:
    text = (
        'A=(run "b c"); export B=x; C=y\n'
        "JOB=(sbatch --job-name=j --wrap=\"srun bash -c 'run ${A[1]} $B; run \\${B}$C'\")\n"
        '"${JOB[@]}"; sbatch --wrap "run \\$B \\$C" -n 1; sbatch job.sh --wrap'
    )
    wanted = [("run", "b", "c", "x"), ("run", "xy"), ("run", "x")]
    if namespaces():
        assert [c for c in bash([text])[0].commands if c[0] == "run"] == wanted
    read = [tuple(w.text for w in c.words if w.text) for c in Script(text).commands]
    assert [c for c in read if c[0] == "run"] == wanted


# What bash gives for $(echo a b) the reader knows, and for $(printf %s "$(cat file)") it does not.
@pytest.mark.parametrize("command", ["cat list", "sed s/x/x/ list"])
def test_how_many_elements_there_are_is_not_known_of_what_is_not(command: str) -> None:
    words = '${#L[@]} "${L[2]}" "${L[-1]}" "${L[@]:1:1}"'
    text = (
        f'echo a b c > list; L=(x $({command}) y); run {words}; L=("$({command})" y); run {words}'
    )
    ran = bash([text])[0].commands if namespaces() else ()
    if ran:
        wanted = [("run", "5", "b", "y", "a"), ("run", "2", "", "y", "y")]
        assert [c for c in ran if c[0] == "run"] == wanted
    several, one = [c.words[1:] for c in Script(text).commands if c.words[0].text == "run"]
    assert all(word.unknown for word in several)
    assert [w.text for w in one] == ["2", "", "y", "y"]


@pytest.mark.parametrize(
    "text",
    [
        "L=(a b c); unset 'L[0]'; run \"${L[@]}\"",
        'L=(a b); unset "L[$(pick)]"; run "${L[@]}"',
        'A=abc; run "${A/b/[&]}"',
        "read -rn1 A <<< abc; run $A",
        # How many rows there are is not decided.
        "B=x; [ -d /etc ] && B=$'y\\nz'; while read A; do run $A; done <<< \"a $B\"",
        'declare -n R=$(pick); run "$R"',
        # How many there are.
        'mapfile -t L < <(pick); run "${#L[@]}"',
        'mapfile -t L < <(pick); [ ${#L[@]} -eq 8 ] || exit 2; run "$L"',
        'read -ra L <<< "$(pick)"; M=(x "${L[@]}"); run ${#M[@]}',
        "N=0; for I in $(pick); do N=$((N + 1)); done; (( N > 2 )) || exit; run $N",
        'L=(x $(pick)); for I in "${L[@]}"; do M+=("$I"); done; run ${#M[@]}',
        "N=0; for I in *.json; do N=$((N + 1)); done; run $N",
        'while read -r I; do L+=("$I"); done < <(pick); run ${#L[@]}',
        "declare -n R='L[0]'; L=(a); run \"$R\"",
    ],
)
def test_what_is_not_worked_out_is_unknown(text: str) -> None:
    command = Script(text).commands[-1]
    assert command.words[0].text == "run" and command.words[1].unknown


# A command kept in a document, as OpenRLHF's examples have it, of which a part is not known.
@pytest.mark.parametrize(
    "reads",
    [
        "read -r -d '' A <<E\nrun a \\\n  $D/b $D c\nE\n$A",
        "read -d '' A <<E || true\n run a '$D/b' c\nE\neval \"$A\"",
        "read -d '' -ra A <<E\nrun a\n  $D/b c\nE\n${A[@]}",
    ],
)
def test_what_is_not_known_of_a_document_leaves_the_rest(reads: str) -> None:
    text = f"D=$(pick)\n{reads}"
    (read,) = (c.words for c in Script(text).commands if c.words[0].text == "run")
    if namespaces():
        (ran,) = (c for c in bash([text])[0].commands if c[0] == "run")
        assert same(read, ran)
    assert [w.text for w in read if not w.unknown] == ["run", "a", "c"]
    assert any(w.unknown and w.text.endswith("/b") for w in read)


@pytest.mark.parametrize(
    "text",
    [
        """C="run a='$D' '$D b' c"; eval "$C"; eval "$C" """,
        """C="run \\'$D \\"'$D\\" a\n# it's\nrun '$D' d"; eval "$C"; bash -c "$C" """,
        """srun bash -c "run a='[\\"$D\\"]' b='$1$D'" """,
    ],
)
def test_what_is_not_known_stays_so_in_single_quotes_of_another_shells_script(text: str) -> None:
    text = f"D=$(pick)\n{text}"
    read = [c.words for c in Script(text).commands if c.words[0].text == "run"]
    assert read and all(w.unknown for words in read for w in words if "pick" in w.text)
    if namespaces():
        ran = [c for c in bash([text])[0].commands if c[0] == "run"]
        assert len(read) == len(ran) and all(map(same, read, ran))


def test_of_the_fields_of_a_document_none_is_known_where_a_part_is_not() -> None:
    text = "D=$(pick); read -r -d '' A B <<E\n$D b\nE\nrun $B"
    assert Script(text).commands[-1].words[-1].unknown


@pytest.mark.parametrize(
    "line", ["export $(xargs < .env)", 'eval "$(pick)"', 'export "$(pick)=1"', "source .env"]
)
def test_what_sets_variables_from_outside_is_told(line: str) -> None:
    assert Script(f"run\n{line}\nrun").sourced == [2]
    assert Script(f"for I in a b; do {line}; done").sourced == [1]
    assert not Script('eval "run a=$(pick)"; export A=$(pick) $U').sourced


# Another shell: its script, its name and its arguments; from a word, a file or what it reads.
SHELLS = {
    """bash -l -c 'run $1 "${@:2}"' name a 'b c'; bash -euo pipefail -c "run x; # y" """: [
        ("run", "a", "b c"),
        ("run", "x"),
    ],
    """bash --norc -O extglob +x -c -- 'run $#' a b; srun -n 1 bash -lc 'run "$@"' a 'b c' d""": [
        ("run", "1"),
        ("run", "b c", "d"),
    ],
    """P='run a'; f() { bash -c "$P \\"\\$@\\" $1" f "$@"; }; f x 'y z'; bash -c "run $1b" _ c""": [
        ("run", "a", "x", "y z", "x"),
        ("run", "b"),
    ],
    (
        "export B=b; A=a; cat <<E | bash\nrun $A \\$B\nE\n"
        "echo 'run \"$@\"' | bash -s x 'y z'; echo run x | bash -"
    ): [
        ("run", "a", "b"),
        ("run", "x", "y z"),
        ("run", "x"),
    ],
    (
        "A=1; cat > job.sh <<E\n#!/bin/bash\nrun $A \\$1\n"
        "E\nA=2; bash job.sh x; . ./job.sh y; chmod +x job.sh"
    ): [
        ("run", "1", "x"),
        ("run", "1", "y"),
    ],
    (
        "A=1; env A=2 B='b c' bash -c 'run $A \"$B\"'; "
        "run $A; f() { run \"$@\"; }; export -f f; bash -c 'f x'"
    ): [
        ("run", "2", "b c"),
        ("run", "1"),
        ("run", "x"),
    ],
    "while read -r A; do bash -c 'run $1' _ $A; done <<< $'a\nb'": [("run", "a"), ("run", "b")],
}


@pytest.mark.parametrize("text", SHELLS)
def test_another_shell_is_read_as_bash_reads_it(text: str) -> None:
    if namespaces():
        assert [c for c in bash([text])[0].commands if c[0] == "run"] == SHELLS[text]
    read = [tuple(w.text for w in c.words) for c in Script(text).commands]
    assert [c for c in read if c[0] == "run"] == SHELLS[text]


@pytest.mark.parametrize(
    "text",
    [
        "cat > job.sbatch <<E\nrun $A\nE\nsbatch -N 1 job.sbatch x",
        "cat <<E | sbatch -N 1\nrun $A\nE\n",
        "while read -r B; do sbatch job.sh $B; done <<< 'run x'; sbatch <<< 'run $A'",
    ],
)
def test_what_slurm_is_given_is_read(text: str) -> None:
    read = [[w.text for w in c.words] for c in Script(f"export A=a\n{text}").commands]
    assert [words for words in read if words[0] == "run"] == [["run", "a"]]


def test_a_file_that_a_program_writes_is_not_read_as_it_lies_there(tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("run stale\n")
    read = Script("sed s/a/b/ template > job.sh; bash job.sh", tmp_path).commands
    assert [c.words[0].text for c in read] == ["sed", "bash"]


def test_what_rounds_set_is_not_known_where_they_have_no_end() -> None:
    text = "A=0; B=x; while true; do run $A $B $C; A=$((A + 1)); C=c; done"
    (command,) = Script(text).commands
    assert [bool(word.unknown) for word in command.words] == [False, True, False, True]


def test_which_files_a_pattern_names_is_not_known() -> None:
    text = (
        'A=/*; run $A "$A" "/b"* a/* k=/*; L=(/b*); run ${#L[@]}\n'
        'IFS=, read -a L <<< "/*,b"; run "${L[@]}"'
    )
    if namespaces():
        first = bash([text], quick=True)[0].commands[0]
        assert "/bin" in first and first[-2:] == ("a/*", "k=/*")
    read = [c.words[1:] for c in Script(text).commands]
    assert [bool(w.unknown) for w in read[0]] == [True, False, True, False, False]
    assert read[1][0].unknown and not read[2][1].unknown


@pytest.mark.skipif(not namespaces(), reason="NO NAMESPACES HERE: the box is not tried")
def test_nothing_leaves_the_box(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    escapes = [
        f"echo x > {mark}", f"builtin printf x >> {mark}", f"exec 9> {mark}", f": >| {mark}",
        f"/bin/bash -c 'echo x > {mark}'", f"printf x | while read l; do echo $l > {mark}; done",
        f"/usr/bin/env bash -c 'echo > {mark}'", f"cd /; cd ../..; echo x > {mark}",
        f"/usr/bin/touch {mark}", f"mapfile < <(echo x > {mark})", f"trap 'echo x > {mark}' EXIT",
        f"echo x > /proc/1/root{mark}", f"/usr/bin/python3 -c 'open(\"{mark}\", \"w\")'",
    ]  # fmt: skip
    bash(escapes)
    assert not mark.exists()
