"""ref_update: the reference's actors follow the policy's between steps, a parameter at a time.

The two groups of actors have no process group in common: what they share is Ray's object store.
Cut over as many ranks each, a rank holds the same part of both, and nothing is gathered.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klplug.hosting.moving import WHAT_TO_DO, Follower, Place, check_alike
from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug.hosting.state import StateError, moved
from klplug_openrlhf import hidden, teacher
from klplug_openrlhf.keys import CHECKPOINTS, NO_CHECKPOINTS, read
from klplug_openrlhf.plan import Plan

# ── The actors ──────────────────────────────────────────────────────────────────────────────────


def execute_batch(original: Call, actor: Any, args: Args, kwargs: Kwargs) -> Any:
    """OpenRLHF's way to any method of any actor, by its name; here to klplug's own too."""
    given = bound(original, args, kwargs)
    own = OWN.get(given["method_name"])
    if own is None:
        results = hidden.execute_batch(original, actor, args, kwargs)
        return teacher.beside(results, original, actor, args, kwargs)
    return own(actor, **given["all_data"])


def parameters(actor: Any) -> dict[str, Any]:
    """Of the model that an actor has, by name: a policy's actor calls it actor."""
    model = actor.actor if hasattr(actor, "actor") else actor.model
    return dict(hidden.inside(model).named_parameters())


def shapes(actor: Any) -> dict[str, tuple[int, ...]]:
    """Of all parameters, whole."""
    return {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in parameters(actor).items()}


def part(parameter: Any) -> Tensor:
    """What this rank holds: under ZeRO-3 a flat part, padded; else the whole."""
    held: Tensor = getattr(parameter, "ds_tensor", parameter)
    return held.detach()


def give(actor: Any, name: str, whole: bool) -> dict[str, Any]:
    """A copy of one of the policy's parameters: this rank's part, or, of rank 0, the whole."""
    vars(actor.trainer).pop("klplug_matrix", None)  # of the reference as it was (vocab=exact)
    parameter = parameters(actor)[name]
    if not whole or not hasattr(parameter, "ds_id"):
        return {"name": name, "tensor": part(parameter).to("cpu", copy=True)}
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        if torch.distributed.get_rank() != 0:
            return {}
        return {"name": name, "tensor": parameter.detach().to("cpu", copy=True)}


def take(actor: Any, name: str, tensor: Tensor) -> None:
    """Let one of the reference's parameters follow."""
    vars(actor).pop("klplug_matrix", None)
    parameter = parameters(actor)[name]
    own = part(parameter)
    with rewritten(parameter):
        follower(actor).follow(name, own, cut(tensor, parameter, own))


def cut(tensor: Tensor, parameter: Any, own: Tensor) -> Tensor:
    """This rank's part of a whole parameter, padded as ZeRO-3 pads it; a part is one already."""
    if tensor.shape == own.shape:
        return tensor
    start = own.numel() * torch.distributed.get_rank(parameter.ds_process_group)
    found = tensor.flatten()[start : start + own.numel()]
    return torch.nn.functional.pad(found, (0, own.numel() - found.numel()))


@contextmanager
def rewritten(parameter: Any) -> Iterator[None]:
    """While this rank's part is written: of small parameters ZeRO-3 keeps the whole beside it."""
    if not hasattr(parameter, "ds_id") or parameter.ds_status.name != "AVAILABLE":
        yield
        return
    parameter.partition()
    yield
    parameter.all_gather([parameter])


def follower(actor: Any) -> Follower:
    """What a reference's actor keeps of its updates."""
    if not hasattr(actor, "klplug_follower"):
        plan = Plan.of(actor.strategy.args)
        update = None if plan is None else plan.moving()
        actor.klplug_follower = Follower(0.0 if update is None else update.decay)
    found: Follower = actor.klplug_follower
    return found


def save(actor: Any, folder: str, step: int, policies: str) -> None:
    """Write this rank's part beside the policy's checkpoint.

    OpenRLHF deletes old checkpoints; what lies beside one that is gone goes too, where this machine
    sees the policy's.
    """
    parts = {name: part(p) for name, p in parameters(actor).items()}
    Place.of_this_rank(Path(folder)).save(step, follower(actor).kept(parts))
    if torch.distributed.get_rank() == 0 and Path(policies).is_dir():
        for other in Path(folder).parent.iterdir():
            if other != Path(folder) and not Path(policies, other.name).exists():
                shutil.rmtree(other, ignore_errors=True)


def load(actor: Any, folder: str, step: int) -> None:
    """Put this rank's part of a checkpoint in its place."""
    place, own = Place.of_this_rank(Path(folder)), parameters(actor)
    found, saved = place.load({name: part(parameter) for name, parameter in own.items()})
    if found != step:
        raise StateError(
            f"{place.path} is of step {found}, and the checkpoint's reference of {step}. "
            f"{WHAT_TO_DO}"
        )
    for name, parameter in own.items():
        with rewritten(parameter):
            follower(actor).restore(name, part(parameter), saved[name])


OWN: dict[str, Callable[..., Any]] = {
    "klplug_give": give,
    "klplug_take": take,
    "klplug_shapes": shapes,
    "klplug_save": save,
    "klplug_load": load,
    "klplug_teach": teacher.load,
}
GIVE, TAKE, SHAPES, SAVE, LOAD, TEACH = OWN

# ── The trainer ─────────────────────────────────────────────────────────────────────────────────


def told(group: Any, method: str, **given: Any) -> list[Any]:
    """Ray's references to what each actor of a group answers."""
    return [actor.execute_batch.remote(method, given, 0, 0) for actor in group._actor_handlers]


def check(trainer: Any, plan: Plan) -> None:
    """Before the first step: the reference can follow the policy."""
    if plan.moving() is None:
        return
    import ray

    groups = (trainer.actor_model_group, trainer.reference_model_group)
    policy, reference = (ray.get(told(group, SHAPES))[0] for group in groups)
    check_alike(policy, reference)
    trainer.klplug_names = list(policy)


def follow(trainer: Any, plan: Plan, step: int) -> None:
    """After the updates of a step, whose samples have met the reference that they are held to."""
    update = plan.moving()
    if update is None or not update.is_due(step):
        return
    for name in trainer.klplug_names:
        _hand_over(name, trainer.actor_model_group, trainer.reference_model_group)
    moved(trainer.klplug_models, step)


def _hand_over(name: str, policy: Any, reference: Any) -> None:
    """One parameter, whose room in the object store and on each device is free before the next."""
    import ray

    takers = reference._actor_handlers
    whole = len(takers) != len(policy._actor_handlers)
    parts = told(policy, GIVE, name=name, whole=whole)
    given = parts[:1] * len(takers) if whole else parts
    pairs = zip(takers, given, strict=True)
    ray.get([taker.execute_batch.remote(TAKE, own, 0, 0) for taker, own in pairs])


_SAVING: ContextVar[Any] = ContextVar("klplug_saving", default=None)


@contextmanager
def saving(trainer: Any) -> Iterator[None]:
    """While OpenRLHF decides whether it saves, and under which name."""
    token = _SAVING.set(trainer)
    try:
        yield
    finally:
        _SAVING.reset(token)


def async_run_method(original: Call, group: Any, args: Args, kwargs: Kwargs) -> Any:
    """The reference is written before the policy, whose checkpoint is then the newest."""
    trainer, given = _SAVING.get(), bound(original, args, kwargs)
    saves = given["method_name"] == "save_checkpoint"
    if saves and trainer is not None and group is trainer.actor_model_group:
        _save(trainer, **given["kwargs"])
    return original(*args, **kwargs)


def _save(trainer: Any, tag: str, client_states: dict[str, Any], **_: Any) -> None:
    kept = client_states["klplug"].get("reference", {})
    if "step" not in kept or read(trainer.args, NO_CHECKPOINTS):
        return
    import ray

    kept["folder"] = tag
    folder, policies = _folder(trainer, tag), Path(read(trainer.args, CHECKPOINTS), "_actor")
    own = {"folder": str(folder), "step": kept["step"], "policies": str(policies)}
    ray.get(told(trainer.reference_model_group, SAVE, **own))


def _folder(trainer: Any, tag: str) -> Path:
    return Path(read(trainer.args, CHECKPOINTS), "_reference", tag)


def resume(trainer: Any, saved: dict[str, Any]) -> None:
    """Put a checkpoint's reference in place, where it had moved.

    Raises:
        StateError: in the reference's actors; names the file that is missing.
    """
    kept = saved.get("reference") or {}
    if "step" not in kept or trainer.reference_model_group is None:
        return
    import ray

    own = {"folder": str(_folder(trainer, kept["folder"])), "step": kept["step"]}
    ray.get(told(trainer.reference_model_group, LOAD, **own))
    moved(trainer.klplug_models, kept["step"])
