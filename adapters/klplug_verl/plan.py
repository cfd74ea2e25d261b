"""What klplug does in a run, read from verl's own config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import klplug
from klplug import parse
from klplug.hosting.settings import Settings
from klplug_verl.keys import read

# They take the token mean of each answer themselves, whatever the aggregation.
MEAN_OF_ANSWER_LOSSES = ("sapo", "geo_mean")


@dataclass(frozen=True)
class Plan(Settings):
    """What the trainer does in a run, read from the ``klplug`` node of its resolved config."""

    @property
    def needs_reference(self) -> bool:
        """Whether any term is to the reference model, and not to the sampler."""
        return "ref_log_probs" in self.spec.requires

    @classmethod
    def of(cls, config: Any) -> Plan | None:
        """The plan of a run, or ``None`` where nobody asked for klplug."""
        own = read(config, "klplug")
        if own is None:
            return None
        spec = parse(own["kl_type"])
        return cls(
            spec=spec,
            kl_coef=klplug.check_kl_coef(spec, own.get("kl_coef")),
            kl_ctrl=own.get("kl_ctrl") or "fixed",
            kl_target=own.get("kl_target"),
            kl_horizon=own.get("kl_horizon"),
            divides_by_length=divides_by_length(config),
        )


def divides_by_length(config: Any) -> bool:
    actor = read(config, "actor_rollout_ref.actor")
    return (
        read(actor, "loss_agg_mode") == "seq-mean-token-mean"
        or read(actor, "policy_loss.loss_mode") in MEAN_OF_ANSWER_LOSSES
    )
