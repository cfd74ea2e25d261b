"""ref_update: in each worker the reference follows the policy after a step, part by part.

Both engines are in one process, cut over the same ranks: a part of the one stands beside the same
part of the other, and nothing is gathered or sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from klplug.hosting.moving import Follower, Place, check_alike
from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug.hosting.ref_update import RefUpdate
from klplug_verl.keys import STILL, WORKERS_UPDATE

STEP_KEY = "klplug_ref_step"  # in a batch's meta information: the step after which it follows
_NODE = WORKERS_UPDATE.partition(".")[2]


@dataclass
class Moving:
    """Policy and reference of one worker, as verl's workers of one engine each."""

    policy: Any
    reference: Any
    follower: Follower
    step: int | None = None  # after which the reference last followed

    def follow(self, step: int) -> None:
        policy = parts(self.policy)
        for name, own in parts(self.reference).items():
            self.follower.follow(name, own, policy[name])
        self._moved(step)

    def save(self, folder: Path) -> None:
        place = Place.of_this_rank(folder)
        if self.step is None:
            place.clear()
        else:
            place.save(self.step, self.follower.kept(parts(self.reference)))

    def load(self, folder: Path) -> None:
        """Where the reference had not moved there is nothing of it in the folder."""
        if not any(folder.glob(Place.PATTERN)):
            return
        held = parts(self.reference)
        step, saved = Place.of_this_rank(folder).load(held)
        for name, own in held.items():
            self.follower.restore(name, own, saved[name])
        self._moved(step)

    def _moved(self, step: int) -> None:
        self.step = step
        shared = getattr(self.reference.engine, "klplug_exact", None)
        if shared is not None:
            shared.matrix = None  # of the reference as it was (vocab=exact)


def parts(worker: Any) -> dict[str, Tensor]:
    """What this rank holds of a model between its forwards, by name."""
    module = worker.engine.module
    _cut_again(module)
    return {n: getattr(p, "_local_tensor", p).detach() for n, p in module.named_parameters()}


def _cut_again(module: Any) -> None:
    """Let go of what a forward left whole: the outermost parameters, which the next would use."""
    from torch.distributed.fsdp import FSDPModule

    for own in module.modules():
        handle: Any = getattr(own, "_handle", None)
        if isinstance(own, FSDPModule):
            own.reshard()
        # Of FSDP 1, which has none before its first forward, nor where nothing is cut.
        elif hasattr(getattr(handle, "flat_param", None), "_full_param_padded"):
            handle.reshard(True)


def connect(worker: Any) -> None:
    """Before the first step: whose engine follows whose, in a run of klplug's."""
    written = worker.config.get(_NODE)
    if written is None or getattr(worker, "actor", None) is None:
        return
    if getattr(worker, "ref", None) is None:  # as in verl 0.7's own worker
        if written != STILL:
            raise RuntimeError(
                f"klplug.ref_update={written}: verl made no reference in the policy's process, and "
                "klplug moves it from there only"
            )
        return
    decay = 0.0 if written == STILL else RefUpdate.parse(written).decay
    worker.actor.klplug_moving = Moving(worker.actor, worker.ref, Follower(decay))
    if written != STILL:
        shapes = (
            {name: tuple(own.shape) for name, own in parts(side).items()}
            for side in (worker.actor, worker.ref)
        )
        check_alike(*shapes)


def _of(worker: Any) -> Moving | None:
    return getattr(worker, "klplug_moving", None)


def train_mini_batch(original: Call, worker: Any, args: Args, kwargs: Kwargs) -> Any:
    """All updates of a step; only a policy has a reference."""
    moving = _of(worker)
    if moving is None:
        return original(*args, **kwargs)
    from verl.utils import tensordict_utils as tu

    data = bound(original, args, kwargs)["data"]
    step = tu.get_non_tensor_data(data=data, key=STEP_KEY, default=None)
    result = original(*args, **kwargs)
    if step is not None:
        moving.follow(step)
    return result


def save_checkpoint(original: Call, worker: Any, args: Args, kwargs: Kwargs) -> Any:
    """The policy's, with a reference that has moved beside it in the folder."""
    result = original(*args, **kwargs)
    moving = _of(worker)
    if moving is not None:
        moving.save(Path(bound(original, args, kwargs)["local_path"]))
    return result


def load_checkpoint(original: Call, worker: Any, args: Args, kwargs: Kwargs) -> Any:
    result = original(*args, **kwargs)
    moving = _of(worker)
    if moving is not None:
        moving.load(Path(bound(original, args, kwargs)["local_path"]))
    return result
