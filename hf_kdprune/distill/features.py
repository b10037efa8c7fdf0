"""Losses between the teacher's and the student's features (hidden states) at one mapped layer.

Each takes student and teacher features (batch, seq, hidden), which positions are real (batch, seq), and the variance of the
teacher's features over the calibration data, and returns the sum over items in float32 at least. Sums add up over micro-batches
and ranks; the table says what an item is, by whose number the caller divides. Padding is never read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .alignment import cka
from .relations import relations


def mse(student: Tensor, teacher: Tensor, mask: Tensor, variance: float) -> Tensor:
    """Squared difference over the teacher's variance: 1 is as bad as its mean. Source: Romero et al. 2015, FitNets."""
    s, t = real(student, mask), real(teacher.detach(), mask)
    return F.mse_loss(s, t, reduction="sum") / (s.shape[-1] * variance)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor, variance: float) -> Tensor:
    """One minus the cosine of the angle. Source: Sanh et al. 2019, DistilBERT."""
    return (1 - F.cosine_similarity(real(student, mask), real(teacher.detach(), mask), dim=-1)).sum()


def real(features: Tensor, mask: Tensor) -> Tensor:
    """Features at real positions, (positions, hidden), in float32 at least; without padding, no copy."""
    features = features.flatten(0, -2) if bool(mask.all()) else features[mask]
    return features.to(torch.promote_types(features.dtype, torch.float32))


class FeatureLoss(NamedTuple):
    """A row of the table.

    Attributes:
        loss: Student, teacher, mask, variance -> the sum over items.
        item: "positions" or "samples".
        projected: Whether the widths must be equal, and are made so by a projection where they are not.
    """

    loss: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    item: str
    projected: bool


FEATURE_LOSSES: dict[str, FeatureLoss] = {
    "mse": FeatureLoss(mse, "positions", True),
    "cosine": FeatureLoss(cosine, "positions", True),
    "relations": FeatureLoss(relations, "positions", False),
    "cka": FeatureLoss(cka, "samples", False),
}
