"""``klplug.source``: the KL of a micro-batch on answers that the reference gave itself.

The policy goes forward once more, on stored answers, where OpenRLHF asks for its KL. Nothing of the
policy's own answers sees them: no mask, no advantage, no mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klplug import StoredKL, stored_kl
from klplug.hosting.stored import Answer, Stored
from klplug.spec import KLSpec


@dataclass(frozen=True)
class Micro:
    """The KL of some stored answers, each beside an answer of the policy's micro-batch.

    Attributes:
        kl: per token, (B, T).
        mask: (B, T), the stored answers' tokens.
        mean_length: tokens per answer of the whole file.
    """

    kl: StoredKL
    mask: Tensor
    mean_length: float

    def aggregated(self, loss: Tensor, by_token: bool, given: Mapping[str, Any]) -> Tensor:
        """As OpenRLHF aggregates the policy loss: a mean over tokens, or over answers.

        Args:
            loss: (B, T), zero where masked.
            by_token: whether each token counts alike, and not each answer.
            given: OpenRLHF's arguments, with the answers of the whole step where it counts those.
        """
        answers = loss.sum(-1)
        lengths = self.mask.sum(-1)
        answers = answers / (self.mean_length if by_token else lengths.clamp(min=1))
        total = given.get("global_batch_size")
        if total is None:
            total = (lengths > 0).sum().clamp(min=1)
        whole: Tensor = answers.sum() / total * given.get("dp_size", 1)
        return whole


def micro(spec: KLSpec, stored: Stored, trainer: Any, experience: Any) -> Micro:
    """The policy's forward over as many stored answers as the micro-batch has of its own."""
    beside = experience.action_mask.bool().any(-1, keepdim=True)
    answers = stored.drawn(experience.sequences, len(beside))
    sequences, attention, mask, ref_log_probs = padded(answers, experience.sequences.device)
    mask = mask * beside  # an answer without tokens counts for none, so nor does the one beside it
    log_probs, _ = trainer.actor(
        sequences,
        mask,
        attention_mask=attention,
        return_output=True,
        ring_attn_group=trainer.strategy.ring_attn_group,
        packed_seq_lens=None,
    )
    return Micro(stored_kl(spec, log_probs, ref_log_probs, mask), mask, stored.mean_length)


def padded(answers: list[Answer], device: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences and attention mask, (B, L); action mask and log ref, (B, L - 1).

    As OpenRLHF has them: prompt and answer side by side, and what belongs to a token stands where
    the token before it does.
    """
    shape = len(answers), max(len(own.prompt) + len(own.answer) for own in answers)
    sequences, attention, mask = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    log_probs = torch.zeros(shape)
    for i, own in enumerate(answers):
        start, end = len(own.prompt), len(own.prompt) + len(own.answer)
        sequences[i, :end] = torch.tensor([*own.prompt, *own.answer])
        attention[i, :end] = 1
        mask[i, start:end] = 1
        log_probs[i, start:end] = torch.tensor(own.log_probs)
    sequences, attention, mask, log_probs = (
        tensor.to(device) for tensor in (sequences, attention, mask, log_probs)
    )
    return sequences, attention, mask[:, 1:], log_probs[:, 1:]
