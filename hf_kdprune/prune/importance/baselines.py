"""Scores that see no loss: what every ranking has to beat."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..allocation import Scores
from ..sites import Sites
from .asked import Asked

Table = dict[str, Tensor]


def magnitude(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: object, asked: Asked
) -> tuple[Table, Table]:
    """Mean squared weight of all that a unit owns: its rows of the producers and its columns of the consumer."""
    values = {}
    for site in asked.sites:
        rows = [model.get_submodule(p).weight.detach().double() for p in site.producers]
        columns = model.get_submodule(site.consumer).weight.detach().double().T
        squares = sum(w.reshape(site.total, -1).square().sum(1) for w in (*rows, columns))
        values[site.name] = (squares / ((len(rows) + 1) * site.hidden * site.width)).cpu()
    return values, {name: torch.zeros_like(v) for name, v in values.items()}


def random(
    model: PreTrainedModel | None, teacher: PreTrainedModel | None, batches: object, asked: Asked
) -> tuple[Table, Table]:
    """A lot for each unit, weighed by its cost so that heads and neurons are as likely to go."""
    generator, length = torch.Generator().manual_seed(asked.seed), asked.sites.seq_len
    lots = {s.name: torch.rand(s.total, generator=generator).double() for s in asked.sites}
    values = {s.name: lots[s.name] * s.unit_macs(length) for s in asked.sites}
    return values, {name: torch.zeros_like(v) for name, v in values.items()}


def random_scores(sites: Sites, seed: int) -> Scores:
    """Random scores without a model."""
    values, errors = random(None, None, None, Asked(sites, seed=seed))
    return Scores(sites, values, errors, "random")
