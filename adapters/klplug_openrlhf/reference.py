"""Which models the reference's actors load: OpenRLHF gives them the policy's path."""

from __future__ import annotations

from typing import Any

from klplug.hosting.patching import Args, Call, Kwargs
from klplug_openrlhf.moving import TEACH, told
from klplug_openrlhf.plan import Plan


def is_reference(actor_type: Any) -> bool:
    """Whether a class, or Ray's stand-in for it, is that of the reference's actors."""
    made = getattr(actor_type, "__ray_metadata__", None)
    own = actor_type if made is None else made.modified_class
    return any(c.__name__ == "ReferenceModelActor" for c in own.__mro__)


def async_init_model_from_pretrained(original: Call, group: Any, args: Args, kwargs: Kwargs) -> Any:
    """In the command's own process: the path of the model goes to a group of actors."""
    if not is_reference(group.ray_actor_type):
        return original(*args, **kwargs)
    strategy, path = args
    plan = Plan.of(strategy.args)
    if plan is None:
        return original(*args, **kwargs)
    loading = original(strategy, plan.ref_model or path, **kwargs)
    if plan.teacher is None:
        return loading
    return [*loading, *told(group, TEACH, path=plan.teacher)]  # an actor does one after the other
