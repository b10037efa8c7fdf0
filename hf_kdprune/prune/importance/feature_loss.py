"""The second loss: how far the features would move if a unit went, from teacher and student features alone.

    score(u) = -dL2/dg_u + (J^T J)_uu        L2 = ||r||^2,  J = dr/dg,  g the gates

Where student and teacher are equal the first term is exactly zero and the curvature ranks. One backward pass of random
features, scaled by the metric, estimates it for all units at once. Source: METHOD.md 1 and 2; Hutchinson 1990.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...layers import (
    LayerMatch,
    at_real,
    check_finite,
    count_real,
    enough,
    evaluating,
    match_layers,
    positions_of,
    root_mean_square,
    states_of,
    target_features,
)
from .asked import Asked
from .probe import Batch, Sums, Table, Weighted, derivatives, noise, still


def covariance(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> tuple[Table, Table]:
    """Scores under the metric Sigma / tr(Sigma)^2: errors count in the directions in which the teacher varies.

    Features are compared as the next norm sees them, each position over its root mean square, so that the first token of a
    language model does not own the metric; the last layer counts as much as all others together, since what the head does
    not see of the others does no harm.
    """
    return curvature(model, teacher, batches, asked, under_covariance)


def plain(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> tuple[Table, Table]:
    """Scores under the metric 1 / (d Var): every direction, position and layer counts alike."""
    return curvature(model, teacher, batches, asked, under_variance)


def curvature(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[Batch],
    asked: Asked,
    measured: Callable[..., Features],
) -> tuple[Table, Table]:
    """Score every unit by one probe a batch, under a metric that is measured first."""
    features = measured(model, teacher, batches, asked)
    return features.scores(derivatives(model, batches, asked.sites, features.watch, features=True))


@dataclass(frozen=True)
class Features:
    """The second loss on a set of batches.

    Attributes:
        matches: Layers that have units before them.
        roots: Of the metric, (hidden, hidden) for each; scaled so that the squares sum to the loss of the whole set.
        by_position: Whether an error is taken over the root mean square of the teacher's features at its position.
        teacher: Another model; None: the student itself.
        generator: Of the probe.
    """

    matches: list[LayerMatch]
    roots: list[Tensor]
    by_position: bool
    teacher: PreTrainedModel | None
    generator: torch.Generator

    def watch(self, output: object, batch: Batch) -> list[Weighted]:
        """The loss itself where the teacher is another model, then the probe."""
        states = states_of(output)
        learnt = [states[m.student] for m in self.matches]
        taught = learnt if self.teacher is None else self.taught(batch)
        draws = [noise(x, positions_of(batch, x), self.generator) @ r for x, r in zip(learnt, self.roots, strict=True)]
        probe = [draw / self.size(t) for draw, t in zip(draws, taught, strict=True)]
        first: list[Weighted] = [] if self.teacher is None else [([self.errors(states, batch, taught).sum()], None)]
        return [*first, (learnt, probe)]

    def size(self, taught: Tensor) -> Tensor | float:
        """What errors are taken over: (batch, seq, 1)."""
        return root_mean_square(taught) if self.by_position else 1.0

    def taught(self, batch: Batch) -> list[Tensor]:
        """What the student's features should be."""
        with still(self.teacher):
            return target_features(self.teacher, batch, self.matches)

    def errors(self, states: Sequence[Tensor], batch: Batch, taught: Sequence[Tensor]) -> Tensor:
        """The share of the second loss of each layer on this batch, (layers,)."""
        learnt = [states[m.student] for m in self.matches]
        apart = [at_real((x - t) / self.size(t), batch) for x, t in zip(learnt, taught, strict=True)]
        return torch.stack([(e.float() @ r).square().sum() for e, r in zip(apart, self.roots, strict=True)])

    def scores(self, sums: Sequence[Sums]) -> tuple[Table, Table]:
        """Scores and their standard errors, from what `watch` asked for."""
        values, errors = sums[-1].squares()
        if self.teacher is not None:
            values = {name: value - sums[0].first[name] for name, value in values.items()}
        return values, errors


def under_covariance(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> Features:
    """The second loss under the covariance of the teacher's features, see `covariance`."""
    # One batch shows which layers there are; all are needed only where another teacher's width is to be projected.
    matches = with_units(model, teacher, batches[:1] if teacher is None else batches, asked)
    source = model if teacher is None else teacher
    others = [0.5 / (len(matches) - 1)] * (len(matches) - 1) if len(matches) > 1 else []
    weights = [*others, 0.5 if others else 1.0]
    some = enough(batches, max(len(m.covariance) for m in matches))
    with evaluating(source):
        roots = [root_of(sigma) for sigma in covariances(source, some, matches)]
    scaled = [(w / count_real(batches)) ** 0.5 * r.to(model.device) for w, r in zip(weights, roots, strict=True)]
    return Features(matches, scaled, True, teacher, torch.Generator().manual_seed(asked.seed))


def under_variance(model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked) -> Features:
    """The second loss under the variance of the teacher's features, see `plain`."""
    matches = with_units(model, teacher, batches, asked)
    sizes = [len(matches) * count_real(batches) * len(m.covariance) * m.variance for m in matches]
    roots = [torch.eye(len(m.covariance), device=model.device) / n**0.5 for m, n in zip(matches, sizes, strict=True)]
    return Features(matches, roots, False, teacher, torch.Generator().manual_seed(asked.seed))


def with_units(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> list[LayerMatch]:
    """The mapped layers less the embeddings, before which no unit lies."""
    return [m for m in asked.matches or match_layers(model, teacher, batches) if m.student > 0]


@torch.no_grad()
def covariances(model: PreTrainedModel, batches: Sequence[Batch], matches: Sequence[LayerMatch]) -> list[Tensor]:
    """Of the features of each mapped layer, each position over its root mean square: (hidden, hidden) in float64."""
    sums = [(0.0, 0.0)] * len(matches)
    for batch in batches:
        taught = [at_real(t / root_mean_square(t), batch) for t in target_features(model, batch, matches)]
        for match, features in zip(matches, taught, strict=True):
            check_finite(features, match.teacher)
        sums = [(xx + (t.T @ t).double(), x + t.sum(0).double()) for (xx, x), t in zip(sums, taught, strict=True)]
    total = count_real(batches)
    return [(xx / total - torch.outer(x / total, x / total)).cpu() for xx, x in sums]


def root_of(covariance: Tensor) -> Tensor:
    """Sigma^(1/2) / tr(Sigma), (hidden, hidden)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T / values.sum()).float()
