"""What the positions of a text have to do with each other, the same in student and teacher: widths need not be equal.

Source: Wang et al. 2020, MiniLM; Wang et al. 2021, MiniLMv2. There the relations are those of queries, keys and values, which
pruning takes from some heads and not from others; here they are those of the hidden states, which are whole in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .logits import divergence

HEADS = 12  # at most, as in MiniLM; each costs (batch, seq, seq) of memory, and in few heads a position is like itself alone


def relations(student: Tensor, teacher: Tensor, mask: Tensor, variance: float) -> Tensor:
    """KL of the teacher's relations to the student's: the mean over relation heads, the sum over real positions.

    A relation is a distribution over the real positions of a sample: the softmax of a position's scaled products with them.
    There are as many relation heads as divide both widths, at most HEADS.

    Args:
        student: Features (batch, seq, hidden).
        teacher: Features (batch, seq, any hidden).
        mask: (batch, seq), True at real positions.
        variance: Not used: the loss is in nats.
    """
    heads = next(n for n in range(HEADS, 0, -1) if student.shape[-1] % n == 0 and teacher.shape[-1] % n == 0)
    ours, theirs = (products(features, mask, heads) for features in (student, teacher.detach()))
    rows = mask[:, None].expand(ours.shape[:-1])
    return divergence(ours, theirs, rows, 1.0, "forward_kl") / heads


def products(features: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Of positions with positions, over the root of a head's width: (batch, heads, seq, seq), lowest at padded columns."""
    x = torch.where(mask[..., None], features, 0).to(torch.promote_types(features.dtype, torch.float32))
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    x = x / x.shape[-1] ** 0.25
    with torch.autocast(x.device.type, enabled=False):
        out = x @ x.transpose(-1, -2)
    return out.masked_fill_(~mask[:, None, None], torch.finfo(out.dtype).min)
