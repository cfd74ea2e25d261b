"""reference=teacher: a second frozen engine beside the reference's, and its log-probs from there.

The reference's worker builds it by its own class and its own settings, and asks it whenever it is
asked itself. The log-probs go the way of the reference's: one more nested tensor of the output,
which the trainer cuts to the answers' tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor

from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug_verl import hidden

SENT = "klplug_teacher"
"""Of whole sequences, as its engine makes them."""

LOG_PROBS = "klplug_teacher_log_probs"
"""Of the answers' tokens: a tensor of the batch."""


# ── The reference's worker ──────────────────────────────────────────────────────────────────────


def load(worker: Any, config: Any) -> None:
    """Beside a reference, before the policy: ``config`` is the reference's, with another model."""
    own = dataclasses.replace(config, engine_config=copy.deepcopy(config.engine_config))
    worker.klplug_teacher = type(worker)(config=own)
    worker.klplug_teacher.reset()


def infer_batch(original: Call, worker: Any, args: Args, kwargs: Kwargs) -> Any:
    """The reference's forwards, and then the teacher's of the same tokens."""
    output = original(*args, **kwargs)
    teacher = getattr(worker, "klplug_teacher", None)
    if teacher is None:
        return output
    taught = teacher.infer_batch(bound(original, args, kwargs)["data"])
    if output is not None:  # of ranks that share their rows one has them
        output[SENT] = taught["log_probs"]
    return output


# ── The trainer ─────────────────────────────────────────────────────────────────────────────────


def compute_ref_log_prob(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    """The v1 trainer's; its workers put all their tensors into its queue."""
    result = hidden.compute_ref_log_prob(original, trainer, args, kwargs)
    run = getattr(trainer, "klplug", None)
    if run is None or not run.plan.needs_teacher:
        return result
    from verl.trainer.ppo.v1.trainer_base import response_from_nested, tq

    batch = bound(original, args, kwargs)["batch"]
    place = {"keys": batch.keys, "partition_id": batch.partition_id}
    data = tq.kv_batch_get(**place, select_fields=[SENT, "response_mask"])
    data[LOG_PROBS] = response_from_nested(_sent(run, data), data["response_mask"])
    tq.kv_batch_put(**place, fields=data.select(LOG_PROBS))
    return result


def compute_ref_log_prob_in_fit(original: Call, trainer: Any, args: Args, kwargs: Kwargs) -> Any:
    """``RayPPOTrainer``'s, which takes the reference's alone out of what its workers return."""
    run = getattr(trainer, "klplug", None)
    if run is None or not run.plan.needs_teacher:
        return hidden.compute_ref_log_prob_in_fit(original, trainer, args, kwargs)
    from verl.workers.utils.padding import no_padding_2_padding

    with hidden.listening(trainer) as listener:
        result = hidden.compute_ref_log_prob_in_fit(original, trainer, args, kwargs)
    found = no_padding_2_padding(_sent(run, listener.output), listener.batch)
    result.batch[LOG_PROBS] = found.float()
    return result


def _sent(run: Any, output: Any) -> Tensor:
    found: Tensor | None = output.get(SENT, None)
    if found is None:
        raise RuntimeError(
            f"kl_type {run.plan.spec}: the reference's worker sent no log-probs of a teacher: is "
            "klplug active in its process?"
        )
    return found
