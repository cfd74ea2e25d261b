"""What a checkpoint keeps of klplug: written whole or not at all, and read with one clear error."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


class StateError(ValueError):
    """What a checkpoint kept of klplug can't be read."""


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Put the file in place in one step: a run that ends here leaves the one before whole.

    Raises:
        OSError: names the file.
    """
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(json.dumps(state) + "\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"klplug can't save the state of its controller: {error.strerror}", path
        ) from None


def read(path: Path) -> Any:
    """What ``write`` put there; ``None`` where there is no such file.

    Raises:
        StateError: names the file, what is wrong and what to do.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path} is no whole JSON file ({error}), so the state of klplug's controller can't be "
            f"read. {WHAT_TO_DO}"
        ) from None


WHAT_TO_DO = (
    "Resume from another checkpoint; or delete the file, and the controller starts from kl_coef"
)


@dataclass(frozen=True)
class Reference:
    """A model that a run's KL is to, as its checkpoints remember it; or the answers of one.

    Attributes:
        path: as the host is given it, a folder or a name on the hub; a file of answers.
        weights: a digest of its weights, or of the file; ``None`` where this machine has neither.
        step: after which step it last followed the policy; ``None`` where it is as it was loaded.
    """

    path: str
    weights: str | None
    step: int | None = None

    @classmethod
    def of(cls, path: str) -> Reference:
        place = Path(path)
        if place.is_file():
            return cls(path, _digest({"": place}))
        found = place.iterdir() if place.is_dir() else ()
        weights = {p.name: p for p in sorted(found) if p.suffix in (".safetensors", ".bin")}
        return cls(path, _digest(weights) if weights else None)

    @property
    def kept(self) -> dict[str, Any]:
        """As a checkpoint has it."""
        step = {} if self.step is None else {"step": self.step}
        return {"path": self.path, "weights": self.weights, **step}

    def is_another_than(self, saved: Mapping[str, Any]) -> bool:
        """Whether a checkpoint was trained against other weights; its path where none are known.

        The same weights at another place are the same reference.
        """
        weights = saved.get("weights")
        if self.weights is None or weights is None:
            return bool(self.path != saved.get("path"))
        return bool(self.weights != weights)


def moved(models: dict[str, Reference], step: int) -> None:
    """The reference among a run's models has followed the policy after this step."""
    models["reference"] = replace(models["reference"], step=step)


_BLOCK, _BLOCKS = 1 << 16, 64


def _digest(files: Mapping[str, Path]) -> str:
    """Of every file its name, its size and blocks spread evenly over it.

    Training moves every weight, so a sample of them tells two models apart; reading all of a large
    model would take minutes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, file in files.items():
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
                content.seek(start)
                digest.update(content.read(_BLOCK))
    return digest.hexdigest()
