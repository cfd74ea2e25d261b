"""The verdict on scripts in the shape of the hosts' public examples, against one made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from klplug.audit import audit
from tests.audit.verdicts import SCRIPTS, VERDICTS, findings_table, markdown

DOCS = Path(__file__).parents[2] / "docs"


def test_every_script_has_a_verdict() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.sh")} == set(VERDICTS)


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(name: str) -> None:
    expected, report = VERDICTS[name], audit(SCRIPTS / f"{name}.sh")
    assert report.host == name.partition("-")[0]
    assert (report.gradient, report.scope) == (expected.gradient, expected.scope)
    assert (report.updates_per_rollout, report.corrected) == (expected.updates, expected.corrected)
    for got, wanted in (
        (report.beta_absolute, expected.absolute),
        (report.beta_relative, expected.relative),
    ):
        assert got == (pytest.approx(wanted, rel=1e-12) if isinstance(wanted, float) else wanted)
    assert report.kl_type == expected.kl_type
    grave = [f.id for f in report.findings if f.severity != "info"]
    assert sorted(grave) == sorted(expected.findings)
    assert not report.unknown


@pytest.mark.parametrize("table", [markdown(), findings_table()], ids=["verdicts", "findings"])
def test_docs_hold_the_tables(table: str) -> None:
    # python -m tests.audit.verdicts prints them.
    assert table in (DOCS / "audit.md").read_text()


def test_docs_name_every_key_of_the_json() -> None:
    document, page = audit(SCRIPTS / "verl-grpo.sh").to_json(), (DOCS / "audit.md").read_text()
    assert not [key for key in (*document, *document["findings"][0]) if f"`{key}`" not in page]
