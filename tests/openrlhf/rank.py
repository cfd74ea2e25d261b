"""One rank of a ring: ``python -m tests.openrlhf.rank MODEL KL_TYPE... OUT.pt``, RANK set.

With KLPLUG_TEST_SOURCE a file of the reference's own answers, one step on those.

OpenRLHF's ring attention by its own code, with stand-ins for the two packages that need a GPU:
ring-flash-attn, and flash-attention's gather.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import torch

from recipes import cpu_shim


def main() -> None:
    cpu_shim.install("openrlhf")
    ring = ModuleType("ring_flash_attn")
    ring.substitute_hf_flash_attn = lambda *_: None
    ring.update_ring_flash_attn_params = lambda *_: None
    sys.modules["ring_flash_attn"] = ring

    import klplug_openrlhf
    from openrlhf.models import ring_attn_utils

    from tests.openrlhf.trainer import Bench, of_all_ranks

    klplug_openrlhf.apply()
    ring_attn_utils.all_gather = lambda x, group: of_all_ranks(x, 0)
    model, *kl_types, out = sys.argv[1:]
    rank = int(os.environ["RANK"])
    bench = Bench(Path(model), zero_stage=2, packing=True, ring=int(os.environ["WORLD_SIZE"]))
    experience = bench.experience()
    source = os.environ.get("KLPLUG_TEST_SOURCE")
    if source is not None:
        stored = bench.step(experience, kl_types[-1], source=Path(source))
        if rank == 0:
            torch.save((vars(experience), vars(stored)), out)
        return
    steps = [vars(bench.step(experience, kl)) for kl in kl_types]
    # The ranks of a ring see the same tokens: for the metrics each has another reference.
    other = bench.experience()
    other.base_action_log_probs = other.base_action_log_probs - rank / 2
    status = bench.epoch([other], kl_types[-1])
    if rank == 0:
        torch.save((vars(experience), steps, status), out)


if __name__ == "__main__":
    main()
