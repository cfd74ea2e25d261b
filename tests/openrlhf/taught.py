"""Policy, reference and teacher on two ranks of ZeRO-3, by OpenRLHF's own actors and maker.

``python -m tests.openrlhf.taught POLICY REFERENCE TEACHER OUT.pt`` is one rank of two, RANK set:
each has answers of its own, and goes through one training step.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from pathlib import Path

import torch

from recipes import cpu_shim


def main() -> None:
    cpu_shim.install("openrlhf")
    import klplug_openrlhf
    import ray
    from openrlhf.trainer.ray.launcher import ReferenceModelActor
    from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
    from ray import cloudpickle

    from tests.openrlhf import test_exact
    from tests.openrlhf.command_line import change
    from tests.openrlhf.test_teacher import COEF, KL_TYPE
    from tests.openrlhf.trainer import Bench

    for remote in (ReferenceModelActor, PolicyModelActor):
        cls = remote.__ray_metadata__.modified_class
        test_exact.SHIPPED[cls.__name__] = cloudpickle.dumps(cls)
    klplug_openrlhf.apply()
    ray.put = ray.get = lambda x: x
    policy, reference, teacher, out = map(Path, sys.argv[1:])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    bench = Bench(policy, zero_stage=3, ranks=size)
    change(bench.args, "ds.attn_implementation", "eager")
    test_exact.samples = functools.partial(test_exact.samples, seed=rank)
    plain = test_exact.reference_actor

    def taught(bench: Bench, folder: Path) -> object:
        actor = plain(bench, folder)
        actor.execute_batch("klplug_teach", {"path": str(teacher)}, 0, 0)
        return actor

    test_exact.reference_actor = taught
    given = test_exact.experience(bench, reference, KL_TYPE)
    given.advantages = torch.zeros_like(given.advantages)
    step = bench.step(copy.deepcopy(given), KL_TYPE, COEF)
    found: list[object] = [None] * size
    torch.distributed.all_gather_object(found, (given, step))
    if rank == 0:
        torch.save(found, out)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
