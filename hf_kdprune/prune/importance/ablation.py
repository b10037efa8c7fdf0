"""The exact score: the second loss with one unit's gate at 0, one unit at a time. For checks, and for small models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...layers import evaluating, hidden_states
from ..sites import Site
from ..trial import gates_at_zero
from .asked import Asked
from .feature_loss import Features, under_covariance
from .probe import Batch, Table, spread


@torch.no_grad()
def ablation(
    model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked
) -> tuple[Table, Table]:
    """What the second loss is more if a unit goes: a pass over the batches for each unit.

    The standard error is that over batches: the score is exact on these samples, which are a sample themselves.
    """
    features = replace(under_covariance(model, teacher, batches, asked), teacher=model if teacher is None else teacher)
    mine = [batch for _, batch in asked.ranks.share(batches)]
    sums = {s.name: torch.zeros(2, s.total, dtype=torch.float64) for s in asked.sites}
    with evaluating(*(m for m in (model, teacher) if m is not None)):
        taught = [features.taught(batch) for batch in mine]
        whole = loss(model, mine, features, taught)
        units = [(site, unit) for site in asked.sites for unit in range(site.total)]
        for site, unit in tqdm(units, desc="ablate", unit="unit", disable=None, leave=False):
            with gates_at_zero(model, without(asked.sites, site, unit), asked.sites):
                rise = loss(model, mine, features, taught) - whole
            sums[site.name][:, unit] = torch.stack([rise.sum(), rise.square().sum()])
    totals = {name: asked.ranks.total(found) for name, found in sums.items()}
    values = {name: rises for name, (rises, _) in totals.items()}
    return values, {name: spread(*found, len(batches)) for name, found in totals.items()}


def without(sites: Sequence[Site], site: Site, unit: int) -> dict[str, list[int]]:
    """Site name -> units kept: all but one."""
    return {s.name: [u for u in range(s.total) if s is not site or u != unit] for s in sites}


def loss(model: PreTrainedModel, batches: Sequence[Batch], features: Features, taught: Sequence[Sequence[Tensor]]) -> Tensor:
    """The share of each batch in the second loss, (batches,) in float64."""
    pairs = zip(batches, taught, strict=True)
    return torch.tensor([float(features.errors(hidden_states(model, b), b, t).sum()) for b, t in pairs], dtype=torch.float64)
