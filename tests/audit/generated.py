"""Scripts made at random from the forms that training scripts use, and some that they might.

Seeds make them again: a script is ``script(seed)``. They hold nothing but builtins and a program,
``run``, and they end.
"""

from __future__ import annotations

from random import Random

_SCALARS = ("A", "B", "C", "D")
_ARRAYS = ("L", "M")
_TEXTS = ("1", "7", "x", "one two", "a.b=3", "", "k2", "p/q/r.sh", "a  b", "*", "[1,2]", "Ab_c")
# What bash may do with a file that is or is not there is nothing that a reader can know.
_UNDECIDED = ("[ -f /nowhere ]", "[[ -d /etc ]]", "[ -e /dev/null ]")
_LINES = ("a=1 \\\nz\n", "$A\n", "b ${B:-2}\n", "'q'\n", "\tt\n", '"$D"\n', "\\$A\n")
_FIRST = "A=1 B='one two' C= D=p/q/r.sh N=3\nL=(l1 'l 2' l3) M=()\n"


def script(seed: int) -> str:
    """The script of this seed; every second one has conditions that only a run could tell."""
    writer = _Writer(Random(seed), undecided=bool(seed % 2))
    body = "\n".join(writer.statement(2) for _ in range(writer.random.randint(1, 5)))
    return f'{_FIRST}{body}\nrun end "$A" $B "${{L[@]}}"\n'


class _Writer:
    def __init__(self, random: Random, undecided: bool) -> None:
        self.random = random
        self.undecided = undecided

    def one(self, *of: str) -> str:
        return self.random.choice(of)

    def name(self) -> str:
        return self.one(*_SCALARS)

    def words(self, most: int, least: int = 0) -> str:
        return " ".join(self.word() for _ in range(self.random.randint(least, most)))

    def word(self, depth: int = 2) -> str:
        return "".join(self.part(depth) for _ in range(self.random.choice((1, 1, 2, 3))))

    def part(self, depth: int = 2) -> str:
        """One stretch of a word."""
        kind = self.random.randint(0, 14) if depth else 0
        name, array = self.name(), self.one(*_ARRAYS)
        plain = ("key=v", "a.b=", "+c.d=1", "-x", "k", "12", r"\$", r"\ ", "'s q'", '"d q"', "'$A'")
        match kind:
            case 3:
                return self.one(f"${{{name}}}", f'"${name}"', f'"${{{name}}}"')
            case 4:
                operator = self.one(":-", "-", ":+", "+")
                default = self.one("d", "d e", "'q r'", '"q r"', f"${name}", "", "[x]", "$(( N ))")
                made = f"${{{self.one(*_SCALARS, 'L', 'M')}{operator}{default}}}"
                return self.one(made, f'"{made}"')
            case 5:
                return self.one(
                    f'"${{{array}[@]}}"', f"${{{array}[@]}}", f'"${{{array}[*]}}"',
                    f"${{{array}[0]}}", f'"${{{array}[1]}}"', f"${{#{array}[@]}}",
                    f'"${{{array}[@]:1}}"', '"${L[-1]}"', f"${{{array}[*]}}", '"${L[$N-2]}"',
                )  # fmt: skip
            case 6:
                return f"$(({self.expression()}))"
            case 7:
                operation = self.one(
                    "%.*", "%%/*", "#*/", "##*/", "/a/b", "//b/", "^^", ",,", "^", ":1", ":0:2",
                    ":1:1", "/#p/z", "/%h/z", "%?", "#?", "//[a-c]/-", "/ /_", "//\\//.",
                    "/#/s", "/%/.t",
                )  # fmt: skip
                return self.one(f"${{{name}{operation}}}", f'"${{{name}{operation}}}"')
            case 8:
                return f"${{#{name}}}"
            case 9:
                return f"$(echo {self.word(depth - 1)})"
            case 10:
                return f'"$(echo {self.word(depth - 1)} {self.word(depth - 1)})"'
            case 11:
                return self.one(
                    "{a,b}", "{1..3}", "x{,y}", "{a: 1}", "{'q r',z}", "{}", "{a,{b,c}}", "{03..1}"
                )
            case 12:
                return f'"{self.one("x ", "", "=")}${name} ${{{name}}}/$A"'
            case 13:
                return self.one(r"$'t\tn\n'", r"'it'\''s'", '"\\$A \\" \\x"', "a#b", "'$'")
            case 14:
                return "`echo " + self.one(f"${name}", "b", "'c d'") + "`"
            case _:
                return self.one(*plain)

    def expression(self) -> str:
        atoms = ("N", "$N", "3", "12", "(N + 1)", "${N}", "(2 * 3)", "${#A}")
        parts = [self.one(*atoms, "-2", "!N")]
        for _ in range(self.random.randint(0, 2)):
            parts += [
                self.one(" + ", "-", " * ", " == ", "<", " && ", " | ", " / 2 + ", "% 5 -"),
                self.one(*atoms),
            ]
        joined = "".join(parts)
        return f"{joined} ? N : 4" if self.random.random() < 0.2 else joined

    def condition(self) -> str:
        name, array = self.name(), self.one(*_ARRAYS)

        def decided() -> str:
            return self.one(
                f'[ "${name}" = x ]', f'[ -z "${name}" ]', f'[ -n "${name}" ]', "[ $N -gt 3 ]",
                f"[[ ${name} == *o* ]]", f"[[ ${name} =~ ^[a-z]+$ ]]", "(( N > 2 ))", "true",
                f"[[ -n ${name} && $N -lt 5 ]]", f'[ "${name}" != x -a "$A" = 1 ]', "false",
                f'[[ ! -z ${name} || ${name} == "m" ]]', f"[ ${{#{array}[@]}} -gt 1 ]", "! true",
                f'test "${name}" == 7', "[[ $N -eq N ]]", f'[[ "${name}" != "k2" ]]',
                f"[[ ( ${name} = 1 || -v N ) && ! ${name} =~ (one|x)' t' ]]", "((N)); (( N - 3 ))",
            )  # fmt: skip

        made = decided()
        if self.undecided and self.random.random() < 0.4:
            made = self.one(*_UNDECIDED)
        if self.random.random() < 0.2:
            made += self.one(" && ", " || ") + decided()
        return made

    def block(self, depth: int) -> str:
        return "\n".join(self.statement(depth) for _ in range(self.random.randint(1, 3)))

    def statement(self, depth: int) -> str:
        name, array = self.name(), self.one(*_ARRAYS)
        below = max(depth - 1, 0)
        match self.random.randint(0, 22 if depth else 9):
            case 0 | 1:
                return f"run {self.words(3)}"
            case 2:
                return f"{name}={self.one(*_TEXTS)!r}"
            case 3:
                return f"{name}={self.word()}"
            case 4:
                return f"{name}+={self.part()}"
            case 5:
                return f"{array}=({self.words(3)})"
            case 6:
                return f"{array}+=({self.words(2)})"
            case 7:
                return self.one(
                    "N=$((N + 1))", "(( N += 2 ))", "(( N++ ))", "let N=N-1", "N=4",
                    "set -- a 'b c'",
                    f"{array}[0]=z", f"export {name}='e f'", "shift", f'read -r {name} <<< "$A"',
                    f'IFS=/ read -r -a {array} <<< "$D"', f"printf -v {name} '%s-%d' q 3",
                    f'mapfile -t {array} <<< "$A"', f"eval '{name}=$A; run ev \"$A\"'",
                    f"unset {name}; {name}=u", 'run "$@" $1 "${@:2}" $#', f"declare {name}=$B",
                    f"run \\\n  a \\\n  '{name}' # c\n", f"{name}=x run \"${name}\"",
                    f'IFS=,; {name}="${{L[*]}}"; unset IFS', f"declare -A H=([k]={name} [m]=2)\n"
                    'run "${H[k]}" ${#H[@]}', f'local_={name}; run "${{!local_}}"',
                    f"{{ read {name}; run $? \"${name}\"; read -r B C; }} <<< $'p q\\nr  s t'",
                    f"while read -r {name} I; do run \"${name}\" $I; done <<E\n{self.one(*_LINES)}"
                    f"{self.one(*_LINES)}E",
                    f"printf '%s\\n' \"${name}\" 'v w' | while read -r I; do run \"$I\"; done",
                    f'echo {self.word()} > .f; read {name} < .f; run "${name}"',
                    f'h() {{ local -n R=$1; R{self.one("=", "+=")}{self.part()}; }}; h {name}',
                    f"unset '{array}[-1]'; run ${{#{array}[@]}} \"${{{array}[@]}}\"",
                )  # fmt: skip
            case 8:
                quoted = self.one("E", "'E'", "-E", '"E"')
                lines = "".join(
                    self.one(
                        "a=1 \\\nz\n", "$A\n", "b ${B:-2}\n", "'q'\n", "\tt\n", '"$D"\n', "\\$A\n"
                    )
                    for _ in range(self.random.randint(0, 3))
                )
                end = self.one("", " || true")
                return f"read -r -d '' {name} <<{quoted}{end}\n{lines}E\nrun ${name} \"${name}\""
            case 9:
                line = self.one("u v", "$A", "l1", "$(echo $A)", "it's")
                return f"{name}=$(cat <<E\n{line}\nE\n)"
            case 10 | 11 | 12:
                otherwise = f"else {self.block(below)}\n" if self.random.random() < 0.5 else ""
                if self.random.random() < 0.3:
                    otherwise = f"elif {self.condition()}; then {self.block(below)}\n{otherwise}"
                return f"if {self.condition()}; then {self.block(below)}\n{otherwise}fi"
            case 13:
                return (
                    f'case "${name}" in x|k2) {self.block(below)}\n;; (*o*) {self.block(below)}\n;;'
                    f" [0-9]) run digit {self.one(';;', ';;&', ';&')} '*') run star ;; esac"
                )
            case 14:
                body = self.block(below)
                return f"for I in {self.word()} {self.word()}; do {body}\nrun $I\ndone"
            case 15:
                number, most = f"J{depth}", self.random.randint(0, 3)
                return (
                    f"for (({number} = 0; {number} < {most}; {number}++)); do {self.block(below)}\n"
                    f"run ${number}; done"
                )
            case 16:
                leave = self.one("break", "continue", ":")
                return (
                    f"K{depth}=0; while [ $K{depth} -lt 3 ]; do K{depth}=$((K{depth} + 1)); "
                    f'if [ "$A" = 1 ]; then {leave}; fi; {self.block(below)}\ndone'
                )
            case 17:
                body = self.simple()
                return (
                    f'f() {{ local {name}="$1"; {body}\nrun f "$@"; }}\n'
                    f"f {self.word()} {self.word()}"
                )
            case 18:
                body = self.simple()
                return (
                    f"g() {{ if [ $# -gt 1 ]; then return 3; fi; {body}\n}}\n"
                    f"g {self.word()} || run g"
                )
            case 19:
                return f"( {self.block(below)}\n)"
            case 20:
                chain = self.one("&&", "||")
                return f"{self.condition()} {chain} {{ {self.block(below)}\n}}"
            case 21:
                return f"{{ {self.block(below)}\n}} > /dev/null"
            case _:
                return f"{name}=$(if {self.condition()}; then echo {self.part()}; else echo no; fi)"

    def simple(self) -> str:
        """A body without undecided conditions, for a function."""
        undecided, self.undecided = self.undecided, False
        made = self.block(0)
        self.undecided = undecided
        return made
