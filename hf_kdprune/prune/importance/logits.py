"""The curvature of the outputs: how far the model's predictions would move if a unit went. No labels.

KL(p || p(g)) of the outputs has the curvature J^T (diag p - p p^T) J at g = 1; its root, times random numbers, is the probe.
For regression, and where labels are not exclusive, the same of a normal and of a Bernoulli distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...layers import positions_of
from .asked import Asked
from .feature_loss import under_covariance
from .probe import Batch, Table, Weighted, derivatives


def with_logits(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> tuple[Table, Table]:
    """The second loss and the curvature of the outputs, each normalised to sum 1: one forward and two backward passes."""
    features = under_covariance(model, teacher, batches, asked)

    def watch(output: object, batch: Batch, draw: torch.Generator) -> list[Weighted]:
        return [*features.watch(output, batch, draw), outputs_probe(output, batch, model.config, draw)]

    *mine, outputs = derivatives(model, batches, asked, watch, features.kinds + 1)
    parts = [features.scores(mine), outputs.squares()]
    sums = [sum(float(v.sum()) for v in values.values()) for values, _ in parts]
    values = {n: sum(v[n] / total for (v, _), total in zip(parts, sums, strict=True)) for n in parts[0][0]}
    errors = {n: sum((e[n] / total) ** 2 for (_, e), total in zip(parts, sums, strict=True)).sqrt() for n in values}
    return values, errors


def outputs_probe(output: object, batch: Batch, config: PretrainedConfig, generator: torch.Generator) -> Weighted:
    """Logits, and random numbers under the metric of their KL.

    Raises:
        ValueError: The model has no logits.
    """
    names = ("logits", "start_logits", "end_logits", "logits_per_image")
    logits = [output[name] for name in names if getattr(output, name, None) is not None]
    if not logits:
        raise ValueError(f"'feature_loss+logits' needs logits, and {type(output).__name__} has none: rank by 'feature_loss'")
    return logits, [root_times_noise(x, batch, config, generator) for x in logits]


def root_times_noise(logits: Tensor, batch: Batch, config: PretrainedConfig, generator: torch.Generator) -> Tensor:
    """Random numbers with the covariance diag(p) - p p^T in each row, 0 at padding, shaped like the logits."""
    noise = torch.randn(logits.shape, generator=generator).to(logits.device)
    x = logits.detach().float()
    if config.problem_type == "multi_label_classification":
        noise = noise * (x.sigmoid() * (1 - x.sigmoid())).sqrt()
    elif config.problem_type != "regression" and x.shape[-1] > 1:  # else a normal distribution of variance 1
        root = x.softmax(-1).sqrt()
        noise = root * noise - root**2 * (root * noise).sum(-1, keepdim=True)
    return (noise * positions_of(batch, logits)[..., None] if logits.dim() > 2 else noise).to(logits.dtype)
