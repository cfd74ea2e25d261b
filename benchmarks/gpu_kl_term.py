"""The KL term beside the hosts' own functions, with nothing but torch: for a machine with a GPU.

    python -m benchmarks.gpu_kl_term --hosts DIR --out FILE [--small]

DIR holds the hosts' wheels (`pip download --no-deps verl openrlhf`), or what is in them. Their
functions run as their files have them. Both sides are aggregated by `klplug.aggregate`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.host_functions import KL, kl_function
from benchmarks.measure import DEVICE, Row, interleaved, peak_bytes
from klplug import aggregate, kl_term, parse

SHAPES = [(16, 2048), (64, 4096), (64, 16384)]
SMALL = [(4, 128)]
DTYPES = [torch.float32, torch.bfloat16]
ROUNDS = 51
ESTIMATORS = {"k2_as_loss,ratio=none": "k2", "k3_as_loss,ratio=none": "k3"}


def tensors(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    size, length = shape
    lengths = torch.randint(length // 4, length, (size, 1), generator=draw)
    made = {
        name: -torch.rand(shape, generator=draw).to(dtype)
        for name in ("log_probs", "ref_log_probs", "old_log_probs")
    }
    made["response_mask"] = torch.arange(length) < lengths
    made = {name: tensor.to(DEVICE) for name, tensor in made.items()}
    made["log_probs"].requires_grad_()
    return made


def compared(
    host: str, stock: Callable[..., Tensor], kl_type: str, t: dict[str, Tensor], rounds: int
) -> Row:
    """One row: both sides take turns on the same tensors."""
    spec = parse(kl_type)
    word = "kl_penalty" if host == "verl" else "kl_estimator"

    def step(kl: Tensor) -> None:
        t["log_probs"].grad = None
        aggregate(kl, t["response_mask"]).backward()

    def theirs() -> None:
        step(stock(t["log_probs"], t["ref_log_probs"], **{word: ESTIMATORS[kl_type]}))

    def ours() -> None:
        step(kl_term(spec, **t).loss)

    timed = interleaved(theirs, ours, rounds)
    shape, dtype = t["log_probs"].shape, str(t["log_probs"].dtype).removeprefix("torch.")
    case = f"{host}, {kl_type}, {shape[0]}x{shape[1]}, {dtype}"
    return Row(case, *timed, peak_bytes(theirs), peak_bytes(ours))


def rows(hosts: Path, small: bool) -> Iterator[Row]:
    for host in KL:
        stock = kl_function(hosts, host)
        for shape, dtype in itertools.product(SMALL if small else SHAPES, DTYPES):
            t = tensors(shape, dtype)
            for kl_type in ESTIMATORS:
                row = compared(host, stock, kl_type, t, 3 if small else ROUNDS)
                print(row, flush=True)
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hosts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="one small shape: a rehearsal")
    given = parser.parse_args()
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU"
    text = "\n".join(
        [
            f"# The KL term beside the hosts' own, on {machine}",
            "",
            f"`benchmarks/gpu.sh`, torch {torch.__version__.partition('+')[0]}: forward, mean, "
            "backward; ratios are klplug over stock, the median of rounds that took turns, and "
            "its quartiles.",
            "",
            "| host, formulation, shape, dtype | stock, us | time, ratio | stock, MiB | "
            "memory, ratio |",
            "| --- | --- | --- | --- | --- |",
            *map(str, rows(given.hosts, given.small)),
            "",
        ]
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
