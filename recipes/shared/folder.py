"""The folder of a run: taken for one record of settings, refused where it holds anything else."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


class FolderError(ValueError):
    """The folder cannot be used; the message is all one needs."""


def claim(folder: Path, record: str, settings: Record, option: str, what: str) -> None:
    """Take a folder that is new or empty, or that holds the same settings.

    Args:
        folder: Made if need be.
        record: The file in it that holds the settings.
        settings: What makes two of them the same.
        option: The folder as the user wrote it, for messages.
        what: That is in such a folder, for messages.

    Raises:
        FolderError: The folder holds other settings, or something else.
    """
    settings = json.loads(json.dumps(settings))  # as it will be read
    earlier = held(folder, record, option, what)
    if earlier is not None and earlier != settings:
        raise other(earlier, settings, option, what)
    keep(folder, record, settings)


def held(folder: Path, record: str, option: str, what: str) -> dict[str, Any] | None:
    """What the record of a folder says; `None` where the folder is new or empty.

    Raises:
        FolderError: It holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{option}: is a file")
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    try:
        found = json.loads((folder / record).read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise FolderError(f"{option}: not empty, and no {what}")
    return found


def other(earlier: Record, settings: Record, option: str, what: str) -> FolderError:
    """That a folder holds other settings, and which."""
    before, now = flat(earlier), flat(settings)
    keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    differ = ", ".join(f"{key[-1]}={before.get(key)} there, {now.get(key)} here" for key in keys)
    return FolderError(f"{option} holds another {what} ({differ}). Give another folder")


def flat(settings: Record) -> dict[tuple[str, ...], Any]:
    """The settings by name, those of a section by its name too."""
    places: dict[tuple[str, ...], Any] = {}
    for key, found in settings.items():
        if isinstance(found, dict):
            places |= {(key, name): value for name, value in found.items()}
        else:
            places[key,] = found
    return places


def keep(folder: Path, record: str, settings: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / record).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
