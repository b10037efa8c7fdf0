"""How far the student's features span the same as the teacher's, whatever their directions, scale and width.

Source: Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, linear CKA.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cka(student: Tensor, teacher: Tensor, mask: Tensor, variance: float) -> Tensor:
    """One minus linear CKA over the real positions of each sample, summed over samples.

    That of a whole batch is no sum over its samples, and would change with the size of micro-batches. A sample that cannot
    tell adds nothing: one of fewer than two real positions, or where the teacher's are all alike. Of few positions and many
    dimensions CKA is high for any features (Murphy et al. 2024): compare losses at equal lengths only.

    Args:
        student: Features (batch, seq, hidden).
        teacher: Features (batch, seq, any hidden).
        mask: (batch, seq), True at real positions.
        variance: Not used: CKA has no unit.
    """
    s, t = (gram(features, mask) for features in (student, teacher.detach()))
    both, ours, theirs = ((a * b).sum((1, 2)) for a, b in ((s, t), (s, s), (t, t)))
    aligned = both / (ours * theirs).clamp(min=torch.finfo(both.dtype).tiny).sqrt()
    return torch.where(theirs > 0, 1 - aligned, 0).sum()


def gram(features: Tensor, mask: Tensor) -> Tensor:
    """Products of positions, centred over the real ones, of trace one: (batch, seq, seq), 0 where one is padding.

    All 0 where positions differ by no more than rounding.
    """
    x = torch.where(mask[..., None], features, 0).to(torch.promote_types(features.dtype, torch.float32))
    centred = x - (x.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))[:, None]
    centred = torch.where(mask[..., None], centred, 0)
    whole, size = (y.detach().flatten(1).norm(dim=1)[:, None, None] for y in (x, centred))  # CKA has no scale: no derivative
    varies = size > 8 * torch.finfo(x.dtype).eps * whole
    x = torch.where(varies, centred / size.where(varies, 1), 0)
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.transpose(1, 2)
