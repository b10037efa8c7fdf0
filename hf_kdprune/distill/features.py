"""Losses between the teacher's and the student's features (hidden states) at one mapped layer.

Each takes student and teacher features (positions, hidden), padding already left out, and the variance of the teacher's
features over the calibration data, and returns the mean loss of a position.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def mse(student: Tensor, teacher: Tensor, variance: float) -> Tensor:
    """Mean squared difference over the teacher's variance: 1 is as bad as its mean. Source: Romero et al. 2015, FitNets."""
    return (student - teacher).square().mean() / variance


def cosine(student: Tensor, teacher: Tensor, variance: float) -> Tensor:
    """One minus the cosine of the angle. Source: Sanh et al. 2019, DistilBERT."""
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


FEATURE_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"mse": mse, "cosine": cosine}
