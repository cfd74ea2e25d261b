"""Real bash in a box: what reaches the programs of a script, stand-ins that write it down.

The box is a namespace of its own (user, mounts, network, processes) whose root is a fresh tmpfs
with bash, a few harmless tools and the scripts. Nothing of the machine is in it, so a script that
downloads, deletes or submits does that to nothing. A PATH of stand-ins alone is no box:
redirections and builtins go past it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Tools whose output a script uses, and which touch nothing.
_TOOLS = (
    "basename",
    "cat",
    "cut",
    "date",
    "dirname",
    "env",
    "grep",
    "head",
    "mkdir",
    "sed",
    "seq",
    "touch",
    "tr",
    "wc",
)
_USUAL = ("/usr/bin", "/usr/local/bin", "/opt/conda/bin")

# Read by every bash in the box. A program that is not there is written down, and succeeds.
_RECORD = r"""
command_not_found_handle() {
  local i
  for ((i = 1; i <= $#; i++)); do
    if [[ ${!i} =~ ^(.*/)?(ba|z|da)?sh$ && ${@:i+1:1} =~ ^-[a-z]*c$ && $i -gt 1 ]]; then
      /bin/bash "${@:i+1}"
      return
    fi
    # Slurm makes a script of that text.
    case "$1 ${!i}" in
      "sbatch --wrap="*) /bin/bash -c "${!i#--wrap=}"; return ;;
      "sbatch --wrap") ((i++)); /bin/bash -c "${!i}"; return ;;
    esac
  done
  # A file each: two programs of one pipe write at once.
  { printf '%s\0' "$@"; printf '\1\0'; } > "/box/records/$BOX/$EPOCHREALTIME-$BASHPID"
  return 0
}
"""
_STAND_IN = '#!/bin/bash\ncommand_not_found_handle %s "$@"\n'
# Folders and files of the author's are not there; the script goes on as it would for him.
_LENIENT = r"""
cd() { :; }; pushd() { :; }; popd() { :; }
source() { _source "$@"; }
.() { _source "$@"; }
_source() { # from where the script is started, else from where it lies, which cd does not go to
  local _from
  for _from in "$1" "${BASH_SOURCE[2]%/*}/$1" "${BASH_SOURCE[2]%/*}/${1##*/}"; do
    if [ -f "$_from" ]; then
      builtin source "$_from" "${@:2}"
      return
    fi
  done
}
ulimit() { :; }
env() { command_not_found_handle env "$@"; }
"""
_DRIVER = r"""
set -u
root=$1
mount -t tmpfs -o size=512m box "$root"
cd "$root"
mkdir -p bin lib lib64 usr/bin usr/local/bin opt/conda/bin tmp proc dev box old
mkdir -p etc home root var mnt
cp -r "$2"/. .
touch dev/null && mount --bind /dev/null dev/null
ln -s /proc/self/fd dev/fd
mount -t proc proc proc
pivot_root . old
cd /
exec /bin/bash /box/driver 3>&1
"""
_INSIDE = r"""
/box/umount -l /old
export PATH=/box/bin:/bin BASH_ENV=/box/env
status=()
for script in /box/scripts/*; do
  number=${script##*/}
  /box/bin/mkdir "/box/records/$number"
  cd /box/place
  (
    ulimit -t 5 -f 20000
    exec /box/timeout -s KILL 20 /usr/bin/env -i PATH=/box/bin:/bin BASH_ENV=/box/env \
      BOX="$number" /bin/bash "$script" </dev/null >/dev/null 2>/box/err 3>&-
  )
  status+=($?)
done
# What scripts left in the background writes down what it runs, too.
for ((wait = 0; wait < 100; wait++)); do
  set -- /proc/[0-9]*
  (($# > 1)) || break
  /box/sleep 0.1
done
for script in /box/scripts/*; do
  number=${script##*/}
  printf '\2%s\0%s\0' "$number" "${status[10#$number]}" >&3
  /box/bin/cat "/box/records/$number"/* >&3 2>/dev/null
done
"""

# For scripts of builtins and one program, run: they are read by one bash, each in a subshell.
_QUICK = r"""
/box/umount -l /old
export PATH=/box/bin:/bin:/usr/bin
cd /box/place
command_not_found_handle() { return 0; }
run() { { printf '%s\0' run "$@"; printf '\1\0'; } >&3; }
# A loop that doubles a variable would take all memory there is.
ulimit -v 400000 -t 60
for script in /box/scripts/*; do
  printf '\2%s\0' "${script##*/}" >&3
  printf '0\0' >&3
  ( . "$script" ) </dev/null >/dev/null 2>&1
  { printf '%s\0' status "$?"; printf '\1\0'; } >&3
done
"""


@dataclass(frozen=True)
class Ran:
    """What one script ran: each program's words, and how bash ended: not 0 where it was stopped."""

    commands: tuple[tuple[str, ...], ...]
    status: int


@cache
def namespaces() -> bool:
    """Whether this machine lets an ordinary process make a box."""
    try:
        done = subprocess.run(
            ["unshare", "-Urmnpf", "true"], capture_output=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


@cache
def _libraries(program: str) -> tuple[str, ...]:
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return tuple(re.findall(r"(/\S+) \(0x", listed))


def _furnish(folder: Path, stand_ins: Sequence[str]) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    programs = {"/bin/bash": bash}
    for tool in _TOOLS:
        if found := shutil.which(tool):
            programs[f"/box/bin/{tool}"] = found
    programs["/usr/bin/env"] = programs["/box/bin/env"]
    for tool in ("sleep", "timeout", "umount"):
        found = shutil.which(tool)
        assert found is not None
        programs[f"/box/{tool}"] = found
    libraries = {library for program in programs.values() for library in _libraries(program)}
    for target, source in (*programs.items(), *((lib, lib) for lib in sorted(libraries))):
        path = folder / target.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(source).resolve(), path)
    sh = folder / "bin" / "sh"
    sh.write_text('#!/bin/bash\nexec /bin/bash "$@"\n')
    sh.chmod(0o755)
    for usual in (*_USUAL, ""):
        for name in stand_ins if not usual else [f"{usual}/{n}" for n in ("python", "python3")]:
            path = folder / name.lstrip("/")
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_STAND_IN % name)
            path.chmod(0o755)


def bash(
    scripts: Sequence[str],
    *,
    quick: bool = False,
    lenient: bool = False,
    tree: Path | None = None,
    files: Sequence[str] = (),
    stand_ins: Sequence[str] = (),
) -> list[Ran]:
    """What bash passes to each program of these scripts, all run in one box.

    Args:
        scripts: their text.
        quick: they hold nothing but builtins and the program ``run``, and end.
        lenient: folders and files that are not there are no reason to stop.
        tree: a folder to copy into the box; scripts are run in it.
        files: where each script lies in that folder.
        stand_ins: programs with a path of their own.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        furniture = folder / "furniture"
        (furniture / "box" / "scripts").mkdir(parents=True)
        (furniture / "box" / "place").mkdir()
        (furniture / "box" / "records").mkdir()
        _furnish(furniture, stand_ins)
        (furniture / "box" / "env").write_text(_RECORD + (_LENIENT if lenient else ""))
        (furniture / "box" / "driver").write_text(_QUICK if quick else _INSIDE)
        if tree is not None:
            shutil.copytree(tree, furniture / "box" / "place", dirs_exist_ok=True)
        for number, script in enumerate(scripts):
            text = re.sub(r"(?m)^(\s*)set [-+][a-zA-Z].*$", r"\1:", script) if lenient else script
            if files:
                (furniture / "box" / "place" / files[number]).write_text(text)
                text = f"exec /bin/bash /box/place/{shlex.quote(files[number])}"
            (furniture / "box" / "scripts" / f"{number:05d}").write_text(text)
        root = folder / "root"
        root.mkdir()
        done = subprocess.run(
            ["unshare", "-Urmnpf", "bash", "-c", _DRIVER, "bash", str(root), str(furniture)],
            capture_output=True,
            timeout=60 + 6 * len(scripts),
            check=False,
        )
    ran = _parsed(done.stdout.decode("utf-8", errors="replace"), quick)
    if len(ran) != len(scripts):
        raise RuntimeError(f"the box gave {len(ran)} of {len(scripts)}: {done.stderr.decode()}")
    return ran


def bash_without_a_box(scripts: Sequence[str]) -> list[Ran]:
    """The same for scripts that hold nothing but builtins and the program ``run``, and end."""
    with tempfile.TemporaryDirectory() as temporary:
        driver = _QUICK.replace("/box/umount -l /old\n", "").replace("/box", temporary)
        for name in ("scripts", "place"):
            (Path(temporary) / name).mkdir()
        for number, script in enumerate(scripts):
            (Path(temporary) / "scripts" / f"{number:05d}").write_text(script)
        done = subprocess.run(
            ["bash", "-c", f"exec 3>&1; {driver}"], capture_output=True, env={}, check=False
        )
    return _parsed(done.stdout.decode("utf-8", errors="replace"), quick=True)


def _parsed(output: str, quick: bool) -> list[Ran]:
    ran: list[Ran] = []
    for block in output.split("\2")[1:]:
        _, status, *words = block.split("\0")
        commands: list[tuple[str, ...]] = []
        current: list[str] = []
        for word in words[:-1]:
            if word == "\1":
                commands.append(tuple(current))
                current = []
            else:
                current.append(word)
        if quick:
            status = commands.pop()[1]
        ran.append(Ran(tuple(commands), int(status)))
    return ran
