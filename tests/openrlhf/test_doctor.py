"""`klplug doctor` beside the real host."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doctored import assert_every_hook_is_active


def test_every_hook_is_active_here_and_in_a_ray_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_every_hook_is_active("openrlhf", tmp_path, monkeypatch)
