"""The shared tensors as verl passes them: jagged in its workers, padded in its trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from tests.one_meaning import Batch
from tests.verl.engine import nested

LENGTHS = (6, 4, 1, 5)
PROMPT = 2
KEYS = ("a_0_0", "a_1_0", "b_0_0", "b_1_0")


def rows(padded: Tensor) -> list[Tensor]:
    return [row[:length] for row, length in zip(padded, LENGTHS, strict=True)]


def micro_batch(given: Batch, advantages: Tensor, **meta: Any) -> TensorDict:
    """What ``ppo_loss`` is called with."""
    from verl.utils import tensordict_utils as tu

    tensors = {
        "prompts": nested([torch.zeros(PROMPT, dtype=torch.long) for _ in LENGTHS]),
        "responses": nested([torch.zeros(n, dtype=torch.long) for n in LENGTHS]),
        "response_mask": nested(rows(given.response_mask)),
        "old_log_probs": nested(rows(given.old_log_probs)),
        "ref_log_prob": nested(rows(given.ref_log_probs)),
        "rollout_log_probs": nested(rows(given.rollout_log_probs)),
        "advantages": nested(rows(advantages)),
    }
    info = {
        "dp_size": 1,
        "batch_num_tokens": int(given.response_mask.sum()),
        "global_batch_size": len(LENGTHS),
    }
    return tu.get_tensordict(tensors, {**info, **meta})


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


def loss(
    given: Batch,
    log_probs: Tensor,
    kl_loss_type: str | None,
    coef: float,
    advantages: Tensor | None = None,
    meta: dict[str, Any] | None = None,
    **actor: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's actor loss of one micro-batch."""
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=4,
        use_kl_loss=kl_loss_type is not None,
        kl_loss_coef=coef,
        kl_loss_type=kl_loss_type or "low_var_kl",
        **actor,
    )
    advantages = torch.zeros_like(log_probs.detach()) if advantages is None else advantages
    data = micro_batch(given, advantages, **(meta or {}))
    result: tuple[Tensor, dict[str, Any]] = ppo_loss(config, model_output(log_probs), data)
    return result


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
            "token_level_scores": token_scores,
        }
    )
    data.non_tensor_batch["uid"] = np.array(groups, dtype=object)
    return data
