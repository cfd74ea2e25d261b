"""The audit on public training scripts, beside real bash.

``python -m tests.audit.corpus FOLDER`` takes a folder of checkouts, one folder each, and prints a
table: scripts read, verdicts, agreement with bash, time. With ``--rows FILE`` it writes what it
found, a line of JSON per script: facts, and nothing of the text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from klplug.audit import AuditError, audit
from klplug.audit.shell import Command, Script, Word
from tests.audit.box import bash, namespaces

_SUFFIXES = (".sh", ".bash", ".slurm", ".sbatch")
# A command that trains: by its entry point, or by what it sets.
ENTRY = re.compile(
    r"(?:.*[./])?(?:main_ppo\w*|main_dapo|main_\w+|train_ppo\w*|train_grpo\w*|\w*_main|klplug_openrlhf)"
    r"(?:\.py)?|klplug_openrlhf"
)
_SETS = re.compile(
    r"\+{0,2}(actor_rollout_ref|algorithm|critic|trainer|data)\.\w[\w.]*=|--(pretrain|init_kl_coef"
    r"|algo\.|actor\.|advantage_estimator|reward_pretrain|n_samples_per_prompt)"
)
_MENTIONS = re.compile(
    r"main_ppo|train_ppo|actor_rollout_ref|init_kl_coef|algorithm\.adv_estimator|algo\.kl\."
)
# What bears on the KL, in either host.
KEYS = re.compile(
    r"\+{0,2}(?P<key>[\w.]*(?:kl|adv_estimator|ppo_mini_batch_size|ppo_epochs|train_batch_size"
    r"|rollout\.n|loss_mode|loss_agg_mode|rollout_is|norm_adv_by_std)[\w.]*)=(?P<value>.*)$|"
    r"--(?P<flag>[\w.]*(?:kl|estimator|batch_size|max_epochs|n_samples|n_agent)[\w.]*)(?:=(?P<v>.*))?$",
    re.DOTALL,
)


@dataclass
class Row:
    """What is known of one script."""

    repository: str
    commit: str
    path: str
    commands: int = 0  # commands that train, as bash passes them
    settings: list[str] = field(default_factory=list)  # digests, one per command
    agrees: bool | None = None
    why: str = ""
    verdict: list[str | None] = field(default_factory=list)
    error: str = ""
    milliseconds: float = 0.0
    unknown: int = 0
    unreached: int = 0


def scripts(checkout: Path) -> Iterator[Path]:
    """Shell scripts that set what a trainer reads."""
    for path in sorted(checkout.rglob("*")):
        small = path.suffix in _SUFFIXES and path.is_file() and path.stat().st_size < 200_000
        if small and _MENTIONS.search(path.read_text(errors="replace")):
            yield path


def trains(words: Sequence[str]) -> bool:
    sets = sum(1 for word in words if _SETS.match(word))
    return sets >= 3 or (sets > 0 and any(ENTRY.fullmatch(word) for word in words))


def same(read: Sequence[Word], ran: Sequence[str]) -> bool:
    """Word by word; one that is not known may be any, or none."""
    met = {0}
    for word in read:
        if word.unknown:
            met |= {at + 1 for at in met if at < len(ran)}
        else:
            met = {at + 1 for at in met if at < len(ran) and ran[at] == word.text}
        if not met:
            return False
    return len(ran) in met


def settings(words: Sequence[str]) -> list[str]:
    """The words that bear on the KL, sorted; of a flag, its value too."""
    found = []
    for at, word in enumerate(words):
        match = KEYS.fullmatch(word)
        if match is None:
            continue
        if match["flag"] and match["v"] is None:
            after = words[at + 1] if at + 1 < len(words) else ""
            word = word if after.startswith("--") else f"{word} {after}"
        found.append(word)
    return sorted(found)


def digest(words: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(settings(words)).encode()).hexdigest()[:12]


def compared(read: Sequence[Command], ran: Sequence[Sequence[str]]) -> tuple[bool, str]:
    """Whether bash's training commands are those that were read; some run side by side."""
    left = list(ran)
    for command in read:
        if not (command.reached and trains([w.text for w in command.words])):
            continue
        ways = command.alternatives()
        real = next((r for r in left if any(same(words, r) for words in ways)), None)
        if real is not None:
            left.remove(real)
        elif command.sure:
            texts = [w.text for w in command.words]
            closest = max(left, key=lambda r: len({*r} & {*texts}), default=None)
            if closest is None:
                return False, f"read on line {command.line}, not run"
            odd = [t for t in texts if t not in closest][:2]
            other = [w for w in closest if w not in texts][:2]
            return False, f"line {command.line}: read {odd}, bash {other}"
    return (False, f"run, not read: {' '.join(left[0])[:80]}") if left else (True, "")


def checked(checkout: Path, commit: str) -> list[Row]:
    repository = checkout.name.replace("+", "/")
    rows, read, paths, stand_ins = [], [], list(scripts(checkout)), set()
    for path in paths:
        row = Row(repository, commit, str(path.relative_to(checkout)))
        text = path.read_text(errors="replace").replace("\r\n", "\n")
        started = time.process_time()
        commands: list[Command] = []
        try:
            script = Script(text, path.parent)
            commands = script.commands
            row.unreached = len(script.unreached())
            row.error = str(script.broken or "")
        except AuditError as error:
            row.error = str(error)
        row.milliseconds = round(1000 * (time.process_time() - started), 1)
        for command in commands:
            if command.words[0].text.startswith("/") and not command.words[0].unknown:
                stand_ins.add(command.words[0].text)
        try:
            number, total = 1, 1
            while number <= total:
                report = audit(path, command=number)
                total = min(report.commands, 20)
                row.verdict.append(report.gradient)
                number += 1
        except AuditError as error:
            row.error = row.error or str(error).replace(str(path), "FILE")
        rows.append(row)
        read.append(commands)
    if namespaces() and paths:
        texts = [path.read_text(errors="replace").replace("\r\n", "\n") for path in paths]
        usable = sorted(s for s in stand_ins if re.fullmatch(r"/[\w./-]+", s) and ".." not in s)
        ran = bash(
            texts, lenient=True, tree=checkout, stand_ins=usable,
            files=[str(path.relative_to(checkout)) for path in paths],
        )  # fmt: skip
        for row, commands, real in zip(rows, read, ran, strict=True):
            training = [c for c in real.commands if trains(c)]
            row.commands = len(training)
            row.settings = [digest(c) for c in training]
            row.agrees, row.why = compared(commands, training)
    elif paths:
        print("NO NAMESPACES HERE: real scripts are not run, nothing is compared", file=sys.stderr)
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| project | scripts | reach bash | read alike | verdict | refused | ms a script |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.repository, []).append(row)
    for name, group in [*groups.items(), ("all", list(rows))]:
        run = [r for r in group if r.commands]
        lines.append(
            f"| {name} | {len(group)} | {len(run)} | {sum(1 for r in run if r.agrees)} "
            f"| {sum(1 for r in group if r.verdict and None not in r.verdict)} "
            f"| {sum(1 for r in group if r.error)} "
            f"| {sum(r.milliseconds for r in group) / max(len(group), 1):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    commits: dict[str, Any] = {}
    if (given.folder / "COMMITS").is_file():
        commits = dict(line.split() for line in (given.folder / "COMMITS").read_text().splitlines())
    rows: list[Row] = []
    for checkout in sorted(p for p in given.folder.iterdir() if p.is_dir()):
        if given.only in checkout.name:
            rows += checked(checkout, commits.get(checkout.name, ""))
    print(table(rows))
    reasons = Counter(re.sub(r"\d+", "N", r.why)[:60] for r in rows if r.agrees is False)
    for reason, number in reasons.most_common(25):
        print(f"{number:5d}  {reason}")
    if given.rows:
        given.rows.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
