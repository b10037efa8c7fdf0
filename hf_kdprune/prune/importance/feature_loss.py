"""The second loss: how far the features would move if a unit went, from teacher and student features alone.

    score(u) = -dL2/dg_u + (J^T J)_uu        L2 = ||r||^2,  J = dr/dg,  g the gates

Where student and teacher are equal the first term is exactly zero and the curvature ranks. One backward pass of random
features, scaled by the metric, estimates it for all units at once. Source: METHOD.md 1 and 2; Hutchinson 1990.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...layers import LayerMatch, at_real, match_layers, positions_of, real_positions, states_of, target_features
from .asked import Asked
from .probe import Batch, Sums, Table, Weighted, derivatives, noise, still


def covariance(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> tuple[Table, Table]:
    """Scores under the metric Sigma / tr(Sigma)^2: errors count in the directions in which the teacher varies."""
    return curvature(model, teacher, batches, asked, covariance_root)


def plain(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> tuple[Table, Table]:
    """Scores under the metric 1 / (d Var): every direction counts alike."""
    return curvature(model, teacher, batches, asked, plain_root)


def covariance_root(match: LayerMatch) -> Tensor:
    """Sigma^(1/2) / tr(Sigma), (hidden, hidden)."""
    values, vectors = torch.linalg.eigh(match.covariance.double())
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T / values.sum()).float()


def plain_root(match: LayerMatch) -> Tensor:
    """1 / sqrt(d Var), (hidden, hidden)."""
    return torch.eye(len(match.covariance)) / (len(match.covariance) * match.variance) ** 0.5


def curvature(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[Batch],
    asked: Asked,
    root: Callable[[LayerMatch], Tensor],
) -> tuple[Table, Table]:
    """Score every unit by one probe a batch, under a metric given by its root."""
    features = Features.measured(model, teacher, batches, asked, root)
    return features.scores(derivatives(model, batches, asked.sites, features.watch, features=True))


@dataclass(frozen=True)
class Features:
    """The second loss on a set of batches.

    Attributes:
        matches: Layers that have units before them.
        roots: Of the metric, (hidden, hidden) for each; scaled so that the squares sum to the loss of the whole set.
        teacher: Another model; None: the student itself.
        generator: Of the probe.
    """

    matches: list[LayerMatch]
    roots: list[Tensor]
    teacher: PreTrainedModel | None
    generator: torch.Generator

    @classmethod
    def measured(
        cls,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        batches: Sequence[Batch],
        asked: Asked,
        root: Callable[[LayerMatch], Tensor] = covariance_root,
    ) -> Features:
        """Measure the teacher's features where that was not done."""
        matches = [m for m in asked.matches or match_layers(model, teacher, batches) if m.student > 0]
        scale = (len(matches) * sum(int(real_positions(b).sum()) for b in batches)) ** -0.5
        roots = [root(m).to(model.device) * scale for m in matches]
        return cls(matches, roots, teacher, torch.Generator().manual_seed(asked.seed))

    def watch(self, output: object, batch: Batch) -> list[Weighted]:
        """The loss itself where the teacher is another model, then the probe."""
        states = states_of(output)
        learnt = [states[m.student] for m in self.matches]
        probe = [noise(x, positions_of(batch, x), self.generator) @ r for x, r in zip(learnt, self.roots, strict=True)]
        asked: list[Weighted] = [(learnt, probe)]
        if self.teacher is not None:
            asked.insert(0, ([self.errors(states, batch, self.taught(batch)).sum()], None))
        return asked

    def taught(self, batch: Batch) -> list[Tensor]:
        """What the student's features should be."""
        with still(self.teacher) if self.teacher is not None else nullcontext():
            return target_features(self.teacher, batch, self.matches)

    def errors(self, states: Sequence[Tensor], batch: Batch, taught: Sequence[Tensor]) -> Tensor:
        """The share of the second loss of each layer on this batch, (layers,)."""
        learnt = [states[m.student] for m in self.matches]
        apart = [(at_real(x, batch) - at_real(t, batch)) @ r for x, t, r in zip(learnt, taught, self.roots, strict=True)]
        return torch.stack([e.square().sum() for e in apart])

    def scores(self, sums: Sequence[Sums]) -> tuple[Table, Table]:
        """Scores and their standard errors, from what `watch` asked for."""
        values, errors = sums[-1].squares()
        if self.teacher is not None:
            values = {name: value - sums[0].first[name] for name, value in values.items()}
        return values, errors
