"""flash_attn.bert_padding in plain torch: rows of real tokens, and back."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad


def index_first_axis(rows: Tensor, indices: Tensor) -> Tensor:
    return rows[indices]


def unpad_input(
    hidden: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of (batch, length, ...) where the mask is 1, and what it takes to put them back."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = torch.nonzero(attention_mask.flatten()).flatten()
    cumulative = pad(torch.cumsum(lengths, 0, dtype=torch.int32), (1, 0))
    rows = rearrange(hidden, "b s ... -> (b s) ...")[indices]
    return rows, indices, cumulative, int(lengths.max()), lengths


def pad_input(rows: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """The inverse of unpad_input; padding is zero."""
    hidden = rows.new_zeros(batch * length, *rows.shape[1:])
    hidden[indices] = rows
    return rearrange(hidden, "(b s) ... -> b s ...", b=batch)
