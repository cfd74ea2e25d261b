"""verl's worker of policy and reference in this process, whose reference follows.

``python -m tests.verl.moving SETTING... OUT.pt`` is one rank of several, RANK in its environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.references import POLICY
from tests.verl.engine import nested
from tests.verl.exact import Run, as_rank, overrides, rows

Weights = dict[str, Tensor]


def words(
    ref_update: str | None, reference: Path | None = None, *more: str, **how: Any
) -> list[str]:
    """The settings of a run whose reference follows, and which this process can train."""
    kl_type = how.pop("kl_type", "k2_as_loss")
    update = () if ref_update is None else (f"+klplug.ref_update='{ref_update}'",)
    own_params = "actor_rollout_ref.ref.fsdp_config.use_orig_params=True"
    return overrides(kl_type, reference, *update, own_params, *more, **how)


def sides(run: Run) -> dict[str, Any]:
    return {"policy": run.worker.actor, "reference": run.worker.ref}


def whole(run: Run, which: str) -> Weights:
    """Copies of all parameters, as torch itself gathers them."""
    module = sides(run)[which].engine.module
    if hasattr(module, "reshard"):
        cut(module)
        return {n: p.full_tensor().detach().clone() for n, p in module.named_parameters()}
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(module, writeback=False):
        return {
            n.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
            for n, p in module.named_parameters()
        }


def cut(module: Any) -> None:
    """Back into parts, as an update leaves it."""
    for own in module.modules():
        if hasattr(own, "reshard"):
            own.reshard()


def train(run: Run, far: float, seed: int) -> None:
    """Move what this rank holds of every weight of the policy, each element by its own."""
    cut(run.worker.actor.engine.module)
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(2 * seed + rank)
    with torch.no_grad():
        for parameter in run.worker.actor.engine.module.parameters():
            own = getattr(parameter, "_local_tensor", parameter)
            own.add_(far * torch.randn(own.shape, generator=generator))


def data(world: tuple[int, int] = (0, 1), **meta: Any) -> Any:
    """Answers to make log-probs of, and to update on."""
    from verl.utils import tensordict_utils as tu

    made = rows()
    ids = [torch.cat(pair) for pair in zip(made["prompts"], made["responses"], strict=True)]
    tensors = {name: nested(own) for name, own in made.items()} | {
        "input_ids": nested(ids),
        "position_ids": nested([torch.arange(len(row)) for row in ids]),
        "loss_mask": nested([mask.clone() for mask in made["response_mask"]]),
    }
    words = {
        "temperature": 0.8,
        "calculate_entropy": False,
        "compute_loss": False,
        "pad_mode": "no_padding",
    }
    rank, size = world
    return tu.chunk_tensordict(tu.get_tensordict(tensors, words | meta), size)[rank]


def log_probs(run: Run, which: str, world: tuple[int, int] = (0, 1)) -> Tensor:
    """Of the answers' tokens, by verl's own forward of policy or reference."""
    call = {"policy": run.worker.compute_log_prob, "reference": run.worker.compute_ref_log_prob}
    output = call[which](data(world))
    found = output["log_probs"]
    return (found.values() if found.is_nested else found.flatten()).float().clone()


def main() -> None:
    run, (rank, size), out = as_rank()
    moving = run.worker.actor.klplug_moving
    start, before = whole(run, "reference"), log_probs(run, "reference", (rank, size))
    train(run, 0.01, 3)
    moving.follow(1)
    found = {
        "start": start,
        "policy": whole(run, "policy"),
        "reference": whole(run, "reference"),
        "of": [before, log_probs(run, "reference", (rank, size))],
        "folder": str(out.parent / "actor"),
    }
    moving.save(out.parent / "actor")
    train(run, 0.01, 4)
    moving.follow(2)
    moving.load(out.parent / "actor")
    found["restored"] = whole(run, "reference")
    if rank == 0:
        torch.save(found, out)
    torch.distributed.barrier()


if __name__ == "__main__":
    assert POLICY.is_dir()
    main()
