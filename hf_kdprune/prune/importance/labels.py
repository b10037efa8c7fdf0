"""Scores that see the labels: the task's own loss, by each gate. Baselines; no label is needed to rank well.

Both are derivatives of the loss of one sample: their mean size (Michel et al. 2019, Are Sixteen Heads Really Better than
One?), or the sum of their squares, the diagonal of the empirical Fisher (Kwon et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .asked import Asked
from .probe import Batch, Sums, Table, Weighted, derivatives


def taylor(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> tuple[Table, Table]:
    """Sum over samples of |d task loss / d gate|; first-order sizes do not add up: units that do the same all seem idle."""
    return of_labels(model, batches, asked).sizes()


def fisher(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> tuple[Table, Table]:
    """Sum over samples of (d task loss / d gate)^2."""
    return of_labels(model, batches, asked).squares()


def of_labels(model: PreTrainedModel, batches: Sequence[Batch], asked: Asked) -> Sums:
    """Derivatives of each sample's task loss.

    Raises:
        ValueError: The batches have no labels, or the model makes no loss of them.
    """

    def loss_of(output: object, batch: Batch, draw: torch.Generator) -> list[Weighted]:
        loss = getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                f"this importance is of the task's loss, and {type(model).__name__} gives none for a batch of "
                f"{sorted(batch)}: add labels to the batches, or rank by 'feature_loss', which needs none"
            )
        return [([loss * terms_of(batch)], None)]

    (sums,) = derivatives(model, batches, asked, loss_of, 1, labels=True)
    return sums


def terms_of(batch: Batch) -> int:
    """Of how many terms the model's loss of a batch is the mean: samples, or positions with a label."""
    labels: Tensor | None = batch.get("labels")
    return len(next(iter(batch.values()))) if labels is None or labels.dim() < 2 else int((labels != -100).sum())
