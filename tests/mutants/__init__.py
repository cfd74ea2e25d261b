"""Mutants: one wrong line each, which a test must notice. ``python -m tests.mutants``.

A list that is fixed, not drawn: each row is a mistake that somebody could make, and the tests that
are there to stop it. Each is made in a copy of the tree, never in the tree itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """``old`` in ``file``, where it stands once, replaced by ``new``.

    Attributes:
        host: whose environment the tests run in; empty for the core's.
        tests: what is given to pytest, in the order of what notices first.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    host: str = ""

    @property
    def name(self) -> str:
        (was, *_), (now, *_) = self.old.strip().splitlines(), [*self.new.strip().splitlines(), ""]
        return f"{self.file}: {was}  ->  {now or 'nothing'}"

    def fits(self, tree: Path) -> bool:
        """Whether what it replaces stands in ``tree`` once, so that there is a mistake to make."""
        path = tree / self.file
        return path.is_file() and path.read_text().count(self.old) == 1

    def changed(self, text: str) -> str:
        """The file's text with the mistake in it."""
        return text.replace(self.old, self.new)
