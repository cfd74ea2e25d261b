"""One rank of several: ``python -m tests.verl.rank CASES.json OUT.pt``, RANK in its environment.

``python -m tests.verl.rank CASES.json OUT.pt 2``: of packed rows, cut between 2 ranks (Ulysses).
With KLPLUG_TEST_SOURCE a file of the reference's own answers, the cases once more on those.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from recipes import cpu_shim


def main() -> None:
    cpu_shim.install("verl")
    from klplug.hosting.stored import Stored
    from tests.verl.engine import Bench

    given, *words, out = sys.argv[1:]
    cases = json.loads(given)
    rank = int(os.environ["RANK"])
    ulysses = int(words[0]) if words else 1
    bench = Bench(
        rank,
        int(os.environ["WORLD_SIZE"]),
        int(os.environ["MASTER_PORT"]),
        packed=ulysses > 1,
        ulysses=ulysses,
    )
    data = bench.batch()
    results = [bench.step(data, **case) for case in cases]
    if (source := os.environ.get("KLPLUG_TEST_SOURCE")) is not None:
        bench.worker.engine.klplug_stored = Stored.read(source)
        results += [bench.step(data, **case) for case in cases]
    if rank == 0:
        torch.save(results, out)


if __name__ == "__main__":
    main()
