"""The contract: what klplug knows of a host lives with that host, and is asked by all who need it.

A host is one row of the entry-point group ``klplug.hosts``. The row has plain words, and names the
modules that know the rest; nothing of them, nor of the host, is loaded before it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import klplug
from klplug.hosting.refusals import Refusal
from klplug.hosting.settings import Asked, Edit, Settings, Unknown
from klplug.samples import described
from klplug.spec import KLSpec

if TYPE_CHECKING:
    from klplug.hosting.patching import Patch

GROUP = "klplug.hosts"


def _everywhere(spec: KLSpec) -> str:
    return "yes"


def of_teacher(spec: KLSpec) -> str:
    """Under which setting a KL to a teacher is served; empty where there is none."""
    if "teacher_log_probs" not in spec.requires:
        return ""
    alone = "ref_log_probs" not in spec.requires
    return "with klplug.teacher" + (", beside a term to ref" if alone else "")


def _no_problems(environment: Mapping[str, str], version: str | None) -> list[str]:
    return []


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        name: its package, which is also its distribution.
        title: its name as people write it.
        tested: the releases that klplug was tested with, the newest first.
        adapter: klplug's package for it, with its rooms: ``plan`` and ``refusals``;
            ``command``, ``reading``, ``edit`` and ``sources`` where the audit serves it;
            ``tables/``, a file per release.
        packages: all of klplug's packages for it, which a directory of that name would hide.
        trainers: patterns of the words that start a trainer klplug serves.
        other_trainers: patterns of those that start one it does not.
        marks: pattern of an argument that only a training command of it, or of a fork, has.
        prints: pattern of an argument with which it prints something, and trains nothing.
        launcher: klplug's own launcher, a word in the place of such a trainer's.
        command: how a training command is written, for messages.
        config: what a config file of it is called and has, for messages.
        patch: ``module:name`` of its hooks; ``None`` for a host that is only audited.
        setup: ``module.function`` by which a process installs klplug; ``None`` where the host
            loads it by itself.
        variables: of the environment, those that decide whether klplug is loaded.
        served: whether a ``kl_type`` is served: ``yes``, or under which setting.
        problems: what stands in klplug's way, from environment and installed version.
        stock: by placement, its own names to the ``kl_type`` with the same gradient.
        tags: by name of a metric, the tags that it logs that under.
    """

    name: str
    title: str
    tested: tuple[str, ...]
    adapter: str
    packages: tuple[str, ...]
    trainers: tuple[str, ...]
    command: str
    other_trainers: tuple[str, ...] = ()
    marks: str | None = None
    prints: str = "(?!)"
    launcher: str | None = None
    config: str = ""
    patch: str | None = None
    setup: str | None = None
    variables: tuple[str, ...] = ()
    served: Callable[[KLSpec], str] = _everywhere
    problems: Callable[[Mapping[str, str], str | None], list[str]] = _no_problems
    stock: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def room(self, name: str) -> Any:
        """A module of the adapter, loaded now."""
        return importlib.import_module(f"{self.adapter}.{name}")

    @property
    def hooks(self) -> Patch | None:
        """Its hooks, which loads what they need."""
        if self.patch is None:
            return None
        module, _, name = self.patch.partition(":")
        patch: Patch = getattr(importlib.import_module(module), name)
        return patch

    @property
    def tables(self) -> Path:
        """The folder of what its releases know."""
        return Path(importlib.import_module(self.adapter).__path__[0], "tables")

    @property
    def tested_text(self) -> str:
        """The tested releases in a sentence."""
        *others, last = self.tested
        return f"{', '.join(others)} and {last}" if others else last

    def starts(self, word: str) -> bool:
        """Whether a word of a command starts a trainer that klplug serves."""
        return word == self.launcher or self._starting.fullmatch(word) is not None

    def marked(self, word: str) -> bool:
        """Whether an argument is one that only its training commands have."""
        return self._marking.match(word) is not None

    @functools.cached_property
    def _starting(self) -> re.Pattern[str]:
        return re.compile("|".join(self.trainers))

    @functools.cached_property
    def _marking(self) -> re.Pattern[str]:
        return re.compile(self.marks or "(?!)")

    def has_another(self, word: str) -> bool:
        """Whether a word of a command starts a trainer that klplug does not serve."""
        return any(re.fullmatch(p, word) for p in self.other_trainers)

    def refused(self, settings: Settings) -> Iterator[Refusal]:
        """Why klplug would not start a run with these settings, as far as they are known."""
        try:
            plan: Asked | None = self.room("plan").asked(settings)
        except Unknown:
            return
        except ValueError as error:
            yield Refusal("asked", None, str(error))
            return
        if plan is not None:
            yield from self.room("refusals").refusals(plan, settings)

    def noted(self, settings: Settings, through_klplug: bool) -> Iterator[Refusal]:
        """What is said of a run that starts: by klplug's process, or of the host's own KL."""
        try:
            plan = self.room("plan").asked(settings) if through_klplug else None
        except (Unknown, ValueError):
            return
        yield from self.room("notes").notes(plan, settings)

    def edit(self, kl_type: str, kl_coef: str, settings: Any) -> list[Edit]:
        """What to delete from a command and what to add, so that it follows ``kl_type``."""
        edits: list[Edit] = self.room("edit").edit(kl_type, kl_coef, settings)
        return edits


@functools.cache
def hosts() -> dict[str, Host]:
    """Every host that klplug has an adapter for here, by name."""
    rows: list[Host] = [entry.load() for entry in importlib.metadata.entry_points(group=GROUP)]
    return {row.name: row for row in sorted(rows, key=lambda row: row.name)}


def announce(process: str, spec: KLSpec, kl_coef: float) -> None:
    """The one line by which a process says that klplug is active in it."""
    print(
        f"klplug {klplug.__version__} active in {process} (pid {os.getpid()}): "
        f"kl_type={spec} kl_coef={kl_coef:g}{described(spec)}",
        flush=True,
    )
