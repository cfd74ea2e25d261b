"""The shared tensors as verl passes them: jagged in its workers, padded in its trainer."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from klplug_verl.actor import BASELINE, POSTERIOR
from klplug_verl.hidden import STATES, Shared
from klplug_verl.teacher import LOG_PROBS
from tensordict import TensorDict
from torch import Tensor

from klplug import kl_term, parse
from klplug.hosting.hidden import Matrix, exact_term
from tests.one_meaning import BETA, CLIP_RANGE, TEMPERATURE, Batch, States
from tests.verl.engine import nested

LENGTHS = (6, 4, 1, 5)
PROMPT = 2
# What must not depend on the cut; the top tokens are those of each micro-batch.
MERGED = {
    name
    for name in kl_term("none", *[torch.zeros(1, 1)] * 3).metrics
    if name != "klplug/top_share" and not name.startswith("klplug/nonfinite/")
}
KEYS = ("a_0_0", "a_1_0", "b_0_0", "b_1_0")


def rows(padded: Tensor) -> list[Tensor]:
    return [row[:length] for row, length in zip(padded, LENGTHS, strict=True)]


IS_LEGACY = find_spec("verl.workers.actor") is not None
"""Whether verl (0.7) has a worker of its own for FSDP beside the engine's."""

LAYOUTS = ("padded",) if IS_LEGACY else ("jagged", "padded")
"""What ``ppo_loss`` is given: by the v1 trainer jagged rows, by ``RayPPOTrainer`` padded ones."""


def micro_batch(
    given: Batch,
    advantages: Tensor,
    layout: str,
    baseline: Tensor | None,
    more: dict[str, Tensor] | None = None,
    **meta: Any,
) -> TensorDict:
    """What ``ppo_loss`` is called with."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    tensors = {
        "response_mask": given.response_mask,
        "old_log_probs": given.old_log_probs,
        "ref_log_prob": given.ref_log_probs,
        "rollout_log_probs": given.rollout_log_probs,
        POSTERIOR: given.posterior_log_probs,
        LOG_PROBS: given.teacher_log_probs,
        "advantages": advantages,
    }
    if given.posterior_log_probs is None:
        del tensors[POSTERIOR]
    if baseline is not None:
        tensors[BASELINE] = baseline
    tensors |= more or {}
    info = {
        "dp_size": 1,
        "batch_num_tokens": int(given.response_mask.sum()),
        "global_batch_size": len(LENGTHS),
    }
    if layout == "jagged":
        tensors = {name: nested(rows(tensor)) for name, tensor in tensors.items()} | {
            "prompts": nested([torch.zeros(PROMPT, dtype=torch.long) for _ in LENGTHS]),
            "responses": nested([torch.zeros(n, dtype=torch.long) for n in LENGTHS]),
        }
        return tu.get_tensordict(tensors, {**info, **meta})
    padded = tu.get_tensordict({**tensors, **tokens(given)}, {**info, **meta})
    return left_right_2_no_padding(padded)


def tokens(given: Batch) -> dict[str, Tensor]:
    """Prompts and answers padded, as ``RayPPOTrainer`` holds them."""
    count, width = given.response_mask.shape
    lengths = torch.tensor(LENGTHS)[:, None]
    attention = (torch.arange(PROMPT + width)[None, :] < PROMPT + lengths).long()
    return {
        "prompts": torch.zeros(count, PROMPT, dtype=torch.long),
        "responses": torch.zeros(count, width, dtype=torch.long),
        "input_ids": torch.zeros(count, PROMPT + width, dtype=torch.long),
        "attention_mask": attention,
        "position_ids": attention.cumsum(-1) - 1,
    }


def model_output(log_probs: Tensor) -> dict[str, Tensor]:
    """Log-probs of whole sequences, each position holding that of the next token."""
    whole = [
        torch.cat([row.new_zeros(PROMPT - 1), row, row.new_zeros(1)]) for row in rows(log_probs)
    ]
    return {
        "log_probs": torch.nested.nested_tensor_from_jagged(
            torch.cat(whole), offsets=torch.tensor([0, *np.cumsum([len(row) for row in whole])])
        )
    }


def actor_config(kl_loss_type: str | None, coef: float, **actor: Any) -> Any:
    from verl.workers.config import FSDPActorConfig

    settings = {"strategy": "fsdp2", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 4, **actor}
    return FSDPActorConfig(
        use_kl_loss=kl_loss_type is not None,
        kl_loss_coef=coef,
        kl_loss_type=kl_loss_type or "low_var_kl",
        **settings,
    )


def loss(
    given: Batch,
    log_probs: Tensor,
    kl_loss_type: str | None,
    coef: float,
    advantages: Tensor | None = None,
    layout: str = LAYOUTS[0],
    baseline: Tensor | None = None,
    meta: dict[str, Any] | None = None,
    more: dict[str, Tensor] | None = None,
    **actor: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's actor loss of one micro-batch."""
    from verl.workers.utils.losses import ppo_loss

    config = actor_config(kl_loss_type, coef, **actor)
    advantages = torch.zeros_like(log_probs.detach()) if advantages is None else advantages
    data = micro_batch(given, advantages, layout, baseline, more, **(meta or {}))
    result: tuple[Tensor, dict[str, Any]] = ppo_loss(config, model_output(log_probs), data)
    return result


class OutputLayer(torch.nn.Module):
    """All of a model that comes after its last hidden states, which are given, packed."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.hidden, self.lm_head = hidden, torch.nn.Linear(*weight.shape[::-1], bias=False)
        self.lm_head.weight.data = weight
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.hidden[None]))


def gradient_of_states(kl_type: str, own: States, given: Batch, layout: str = LAYOUTS[0]) -> Tensor:
    """Of a whole step of verl's own engine towards the policy's hidden states, (4, 6, 5)."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.utils.losses import ppo_loss

    as_loss = parse(kl_type).placed("as_loss")
    hidden = own.hidden.clone().requires_grad_(True)
    nothing = hidden.new_zeros(1, hidden.shape[-1])
    # Each state predicts the token after it; a prompt's last state the answer's first.
    packed = [torch.cat([nothing] * (PROMPT - 1) + [row, nothing]) for row in rows(hidden)]
    engine = object.__new__(FSDPEngineWithLMHead)
    engine.module = OutputLayer(torch.cat(packed), own.weight)
    engine.use_ulysses_sp = engine.pad_to_length = False
    engine._autocast_dtype = torch.float32
    engine.model_config = SimpleNamespace(use_fused_kernels=False)
    engine.get_data_parallel_group = lambda: None
    term = exact_term(as_loss)
    if term is not None:
        engine.klplug_exact = Shared(term, False, Matrix(own.ref_weight, None, None))
    meta = {"temperature": TEMPERATURE, "use_remove_padding": True}
    data = micro_batch(given, given.advantages, layout, None, **meta)
    prompt = torch.zeros(PROMPT, dtype=torch.long)
    ids = [torch.cat([prompt, row]) for row in rows(own.tokens)]
    data["input_ids"] = nested(ids)
    data["position_ids"] = nested([torch.arange(len(row)) for row in ids])
    data[STATES] = nested(rows(own.ref_hidden))
    low, high = CLIP_RANGE
    config = actor_config(
        str(as_loss) if as_loss.terms else None, BETA, clip_ratio_low=low, clip_ratio_high=high
    )
    loss_fn = functools.partial(ppo_loss, config=config)
    # verl 0.7 has logits in bfloat16, whatever it is told.
    widened = mock.patch("torch.autocast", lambda *_, **__: nullcontext())
    with widened if IS_LEGACY else nullcontext():
        value, _ = engine.forward_step(data, loss_fn, False)
    value.backward()
    assert hidden.grad is not None
    return hidden.grad


def experience(given: Batch, scores: Tensor, groups: tuple[str, ...] = ("a", "a", "b", "b")) -> Any:
    """What the trainer's advantage stage works on: scores on each answer's last token."""
    from verl import DataProto

    token_scores = torch.zeros_like(given.response_mask)
    token_scores[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = scores
    data = DataProto.from_dict(
        tensors={
            "response_mask": given.response_mask.clone(),
            "old_log_probs": given.old_log_probs.clone(),
            "ref_log_prob": given.ref_log_probs.clone(),
            "rollout_log_probs": given.rollout_log_probs.clone(),
            LOG_PROBS: given.teacher_log_probs.clone(),
            "token_level_scores": token_scores,
        }
    )
    data.non_tensor_batch["uid"] = np.array(groups, dtype=object)
    return data
