"""Commands are run as a user runs them, but in this process: a new one would load torch again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from klplug.cli import main


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


Klplug = Callable[..., Done]


@pytest.fixture
def klplug_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Klplug:
    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["klplug", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Done(int(end.value.code or 0), captured.out, captured.err)

    return run
