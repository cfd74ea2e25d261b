"""The locks of the GPU recipes, beside what a host's own wheel asks for."""

from __future__ import annotations

from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCKER = Path(__file__).parents[1] / "recipes" / "docker"
PLATFORM = {"python_version": "3.12", "python_full_version": "3.12.3"}


def pins(host: str) -> dict[str, str]:
    """Name and version of each line."""
    lines = (DOCKER / f"{host}.txt").read_text("utf-8").splitlines()
    split = [line.partition("==") for line in lines if not line.startswith("#")]
    assert all(version for _, _, version in split)
    return {canonicalize_name(name): version for name, _, version in split}


def unmet(host: str) -> list[str]:
    """What a host's installed wheel asks for, with the extras of ``HOST.in``, and is not so."""
    first = (DOCKER / f"{host}.in").read_text("utf-8").splitlines()[0]
    locked, left, found = pins(host), sorted(Requirement(first).extras), []
    seen: set[str] = set()
    while left:
        seen.add(extra := left.pop())
        for requirement in map(Requirement, requires(host) or []):
            marker = requirement.marker
            if marker is not None and not marker.evaluate({**PLATFORM, "extra": extra}):
                continue
            if canonicalize_name(requirement.name) == host:
                left += sorted(requirement.extras - seen)
                continue
            version = locked.get(canonicalize_name(requirement.name))
            if version is None or not requirement.specifier.contains(version):
                found.append(f"{requirement} ({version})")
    return found
