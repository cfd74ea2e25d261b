"""``klplug.source``: the KL of a micro-batch on answers that the reference gave itself.

Before each micro-batch of the policy's own answers the engine goes over as many stored ones, as it
would over one more micro-batch: forward, KL, backward. Their gradients add up as all others do, and
nothing of the policy's own answers sees them: no mask, no advantage, no mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from klplug import StoredKL, stored_kl
from klplug.hosting.patching import Args, Call, Kwargs, bound
from klplug.hosting.stored import Stored
from klplug.spec import KLSpec
from klplug_verl.keys import COEF_KEY, WORKERS_SOURCE

LOG_PROBS = "klplug_stored_log_probs"
"""Of a micro-batch of stored answers: the reference's log-probs of them."""

WIDTH = "klplug_width"
"""Of the same: how wide the mask of the answers beside them is."""

_NODE = WORKERS_SOURCE.partition(".")[2]
# What verl's engine, and its loss, are told of a micro-batch beside its tensors.
_TOLD = (
    *("temperature", "pad_mode", "pad_token_id", "use_remove_padding", "use_fused_kernels"),
    *("sp_size", "dp_size", "batch_num_tokens", "global_batch_size", COEF_KEY),
)
# Whose answers the engine is at: its own KL belongs to the stored ones.
_APART: ContextVar[Stored | None] = ContextVar("klplug_stored", default=None)


def connect(worker: Any) -> None:
    """Before the first step: the policy's engine, and the answers."""
    path = worker.config.get(_NODE)
    if path is not None and "actor" in worker.role:
        worker.actor.engine.klplug_stored = Stored.read(path)


def apart() -> Stored | None:
    """The answers that the KL is taken on, where those are not the policy's own."""
    return _APART.get()


@contextmanager
def _apart(stored: Stored) -> Iterator[None]:
    token = _APART.set(stored)
    try:
        yield
    finally:
        _APART.reset(token)


def forward_step(original: Call, engine: Any, args: Args, kwargs: Kwargs) -> Any:
    """One micro-batch of the policy's, after one of stored answers."""
    given = bound(original, args, kwargs)
    if given["forward_only"] or given["loss_function"] is None:
        return original(**given)
    stored: Stored = engine.klplug_stored
    with _apart(stored):
        loss, beside = original(**given | {"micro_batch": rows(stored, given["micro_batch"])})
        scaler = getattr(engine, "scaler", None)
        (loss if scaler is None else scaler.scale(loss)).backward()
        loss, output = original(**given)
    output["metrics"] |= beside["metrics"]
    output["loss"] += beside["loss"]
    return loss, output


def rows(stored: Stored, data: Any) -> Any:
    """As many stored answers as a micro-batch has of its own, in its form."""
    from verl.utils import tensordict_utils as tu

    told = {name: tu.get_non_tensor_data(data=data, key=name, default=None) for name in _TOLD}
    if isinstance(told["temperature"], Tensor):
        raise RuntimeError("klplug.source: verl gave each sample a temperature of its own")
    own = data["response_mask"]
    told[WIDTH] = int(own.offsets().diff().max()) if own.is_nested else own.shape[1]
    ids = data["input_ids"]
    answers = stored.drawn(ids.values(), len(ids.offsets()) - 1)
    prompts = [torch.tensor(own.prompt) for own in answers]
    responses = [torch.tensor(own.answer) for own in answers]
    sequences = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    ones = [torch.ones(len(row)) for row in responses]
    tensors = {
        "input_ids": sequences,
        "position_ids": [torch.arange(len(row)) for row in sequences],
        "prompts": prompts,
        "responses": responses,
        "response_mask": ones,
        "loss_mask": ones,
        LOG_PROBS: [torch.tensor(own.log_probs) for own in answers],
    }
    nested = {
        name: torch.nested.as_nested_tensor(of, layout=torch.jagged) for name, of in tensors.items()
    }
    return tu.get_tensordict(nested, {k: v for k, v in told.items() if v is not None})


def kl_of(spec: KLSpec, model_output: Any, data: Any) -> tuple[StoredKL, Tensor]:
    """The KL of a micro-batch of stored answers, and its mask, (B, T)."""
    lengths = data["responses"].offsets().diff().tolist()
    ends = data["input_ids"].offsets()[1:].tolist()
    values, width = model_output["log_probs"].values(), max(lengths)
    # A token's log-prob stands where the token before it does.
    log_probs = torch.stack(
        [
            pad(values[end - n - 1 : end - 1], (0, width - n))
            for n, end in zip(lengths, ends, strict=True)
        ]
    )
    mask = data["response_mask"].to_padded_tensor(0.0).to(bool)
    return stored_kl(spec, log_probs, data[LOG_PROBS].to_padded_tensor(0.0), mask), mask


def batch_info(stored: Stored, data: Any, config: Any) -> dict[str, Any]:
    """What verl's ``agg_loss`` divides by, for as many answers of the file's mean length.

    Under ``seq-mean-token-sum-norm`` that is by default the width of the mask: for these answers
    too that of the policy's own, and not the longest that was drawn.
    """
    answers, factor = data["global_batch_size"], config.loss_scale_factor
    return {
        "dp_size": data["dp_size"],
        "batch_num_tokens": answers * stored.mean_length,
        "global_batch_size": answers,
        "loss_scale_factor": data[WIDTH] if factor is None else factor,
    }
