"""A reference that follows the policy: its weights on one rank, and what a checkpoint keeps."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from klplug.hosting.settings import SettingsError
from klplug.hosting.state import StateError


@dataclass
class Follower:
    """The reference's weights on one rank, by name, as they follow the policy's there.

    In 16 bits an average would stand still: a hundredth of a small difference is less than half of
    the last place. So such a reference is the rounded one of an average in float32 on the CPU.

    Attributes:
        decay: of the average; 0 where the reference becomes the policy.
        average: of the tensors that are in 16 bits.
    """

    decay: float
    average: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def follow(self, name: str, reference: Tensor, policy: Tensor) -> None:
        """Move one of the reference's tensors, in place."""
        if self.decay == 0:
            reference.copy_(policy)
            return
        if name not in self.average and _is_narrow(reference):
            self.average[name] = _wide(reference)
        own = self.average.get(name, reference)
        own.lerp_(policy.to(own), 1 - self.decay)
        if own is not reference:
            reference.copy_(own)

    @torch.no_grad()
    def restore(self, name: str, reference: Tensor, saved: Tensor) -> None:
        """Put what a checkpoint has in the place of one of the reference's tensors."""
        reference.copy_(saved)
        if self.decay and _is_narrow(reference):
            self.average[name] = _wide(saved)

    def kept(self, reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint needs: the averages, or the reference's own tensors; copies."""
        kept = {name: self.average.get(name, own) for name, own in reference.items()}
        return {name: own.detach().cpu().clone() for name, own in kept.items()}


def _is_narrow(tensor: Tensor) -> bool:
    return torch.promote_types(tensor.dtype, torch.float32) != tensor.dtype


def _wide(tensor: Tensor) -> Tensor:
    """A copy to average in, on the CPU."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


@dataclass(frozen=True)
class Place:
    """Where one of ``world`` ranks keeps its part of a reference that has moved."""

    folder: Path
    rank: int
    world: int

    PATTERN: ClassVar[str] = "klplug_reference_*.pt"

    @classmethod
    def of_this_rank(cls, folder: Path) -> Place:
        world = torch.distributed
        return cls(folder, world.get_rank(), world.get_world_size())

    @property
    def path(self) -> Path:
        return self.folder / f"klplug_reference_world_size_{self.world}_rank_{self.rank}.pt"

    def save(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Put the file in place at once; ``step`` is that of the last update."""
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            torch.save({"step": step, "weights": dict(weights)}, scratch)
            scratch.replace(self.path)
        finally:
            scratch.unlink(missing_ok=True)
        self._clear(f"klplug_reference_world_size_{self.world}_")

    def clear(self) -> None:
        """Take away what another run left here; this one's reference has not moved."""
        self._clear(None)

    def _clear(self, kept: str | None) -> None:
        """An earlier run may have come to this step too, and over other ranks."""
        if self.rank == 0:
            for file in self.folder.glob(self.PATTERN):
                if kept is None or not file.name.startswith(kept):
                    file.unlink(missing_ok=True)

    def load(self, held: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
        """The step of the last update, and the weights by name.

        Args:
            held: what this rank has of the reference, which the file must fit.

        Raises:
            StateError: names the file that is missing, is not whole, or is of another model.
        """
        step, saved = self._read()
        for name in (*held, *(name for name in saved if name not in held)):
            here, there = (
                _shape(tuple(side[name].shape) if name in side else None) for side in (held, saved)
            )
            if here != there:
                raise StateError(
                    f"{self.path} is of another reference, or cut otherwise: of {name} it has "
                    f"{there}, and this process {here}. Resume with the architecture, the sharding "
                    "and as many processes as saved it"
                )
        return step, saved

    def _read(self) -> tuple[int, dict[str, Tensor]]:
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            return int(saved["step"]), saved["weights"]
        except FileNotFoundError:
            there = ", ".join(sorted(p.name for p in self.folder.glob(self.PATTERN)))
            raise StateError(
                f"{self.path} is missing, and the reference of this checkpoint had moved"
                f"{f' (there: {there})' if there else ''}. {WHAT_TO_DO}"
            ) from None
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            why = str(error).partition("\n")[0]
            raise StateError(f"{self.path} can't be read ({why}). {WHAT_TO_DO}") from None


WHAT_TO_DO = "Resume from another checkpoint, with as many processes as saved it"


Shapes = Mapping[str, tuple[int, ...]]


def check_alike(policy: Shapes, reference: Shapes) -> None:
    """Stop unless both models have the same tensors, as far as this process knows them.

    Raises:
        SettingsError: names the first tensor that differs.
    """
    for name in (*policy, *(name for name in reference if name not in policy)):
        own, other = policy.get(name), reference.get(name)
        if own != other:
            raise SettingsError(
                f"klplug.ref_update: the reference can't follow the policy: of {name} the policy "
                f"has {_shape(own)} here and the reference {_shape(other)}. Both must be of one "
                "architecture, and cut alike over processes"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))
