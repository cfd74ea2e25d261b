"""Wheels of other host releases: had whole, or a failure that names them."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests import releases


def test_a_wheel_is_downloaded_once_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[-1])
        folder = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(folder / "host-1.2-py3-none-any.whl", "w") as wheel:
            for name in (
                "host/__init__.py",
                "host-1.2.data/purelib/host/pure.py",
                "host-1.2.data/purelib/tests/__init__.py",
                "tests/__init__.py",
                "host-1.2.dist-info/METADATA",
            ):
                wheel.writestr(name, "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(releases, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(subprocess, "run", pip)
    one, other = (releases.release("host", "1.2") for _ in range(2))
    assert asked == ["host==1.2"]
    assert one == other == tmp_path / "wheels" / "host-1.2"
    assert sorted(path.name for path in one.iterdir()) == ["host", "host-1.2.dist-info"]
    assert sorted(path.name for path in (one / "host").iterdir()) == ["__init__.py", "pure.py"]


def test_a_wheel_that_is_not_to_be_had_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "No matching distribution found")

    monkeypatch.setattr(releases, "WHEELS", tmp_path)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(RuntimeError, match=r"(?s)wheel of host 1\.2 .*No matching"):
        releases.release("host", "1.2")
    assert not list(tmp_path.iterdir())
