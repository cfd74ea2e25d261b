"""The audit on public training scripts, beside real bash.

``python -m tests.audit.corpus FOLDER`` takes a folder of checkouts, OWNER+NAME each, and prints a
table: scripts read, verdicts, agreement with bash, time. ``--rows FILE`` writes what was found, a
line of JSON per script; ``--facts`` writes ``corpus.jsonl``, of scripts whose right verdict is
known, and the page made of it. Facts alone are kept, nothing of a script's text.
``python -m tests.audit.corpus`` makes the page again from ``corpus.jsonl``.
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

from klplug.audit import AuditError
from klplug.audit.command import audits
from klplug.audit.shell import Command, Script, Word
from tests.audit.box import bash, namespaces
from tests.audit.right import right

_SUFFIXES = (".sh", ".bash", ".slurm", ".sbatch")
# A command that trains: by its entry point, or by what it sets.
ENTRY = re.compile(
    r"(?:.*[./])?(?:main_ppo\w*|main_dapo|main_\w+|train_ppo\w*|train_grpo\w*|\w*_main|klplug_openrlhf)"
    r"(?:\.py)?|klplug_openrlhf"
)
# One that samples or evaluates with a trainer's settings.
_GENERATES = re.compile(r"(?:.*[./])?(?:main_generation\w*|main_eval\w*|eval_\w+)(?:\.py)?")
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
    asked: list[str | None] = field(default_factory=list)  # of commands that nobody runs unasked
    right: list[str | None] = field(default_factory=list)  # in the order of settings
    updates: list[int | None] = field(default_factory=list)
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
    if any(_GENERATES.fullmatch(word) for word in words):
        return False
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
            for report in audits(path):
                (row.verdict if report.reached else row.asked).append(report.gradient)
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
            told = [
                right(row.repository, checkout, checkout / row.path, words) for words in training
            ]
            row.right = [gradient for gradient, _ in told]
            row.updates = [number for _, number in told]
            row.agrees, row.why = compared(commands, training)
    elif paths:
        print("NO NAMESPACES HERE: real scripts are not run, nothing is compared", file=sys.stderr)
    return rows


def decided(row: Row) -> bool:
    """Whether there is a verdict on each of its commands."""
    given = [*row.verdict, *row.asked]
    return bool(given) and None not in given


def judged(row: Row) -> bool:
    """Whether the right verdict on each of its commands is known, and one was given on each."""
    known = bool(row.right) and None not in row.right
    return known and bool(row.verdict) and None not in row.verdict


def wrong(row: Row) -> bool:
    """A verdict that is not the right one."""
    # The audit's word for what goes away from the reference.
    right = ["neither" if gradient == "away" else gradient for gradient in row.right]
    return judged(row) and Counter(row.verdict) != Counter(right)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| project | scripts | reach bash | read alike | verdict | right known | wrong | refused "
        "| ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.repository, []).append(row)
    for name, group in [*groups.items(), ("all", list(rows))]:
        run = [r for r in group if r.commands]
        lines.append(
            f"| {name} | {len(group)} | {len(run)} | {sum(1 for r in run if r.agrees)} "
            f"| {sum(1 for r in group if decided(r))} "
            f"| {sum(1 for r in group if judged(r))} | {sum(1 for r in group if wrong(r))} "
            f"| {sum(1 for r in group if r.error)} "
            f"| {sum(r.milliseconds for r in group) / max(len(group), 1):.1f} |"
        )
    return "\n".join(lines)


FACTS = Path(__file__).with_name("corpus.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "state-of-the-field.md"


def facts(rows: Sequence[Row]) -> str:
    """A line for each script that bash and the audit read alike and whose verdict is known."""
    lines = []
    for row in rows:
        if row.agrees and row.right and None not in row.right:
            kept = {name: getattr(row, name) for name in ("repository", "commit", "path")}
            kept |= {"kl": row.settings, "right": row.right, "updates": row.updates}
            lines.append(json.dumps(kept))
    return "".join(f"{line}\n" for line in lines)


_WORDS = {
    "none": "no KL at all",
    "reverse": "reverse: KL(pi\\|\\|ref), what people mean by the KL penalty",
    "forward": "forward: KL(ref\\|\\|pi) of each token; k3 as a loss, which verl clamps at 10, so "
    "that it has a dead zone, or a distillation's KL over the teacher's likeliest tokens",
    "zero": "zero: k1 as a loss",
    "neither": "neither: a KL to the policy that made the samples (RPG)",
    "away": "away from the reference: the loss is subtracted (verl 0.1)",
}


def page(known: Sequence[dict[str, Any]]) -> str:
    """The page on what public scripts ask for."""
    commands = [
        (row["repository"], kl, right, updates)
        for row in known
        for kl, right, updates in zip(row["kl"], row["right"], row["updates"], strict=True)
    ]
    distinct = list(dict.fromkeys((kl, right, updates) for _, kl, right, updates in commands))
    counts, single = (Counter(c[at] for c in group) for group, at in ((commands, 2), (distinct, 1)))
    loss = ("forward", "zero", "away")
    reused = [c for c in commands if c[2] in loss and c[3] is not None]
    more = sum(1 for c in reused if c[3] > 1)
    rows = "\n".join(
        f"| {_WORDS[name]} | {number} | {single[name]} |" for name, number in counts.most_common()
    )
    return f"""# The state of the field

What the KL term of public training scripts does, as their own release of the host computes it.

Real bash ran {len(known)} scripts of {len({row["repository"] for row in known})} repositories, in a
namespace of its own. Stand-ins took the place of every program. The words that reached the
trainer, and the defaults of the release beside the script, decide the gradient. No verdict of
klplug's audit is used. The scripts hold {len(commands)} training commands. Many are copies of
examples: {len(distinct)} of them differ in what bears on the KL.

| gradient of the KL term | commands | different ones |
| --- | ---: | ---: |
{rows}

{len(reused)} commands have a KL in the loss that is not the reverse one. Of these {more} make more
than one update on a rollout. Neither host weights such a KL for the samples of an older policy.

## How it was made, and what it leaves out

- `python -m tests.audit.corpus FOLDER --facts` makes the table `tests/audit/corpus.jsonl` from a
  folder of checkouts, and this page. Each row has repository, commit and path, so that anyone can
  look.
- A script counts if the audit reads it as bash does, and if its verl was compared with a release.
  Forks with a loss of their own, and commands whose configuration file is not read, are left out.
- The hosts' own examples are most of it. What people run behind closed doors is not in it.
- Settings say what a run was asked for, not what it did to the model.
"""


def written_facts() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FACTS.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--facts", action="store_true")
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    rows: list[Row] = []
    if given.folder is not None:
        commits: dict[str, str] = {}
        if (given.folder / "COMMITS").is_file():
            lines = (given.folder / "COMMITS").read_text().splitlines()
            commits = dict(line.split() for line in lines)
        for checkout in sorted(p for p in given.folder.iterdir() if p.is_dir()):
            if given.only in checkout.name:
                rows += checked(checkout, commits.get(checkout.name, ""))
        print(table(rows))
        reasons = Counter(re.sub(r"\d+", "N", r.why)[:60] for r in rows if r.agrees is False)
        for reason, number in reasons.most_common(25):
            print(f"{number:5d}  {reason}")
    if given.rows:
        given.rows.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    if given.facts:
        FACTS.write_text(facts(rows))
    if given.facts or given.folder is None:
        PAGE.write_text(page(written_facts()))


if __name__ == "__main__":
    main()
