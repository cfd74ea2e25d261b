"""What `klplug doctor` says beside a real host: every hook, in a fresh process and in Ray's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from klplug.cli.doctor import doctor
from recipes import cpu_shim


def assert_every_hook_is_active(host: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    for name, value in cpu_shim.environment(host).items():
        monkeypatch.setenv(name, value)
    path = [str(root), str(root / "adapters"), os.environ["PYTHONPATH"]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.chdir(folder)
    report = doctor().hosts[host]
    assert report.version is not None
    for kind in ("process", "ray_worker"):
        assert report.probes[kind].error is None, kind
        assert len(report.probes[kind].hooks) >= 5
        assert all(report.probes[kind].hooks.values()), (kind, report.probes[kind].hooks)
