"""The one function of the toy trainer that is replaced."""

from __future__ import annotations

from typing import Any

from klplug import kl_term
from klplug.hosting.patching import Args, Call, Hook, Kwargs, Patch, bound
from klplug_toy.host import HOST


def kl_loss(original: Call, _: Any, args: Args, kwargs: Kwargs) -> Any:
    given = bound(original, args, kwargs)
    if given["kind"] in HOST.stock["as_loss"]:
        return original(*args, **kwargs)
    log_probs = given["log_probs"]
    return kl_term(
        given["kind"],
        log_probs,
        given["ref_log_probs"],
        given["mask"],
        old_log_probs=log_probs.detach(),  # one update a sample
    ).loss


PATCH = Patch(
    host="toyrl",
    tested=HOST.tested_text,
    hooks=(
        Hook(
            "toyrl.train",
            "kl_loss",
            ("log_probs", "ref_log_probs", "mask", "kind"),
            kl_loss,
            supplies=("ref_log_probs", "old_log_probs"),
        ),
    ),
)


def install() -> None:
    PATCH.apply()
