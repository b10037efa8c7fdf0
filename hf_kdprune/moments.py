"""What sums over positions tell of the teacher's features: their variances, and the map into the student's space."""

from __future__ import annotations

import torch
from torch import Tensor


def moments_of(x: Tensor) -> Tensor:
    """Sums of the squares of [features, 1] (positions, width + 1), and of themselves: (2, width + 1)."""
    count = x.new_full((1,), len(x))
    return torch.stack([torch.cat([x.square().sum(0), count]), torch.cat([x.sum(0), count])])


def joint_moments(x: Tensor, y: Tensor) -> Tensor:
    """Second moments of [teacher features, 1, student features]: square, of the size of the three together."""
    joint = torch.cat([x, x.new_ones(len(x), 1), y], 1)
    return joint.T @ joint


def unprojected(moments: Tensor, width: int) -> tuple[Tensor, None]:
    """Variances from `moments_of`, (width,), and no projection."""
    squares, sums = moments[:, :width] / moments[0, width]
    return (squares - sums.square()).float(), None


def projected(moments: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Variances in the student's space, and the map there that fits the student best by ridge least squares.

    Args:
        moments: See `joint_moments`.
        width: Hidden size of the teacher.

    Returns:
        (student hidden,), and (width + 1, student hidden), the last row a bias.
    """
    count = moments[width, width]
    mean = moments[:width, width] / count
    covariance = moments[:width, :width] / count - torch.outer(mean, mean)
    gram = moments[: width + 1, : width + 1]
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(width + 1, dtype=gram.dtype)
    projection = torch.linalg.solve(gram + ridge, moments[: width + 1, width + 1 :])
    variances = (projection[:-1] * (covariance @ projection[:-1])).sum(0)
    return variances.float(), projection.float()
