"""The list of mutants fits the code; ``python -m tests.mutants`` makes them."""

from __future__ import annotations

from pathlib import Path

from tests.mutants import Mutant
from tests.mutants.core import CORE
from tests.mutants.hosts import HOSTS

ROOT = Path(__file__).parents[2]


def test_each_mistake_has_its_line_and_its_tests() -> None:
    """A row whose line was moved or split would never be made, and would look noticed."""
    rows = (*CORE, *HOSTS)
    assert len(set(rows)) == len(rows) > 150
    assert [mutant.name for mutant in rows if not mutant.fits(ROOT)] == []
    files = {name.partition("::")[0] for mutant in rows for name in mutant.tests}
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_a_row_that_matches_nothing_or_twice_is_no_mutant(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1\nb = 1\n")
    assert Mutant("code.py", "a = 1", "a = 2", ()).fits(tmp_path)
    assert not Mutant("code.py", "= 1", "= 2", ()).fits(tmp_path)
    assert not Mutant("code.py", "a = 3", "a = 2", ()).fits(tmp_path)
    assert not Mutant("gone.py", "a = 1", "a = 2", ()).fits(tmp_path)
