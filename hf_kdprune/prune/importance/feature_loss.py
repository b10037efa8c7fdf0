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
from ...ranks import Ranks
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
    return features.scores(derivatives(model, batches, asked, features.watch, features.kinds))


@dataclass(frozen=True)
class Features:
    """The second loss on a set of batches.

    Attributes:
        matches: Layers that have units before them.
        roots: Of the metric, (hidden, hidden) for each; scaled so that the squares sum to the loss of the whole set.
        by_position: Whether an error is taken over the root mean square of the teacher's features at its position.
        teacher: Another model; None: the student itself.
    """

    matches: list[LayerMatch]
    roots: list[Tensor]
    by_position: bool
    teacher: PreTrainedModel | None

    @property
    def kinds(self) -> int:
        """How many things `watch` asks for."""
        return 1 if self.teacher is None else 2

    def watch(self, output: object, batch: Batch, draw: torch.Generator) -> list[Weighted]:
        """The slope of the loss itself where the teacher is another model, then the probe."""
        states = states_of(output)
        learnt = [states[m.student] for m in self.matches]
        taught = learnt if self.teacher is None else self.taught(batch)
        layers = list(zip(learnt, taught, self.roots, strict=True))
        probe = [noise(x, positions_of(batch, x), draw) @ r / self.size(t) for x, t, r in layers]
        first: list[Weighted] = [] if self.teacher is None else [(learnt, self.slopes(layers, batch))]
        return [*first, (learnt, probe)]

    @torch.no_grad()
    def slopes(self, layers: Sequence[tuple[Tensor, Tensor, Tensor]], batch: Batch) -> list[Tensor]:
        """The derivative of the second loss by the student's features of each layer, in float32."""
        apart = [(x.float() - t.float()) / self.size(t) * positions_of(batch, x)[..., None] for x, t, _ in layers]
        return [2 * (e @ r @ r.T) / self.size(t) for e, (_, t, r) in zip(apart, layers, strict=True)]

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
        apart = [at_real((x.float() - t.float()) / self.size(t), batch) for x, t in zip(learnt, taught, strict=True)]
        return torch.stack([(e @ r).square().sum() for e, r in zip(apart, self.roots, strict=True)])

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
    some = enough(batches, max(m.width for m in matches))
    with evaluating(source):
        roots = [root_of(sigma) for sigma in covariances(source, some, matches, asked.ranks)]
    scaled = [(w / count_real(batches)) ** 0.5 * r.to(model.device) for w, r in zip(weights, roots, strict=True)]
    return Features(matches, scaled, True, teacher)


def under_variance(model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked) -> Features:
    """The second loss under the variance of the teacher's features, see `plain`."""
    matches = with_units(model, teacher, batches, asked)
    sizes = [len(matches) * count_real(batches) * m.width * m.variance for m in matches]
    roots = [torch.eye(m.width, device=model.device) / n**0.5 for m, n in zip(matches, sizes, strict=True)]
    return Features(matches, roots, False, teacher)


def with_units(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> list[LayerMatch]:
    """The mapped layers less the embeddings, before which no unit lies."""
    found = asked.matches or match_layers(model, teacher, batches, ranks=asked.ranks)
    return [m for m in found if m.student > 0]


@torch.no_grad()
def covariances(model: PreTrainedModel, batches: Sequence[Batch], matches: Sequence[LayerMatch], ranks: Ranks) -> list[Tensor]:
    """Of the features of each mapped layer, each position over its root mean square: (hidden, hidden) in float64."""
    sums = [torch.zeros(match.width + 1, match.width, dtype=torch.float64, device=model.device) for match in matches]
    for _, batch in ranks.share(batches):
        for mine, features in zip(sums, target_features(model, batch, matches), strict=True):
            t = at_real(features.float() / root_mean_square(features), batch)
            mine += torch.cat([t.T @ t, t.sum(0, keepdim=True)]).to(mine)
    total, found = count_real(batches), []
    for match, mine in zip(matches, sums, strict=True):
        moments = ranks.total(mine) / total
        check_finite(moments, match.teacher)  # of the sum, so that all processes stop
        found.append((moments[:-1] - torch.outer(moments[-1], moments[-1])).cpu())
    return found


def root_of(covariance: Tensor) -> Tensor:
    """Sigma^(1/2) / tr(Sigma), (hidden, hidden)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T / values.sum()).float()
