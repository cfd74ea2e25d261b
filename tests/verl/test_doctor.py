"""`klplug doctor` beside the real host: every hook, in a fresh process and in a Ray worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from klplug.cli.doctor import doctor
from recipes import cpu_shim


def test_every_hook_is_active_here_and_in_a_ray_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    for name, value in cpu_shim.environment("verl").items():
        monkeypatch.setenv(name, value)
    path = [str(root), str(root / "adapters"), os.environ["PYTHONPATH"]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.chdir(tmp_path)
    report = doctor().hosts["verl"]
    assert report.version is not None
    for kind in ("process", "ray_worker"):
        assert report.probes[kind].error is None, kind
        assert len(report.probes[kind].hooks) >= 5
        assert all(report.probes[kind].hooks.values()), (kind, report.probes[kind].hooks)
