"""From a file or a command line to the report on it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from klplug.audit.errors import AuditError
from klplug.audit.hosts import openrlhf, verl
from klplug.audit.report import Report, report
from klplug.audit.settings import Settings
from klplug.audit.setup import Setup
from klplug.audit.shell import Command, Cut, Script, Word
from klplug.audit.tables import HOSTS, Table, candidates, given

_ACCEPTED = (
    "python -m verl.trainer.main_ppo, python -m openrlhf.cli.train_ppo_ray, or "
    "python -m klplug_openrlhf"
)
_MAINS = re.compile(
    r"""(?x)^(?:
        (?P<verl> verl\.trainer\.main_ppo(?:_v0)? | (?:verl\.)?recipe\.\w+\.main_\w+
                | .*verl/trainer/main_ppo\.py | .*recipe/\w+/main_\w+\.py )
      | (?P<openrlhf> openrlhf\.cli\.train_ppo_ray | .*openrlhf/cli/train_ppo_ray\.py )
      | (?P<klplug> klplug_openrlhf )
      | (?P<other> verl\.(?:trainer|experimental)\.[\w.]+ | openrlhf\.cli\.\w+ )
    )$"""
)
# Larger than any script; a data file given by mistake is not read to its end.
_MAX_BYTES = 10_000_000


@dataclass(frozen=True)
class _Found:
    host: str
    args: tuple[Word, ...]
    through_klplug: bool
    recipe: bool
    line: int | None
    cut: Cut | None = None


def audit(
    source: str | os.PathLike[str] | Sequence[str],
    *,
    host: str | None = None,
    host_version: str | None = None,
    command: int = 1,
) -> Report:
    """The report on a training command, which is read and never run.

    Args:
        source: a file (shell script, or YAML), or a command line as a sequence of words.
        host: ``verl`` or ``openrlhf``; where it is given, other commands in the file are passed
            over.
        host_version: the release whose defaults and rules hold. By default the installed one, or
            the newest known one that has all settings of the command.
        command: which of several training commands in a file, counted from 1.

    Raises:
        AuditError: not a training command of either host, an unreadable file, an unknown release.
    """
    if host is not None and host not in HOSTS:
        raise AuditError(f"host {host!r} is not known; there is {', '.join(HOSTS)}")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        text = _read(path)
        if path.suffix in (".yaml", ".yml"):
            return report(_from_yaml(path, text, host, host_version))
        script = Script(text)
        found = [f for c in script.commands if (f := _launch(c.words, c, script)) is not None]
        name, folder, sourced = str(path), path.parent, tuple(script.sourced)
    else:
        words = tuple(Word(str(word)) for word in source)
        text = " ".join(word.text for word in words)
        one = _launch(words, None, None)
        found = [one] if one is not None else []
        name, folder, sourced = "the command", Path("."), ()
    found = [f for f in found if host is None or f.host == host]
    if not found:
        raise AuditError(f"{name}: no training command; klplug audits {_ACCEPTED}")
    if not 1 <= command <= len(found):
        raise AuditError(f"{name}: command {command} of {len(found)} does not exist")
    chosen = found[command - 1]
    setup = _setup(chosen, folder, host_version)
    environment = f"VERL_USE_EXTERNAL_MODULES={os.environ.get('VERL_USE_EXTERNAL_MODULES')}"
    if not (sourced or verl.loads_klplug(text) or verl.loads_klplug(environment)):
        setup = replace(setup, not_hooked=verl.not_hooked(setup))
    setup = replace(setup, cut=chosen.cut, line=chosen.line, commands=len(found), sourced=sourced)
    return replace(report(setup), command=command)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise AuditError(f"{path}: {path.stat().st_size} bytes are no training script")
        content = path.read_bytes()
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror or error}") from None
    if b"\0" in content:
        raise AuditError(f"{path}: not a text file")
    return content.decode("utf-8", errors="replace").replace("\r\n", "\n")


def _launch(words: Sequence[Word], at: Command | None, script: Script | None) -> _Found | None:
    """The training command among these words, behind whatever launcher."""
    for index, word in enumerate(words):
        match = _MAINS.match(word.text)
        if match is None:
            continue
        if match["other"]:
            raise AuditError(
                f"{word.text} is not audited: it has a trainer of its own; klplug audits "
                f"{_ACCEPTED}"
            )
        cut = script.cut_after(at) if script is not None and at is not None else None
        return _Found(
            host="verl" if match["verl"] else "openrlhf",
            args=tuple(words[index + 1 :]),
            through_klplug=bool(match["klplug"]),
            recipe="recipe" in word.text,
            line=None if at is None else at.line,
            cut=cut,
        )
    return None


def _setup(found: _Found, folder: Path, version: str | None) -> Setup:
    if found.host == "verl":
        launched = verl.with_files(verl.launch(found.args, folder, found.recipe))
        return _verl(launched, version)
    return _openrlhf(openrlhf.launch(found.args, found.through_klplug), version)


def _verl(launched: verl.Launch, version: str | None) -> Setup:
    table, origin = _table("verl", version, lambda t: len(verl.unknown_keys(t, launched)))
    return verl.setup(Settings(table, launched.written), launched, origin)


def _openrlhf(launched: openrlhf.Launch, version: str | None) -> Setup:
    table, origin = _table("openrlhf", version, lambda t: len(openrlhf.unknown_keys(t, launched)))
    return openrlhf.setup(table, launched, origin)


def _table(host: str, version: str | None, misses: Any) -> tuple[Table, str]:
    """The release to read a command by: the one asked for, or the first that fits it best."""
    if version is not None:
        table = given(host, version)
        return replace(table, version=version), "given"
    table = min(candidates(host), key=misses)
    return table, "installed" if table.installed else "guessed"


def _from_yaml(path: Path, text: str, host: str | None, version: str | None) -> Setup:
    """A config file on its own: verl's, or OpenRLHF's flags, nested or flat."""
    try:
        content = yaml.safe_load(text)
        lines = _key_lines(yaml.compose(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" on line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise AuditError(f"{path}: not valid YAML{where}: {problem}") from None
    if not isinstance(content, dict):
        raise AuditError(f"{path}: no settings; a config of verl's or of OpenRLHF's is a mapping")
    heads = {str(key).partition(".")[0] for key in content}
    if host is None and heads & {"actor_rollout_ref", "algorithm"}:
        host = "verl"
    if host is None and (
        heads & {"algo", "klplug"} or set(content) & {*openrlhf.FLAGS, *openrlhf.FLAGS.values()}
    ):
        host = "openrlhf"
    if host is None:
        raise AuditError(
            f"{path}: neither a config of verl's (actor_rollout_ref, algorithm) nor OpenRLHF's "
            f"flags (algo.kl.init_coef, ...); its keys are {', '.join(sorted(heads)[:8])}"
        )
    if host == "openrlhf":
        return _openrlhf(openrlhf.from_yaml(content, lines), version)
    written = verl.from_yaml(content, lines)
    launched = verl.Launch(written, frozenset(written), (), (), (), ())
    return _verl(launched, version)


def _key_lines(node: Any, prefix: str = "") -> dict[str, int]:
    """Dotted names to the lines they stand on."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}.{key.value}" if prefix else str(key.value)
            lines[name] = key.start_mark.line + 1
            lines |= _key_lines(value, name)
    return lines
