"""Scores that see no loss: what every ranking has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ...layers import inputs_of, positions_of
from ..allocation import Scores
from ..sites import Sites
from .asked import Asked
from .probe import Batch, Sums, Table, gate_inputs, still


def magnitude(model: PreTrainedModel, teacher: PreTrainedModel | None, batches: object, asked: Asked) -> tuple[Table, Table]:
    """Sum of the squared weights that a unit owns, its rows of the producers and its columns of the consumer.

    The sum, since a plan divides scores by costs, and a head of many weights costs as much more than a neuron of few.
    """
    values = {}
    for site in asked.sites:
        squares = torch.zeros(site.total, dtype=torch.float64)
        for cut in (c for c in site.cuts if "bias" not in c.name):
            weight = getattr(model.get_submodule(cut.path), cut.tensor).detach()
            entries = weight.double().square().movedim(cut.dim, 0).flatten(1).sum(1).cpu()
            squares += entries[torch.tensor([cut.indices([u]) for u in range(site.total)])].sum(1)
        values[site.name] = squares
    return values, {name: torch.zeros_like(v) for name, v in values.items()}


@torch.no_grad()
def activation(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> tuple[Table, Table]:
    """Sum over samples of the norm, over real positions, of what a unit hands to the output projection.

    Source: Muralidharan et al. 2024, Compact Language Models via Pruning and Knowledge Distillation (Minitron).
    """
    sums = Sums(asked.sites)
    with still(model), gate_inputs(model, asked.sites) as inputs:
        for _, batch in asked.ranks.share(batches):
            model(**inputs_of(batch))
            size = len(next(iter(batch.values())))
            sums.samples += size
            for site in asked.sites:
                squares = torch.zeros(size, site.total, dtype=torch.float64)
                for read in inputs[site.name]:
                    real = read.detach().float() * positions_of(batch, read)[..., None].view(*read.shape[:-1], 1)
                    units = real.reshape(size, -1, site.total, site.width)
                    squares += units.square().sum((1, 3)).double().cpu()
                sums.add(site, squares.sqrt())
    return sums.over(asked.ranks).sizes()


def random(
    model: PreTrainedModel | None, teacher: PreTrainedModel | None, batches: object, asked: Asked
) -> tuple[Table, Table]:
    """A lot for each unit, weighed by its cost so that heads and neurons are as likely to go."""
    generator = torch.Generator().manual_seed(asked.seed)
    lots = {s.name: torch.rand(s.total, generator=generator).double() for s in asked.sites}
    values = {s.name: lots[s.name] * s.unit_macs for s in asked.sites}
    return values, {name: torch.zeros_like(v) for name, v in values.items()}


def random_scores(sites: Sites, seed: int) -> Scores:
    """Random scores without a model."""
    values, errors = random(None, None, None, Asked(sites, seed=seed))
    return Scores(sites, values, errors, "random")
