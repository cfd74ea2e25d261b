"""Policy and reference in OpenRLHF's own actors, on DeepSpeed's engines, in one process.

``python -m tests.openrlhf.moving POLICY REFERENCE alike|other OUT.pt`` is one rank of two, RANK
set: the reference follows once, by half.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from recipes import cpu_shim

Weights = dict[str, Tensor]


class Handle:
    """Ray's handle of an actor that is in this process."""

    def __init__(self, actor: Any, **instead: Callable[..., Any]) -> None:
        self._actor, self._instead = actor, instead

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=self._instead.get(name) or getattr(self._actor, name))


class Pair:
    """An actor of the policy and one of the reference, as their processes have them."""

    def __init__(self, bench: Any, reference: Path) -> None:
        from openrlhf.models import Actor
        from openrlhf.trainer.ray.launcher import BaseModelActor

        self.bench, self.args = bench, bench.args
        self.states: dict[str, Any] | None = None
        self.policy, self.reference = (object.__new__(BaseModelActor) for _ in range(2))
        self.policy.strategy = self.reference.strategy = bench.strategy
        self.policy.actor, self.policy.trainer = bench.actor, SimpleNamespace()
        model = Actor(
            str(reference),
            attn_implementation="eager",
            param_dtype="bf16",
            ds_config=bench.strategy.get_ds_eval_config(offload=False),
            packing_samples=False,
        )
        self.reference.model = bench.strategy.prepare(model)
        self.models = {"policy": bench.actor, "reference": self.reference.model}
        self.actors = {"policy": self.policy, "reference": self.reference}

    def groups(self) -> list[Any]:
        """OpenRLHF's own two groups, as the trainer has them."""
        from openrlhf.trainer.ray.launcher import RayActorGroup

        policy, reference = (object.__new__(RayActorGroup) for _ in range(2))
        policy.saved = {}

        def save_checkpoint(tag: str, client_states: dict[str, Any], **_: Any) -> None:
            policy.saved = client_states

        own = Handle(
            self.policy,
            save_checkpoint=save_checkpoint,
            get_checkpoint_states=lambda: self.states,
            fit=lambda **_: policy.fits(),
        )
        policy._actor_handlers, policy.fits = [own], lambda: {}
        reference._actor_handlers = [Handle(self.reference)]
        return [policy, reference]

    def parameters(self, which: str) -> dict[str, Any]:
        return dict(self.models[which].model.module.named_parameters())

    def whole(self, which: str) -> Weights:
        """Copies of all parameters, as DeepSpeed itself gathers them."""
        found = {}
        for name, parameter in self.parameters(which).items():
            with gathered(parameter):
                found[name] = parameter.detach().clone()
        return found

    def put(self, weights: Weights) -> None:
        """Give the policy these weights."""
        for name, parameter in self.parameters("policy").items():
            with gathered(parameter):
                parameter.data.copy_(weights[name])

    def train(self, far: float) -> None:
        """Move every weight of the policy, alike on every rank."""
        generator = torch.Generator().manual_seed(len(self.__dict__.setdefault("moves", [])))
        self.__dict__["moves"].append(far)
        noise = {
            name: far * torch.randn(own.shape, generator=generator)
            for name, own in self.whole("policy").items()
        }
        self.put({name: own + noise[name] for name, own in self.whole("policy").items()})

    def samples(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        sequences = torch.randint(3, 64, (4, 24), generator=generator)
        mask = torch.zeros(4, 23, dtype=torch.long)
        mask[:, 8:20] = 1
        return sequences, mask

    def log_probs(self, which: str) -> Tensor:
        """Of the answers' tokens, by a forward of the engine."""
        sequences, mask = self.samples()
        model = self.models[which]
        model.eval()
        with torch.no_grad():
            found: Tensor = model(sequences, mask, torch.ones_like(sequences))
        return found[mask.bool()].float()

    def plain(self, weights: Weights) -> Tensor:
        """The same of these weights, by transformers alone."""
        from transformers import Qwen2ForCausalLM

        from tests.openrlhf.trainer import tiny_config

        model = Qwen2ForCausalLM(tiny_config(tied=False)).to(torch.bfloat16)
        model.load_state_dict(weights)
        sequences, mask = self.samples()
        with torch.no_grad():
            log_probs = model(sequences).logits[:, :-1].float().log_softmax(-1)
        return log_probs.gather(-1, sequences[:, 1:, None])[..., 0][mask.bool()]


@contextmanager
def gathered(parameter: Any) -> Iterator[None]:
    """A parameter, whole; what is written to it stays."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield


def main() -> None:
    cpu_shim.install("openrlhf")
    import klplug_openrlhf
    from klplug_openrlhf import moving

    from tests.openrlhf.trainer import Bench, configure

    klplug_openrlhf.apply()
    policy, reference, world, out = sys.argv[1:]
    bench = Bench(Path(policy), zero_stage=3, ranks=int(os.environ["WORLD_SIZE"]))
    configure(bench.args, "k2_as_loss")
    bench.args.klplug.ref_update = "ema:0.5"
    pair, rank = Pair(bench, Path(reference)), torch.distributed.get_rank()
    start, before, sent = pair.whole("reference"), pair.log_probs("reference"), []
    for name, parameter in pair.parameters("policy").items():
        given = [moving.give(pair.policy, name=name, whole=world == "other")]
        if world == "other":
            torch.distributed.broadcast_object_list(given)
        sent.append((given[0]["tensor"].numel(), parameter.ds_numel))
        moving.take(pair.reference, **given[0])
    found = {
        "start": start,
        "before": before,
        "policy": pair.whole("policy"),
        "reference": pair.whole("reference"),
        "log_probs": pair.log_probs("reference"),
        "sent": sent,
    }
    if rank == 0:
        torch.save(found | {"plain": pair.plain(found["reference"])}, out)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
