"""Whether what must be kept has room on this machine, asked before it is made."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def available() -> int | None:
    """Bytes of memory that a process could still have; ``None`` where the system does not say."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(kilobytes) * 1024 for _, kilobytes, _ in found), None)


def gigabytes(count: int) -> str:
    """As people read it."""
    return f"{count / 1e9:.3g} GB"


def check_room(name: str, tokens: int, each: int) -> None:
    """Raise a MemoryError that has the numbers in it, if ``tokens`` times ``each`` is too much."""
    free, needed = available(), tokens * each
    if free is not None and needed > free:
        raise MemoryError(
            f"{name} take {gigabytes(needed)} ({tokens} tokens of {each} bytes), and "
            f"{gigabytes(free)} are left on this machine. Sample fewer or shorter answers a step"
        )
