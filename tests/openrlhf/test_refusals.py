"""One list of refusals: what a run is refused for, its audit says in the same words."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from klplug_openrlhf import command, reading
from klplug_openrlhf.launcher import add_options, written_options
from klplug_openrlhf.refusals import ROWS
from klplug_openrlhf.settings import derive

from klplug.audit import audit
from klplug.audit.settings import Launch, Settings
from klplug.audit.shell import Word
from klplug.audit.tables import installed
from klplug.hosting.host import hosts
from tests.audit.verdicts import SCRIPTS
from tests.openrlhf.own_parser import parser
from tests.openrlhf.test_audit import package, words
from tests.openrlhf.test_launcher import KL, MISTAKES, UNSERVED

MAIN = ["python", "-m", "klplug_openrlhf"]
# As the launcher's tests have them.
DEFAULTS = [
    *("--vllm.num_engines", "1", "--algo.advantage.estimator", "group_norm"),
    *("--rollout.n_samples_per_prompt", "8"),
]
COMMANDS = [
    *(list(words) for words, _ in MISTAKES),
    *(["--klplug.kl_type", kl, "--klplug.kl_coef", "0.1", *words] for kl, words, _ in UNSERVED),
]


def derived(flags: list[str]) -> tuple[Namespace, str]:
    """What the launcher makes of OpenRLHF's own parser, and the line it prints."""
    theirs = parser(package())
    theirs._option_string_actions["--algo.kl.estimator"].choices = None
    add_options(theirs)
    args = theirs.parse_args(flags)
    written = vars(args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["klplug_openrlhf", *flags])
        given = written_options(theirs)
    line = derive(args, given)
    return Namespace(**written), line


def refusals(flags: list[str]) -> list[str]:
    found = [f for f in audit([*MAIN, *flags]).findings if f.id == "klplug-refuses"]
    return [finding.message.removeprefix("klplug refuses to start: ") for finding in found]


@pytest.mark.parametrize("flags", COMMANDS, ids=" ".join)
def test_the_audit_refuses_what_the_run_refuses_with_the_same_words(flags: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        derived([*DEFAULTS, *flags])
    assert f"{str(error.value).rstrip('.')}." in refusals([*DEFAULTS, *flags])


@pytest.mark.parametrize(
    "flags",
    [
        [*KL],
        [*KL, "--algo.kl.estimator", "k3", "--algo.kl.use_loss"],
        ["--klplug.kl_type", "k1_in_reward,baseline=group", *KL[2:]],
        ["--klplug.kl_type", "none", "--algo.kl.init_coef", "0.1"],
    ],
    ids=" ".join,
)
def test_the_audit_refuses_nothing_that_starts(flags: list[str]) -> None:
    derived([*DEFAULTS, *flags])
    assert refusals([*DEFAULTS, *flags]) == []


def settings(flags: list[str]) -> Settings:
    table = installed("openrlhf")
    assert table is not None
    launch = Launch(tuple(Word(word) for word in [*MAIN, *flags]), 2, Path("."))
    return reading.settings(table, command.parsed(launch))


def test_every_row_is_among_the_mistakes() -> None:
    reached = {
        refusal.id
        for flags in COMMANDS
        for refusal in hosts()["openrlhf"].refused(settings([*DEFAULTS, *flags]))
    }
    assert reached - {"asked"} == {row.__name__ for row in ROWS}


# The others are for a release that is not the one installed.
DOTTED = [p for p in sorted(SCRIPTS.glob("openrlhf-*.sh")) if "--algo." in p.read_text()]
AS_THEY_ARE = [p for p in DOTTED if "klplug" not in p.stem]


@pytest.mark.parametrize("path", DOTTED, ids=lambda path: path.stem)
def test_advice_once_taken_is_accepted(path: Path) -> None:
    said = audit(path)
    if said.after is None:
        assert said.recommended == "none"
        return
    at = said.after.index("klplug_openrlhf")
    args, line = derived(list(said.after[at + 1 :]))
    assert vars(args)["klplug.kl_type"] == said.recommended
    assert "overrides" not in line  # all that is overridden was deleted
    again = audit(said.after)
    assert again.kl_type == said.recommended
    assert "klplug-refuses" not in [finding.id for finding in again.findings]


@pytest.mark.parametrize(
    "path", [p for p in DOTTED if "klplug" not in p.stem], ids=lambda p: p.stem
)
def test_the_words_of_the_advice_start_the_script_as_it_is(path: Path) -> None:
    """A person adds them and changes the trainer, and deletes nothing."""
    said = audit(path)
    if said.after is None:
        return
    added = said.after[said.after.index("--klplug.kl_type") :]
    args, _ = derived([*(word.text for word in words(path)), *added])
    assert vars(args)["klplug.kl_type"] == said.recommended
