"""Time and memory of a function, measured the same way for both sides of a comparison."""

from __future__ import annotations

import os
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seconds(function: Callable[[], object]) -> float:
    """One call, until its work on the device is done."""
    started = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(
    stock: Callable[[], object], klplug: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each, taking turns: what else the machine does falls on both alike."""
    stock(), klplug()
    pairs = [(seconds(stock), seconds(klplug)) for _ in range(rounds)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, between the ends of its 95 % confidence interval by order statistics."""
    ordered, n = sorted(values), len(values)
    rank = max(0, int(n / 2 - 1.96 * n**0.5 / 2))
    return ordered[rank], statistics.median(ordered), ordered[n - 1 - rank]


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that ``function`` holds at once beyond what was there before it."""
    if DEVICE == "cpu":
        with Storages() as storages:
            function()
        return storages.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Storages(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on, for as long as somebody holds them.

    The allocator of the CPU keeps no peak of its own. What a kernel allocates for itself and frees
    before it returns is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _is_tensor(leaf) and _storage(leaf) not in self._seen | given:
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.live += size
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class Operations(TorchDispatchMode):
    """Counts what a device is asked to do: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not views and "empty" not in func.name()
        return func(*args, **(kwargs or {}))


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Row:
    """One comparison, over rounds that took turns."""

    case: str
    stock_seconds: Sequence[float]
    klplug_seconds: Sequence[float]
    stock_bytes: int
    klplug_bytes: int

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.stock_seconds, self.klplug_seconds, strict=True)
        return sorted(mine / theirs for theirs, mine in pairs)

    def __str__(self) -> str:
        low, middle, high = statistics.quantiles(self.ratios, n=4)
        microseconds = statistics.median(self.stock_seconds) * 1e6
        return (
            f"| {self.case} | {microseconds:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) | "
            f"{self.stock_bytes / 2**20:.2f} | {self.klplug_bytes / self.stock_bytes:.2f} |"
        )


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, with the machine in words."""
    if DEVICE == "cuda":
        machine = f"one {torch.cuda.get_device_name()}"
    else:
        machine = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} of them used"
    return "\n".join(
        [
            "# The KL term beside the host's own",
            "",
            f"`make bench`, on {machine}, torch {torch.__version__.partition('+')[0]}: "
            "forward, the host's own aggregation, backward (in the reward: forward). Time",
            "and peak extra memory of klplug over the host's; the median of rounds that took "
            "turns, and its quartiles. Freed memory is kept for both, as CUDA's allocator does.",
            "",
            "| host, formulation, metrics, shape, dtype | stock, us | time, ratio | stock, MiB | "
            "memory, ratio |",
            "| --- | --- | --- | --- | --- |",
            *map(str, rows),
            "",
        ]
    )
