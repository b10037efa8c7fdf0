"""Scores that see no loss: what every ranking has to beat."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..allocation import Scores
from ..describe import per_unit
from ..sites import Sites
from .asked import Asked

Table = dict[str, Tensor]


def magnitude(model: PreTrainedModel, teacher: PreTrainedModel | None, batches: object, asked: Asked) -> tuple[Table, Table]:
    """Mean squared weight of all that a unit owns: its rows of the producers and its columns of the consumer."""
    values = {}
    for site in asked.sites:
        squares, numbers = torch.zeros(site.total, dtype=torch.float64), 0
        for cut in (c for c in site.cuts if "bias" not in c.name):
            numbers += per_unit(model, cut)
            weight = getattr(model.get_submodule(cut.path), cut.tensor).detach()
            entries = weight.double().square().movedim(cut.dim, 0).flatten(1).sum(1).cpu()
            squares += entries[torch.tensor([cut.indices([u]) for u in range(site.total)])].sum(1)
        values[site.name] = squares / numbers
    return values, {name: torch.zeros_like(v) for name, v in values.items()}


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
