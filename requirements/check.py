"""Before an environment is made: can it be? `python3 requirements/check.py FILE FOLDER GIGABYTES`.

FILE is the lock, whose first lines say which Python it is for. Needs nothing but that Python.
"""

import re
import shutil
import sys
from pathlib import Path


def problems(lock: str, version: tuple[int, ...], free: float, needed: float) -> list[str]:
    """What stands in the way, a line each.

    Args:
        lock: its text.
        version: of the Python that would make the environment.
        free: gigabytes on its disk.
        needed: gigabytes that it takes.
    """
    found = []
    asked = re.search(r"Python (3\.\d+)", lock)
    here = ".".join(map(str, version[:2]))
    if asked is not None and here != asked[1]:
        found.append(
            f"this is Python {here}, and the lock is for {asked[1]}: make PYTHON=python{asked[1]}"
        )
    if free < needed:
        found.append(f"{free:.1f} GB are free here, and the environment takes {needed:g} GB")
    return found


def main() -> None:
    lock, folder, needed = sys.argv[1:]
    free = shutil.disk_usage(folder).free / 1e9
    found = problems(Path(lock).read_text("utf-8"), sys.version_info[:2], free, float(needed))
    for problem in found:
        print(f"make: error: {problem}", file=sys.stderr)
    raise SystemExit(2 if found else 0)


if __name__ == "__main__":
    main()
