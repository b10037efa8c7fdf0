"""Minitron: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", arXiv 2407.14679.

    importance(u) = mean over samples of ( sum over tokens t and dims c of u of  x_tc^2 )^(1/2)

x is what the output projection reads: the L2 norm over the sequence, the mean over the batch. All layers are alike, and
nothing makes up for what went. The paper chooses between heads and neurons by training candidates; here both kinds lose
the least share of their importance in sum. Neurons are measured behind the activation, where the removed ones are read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kdprune.prune.allocation import Scores
from hf_kdprune.prune.sites import Sites

from .common import ROUND_TO, Batch, Realiser, activations, limit_of, prunable, realise


def minitron(model: PreTrainedModel, batches: list[Batch], seed: int) -> Realiser:
    """Activation norms in uniform layers; nothing is random."""
    sites = prunable(model, batches)
    shares = {name: norms / norms.sum() for name, norms in activation_norms(model, sites, batches).items()}
    scores = Scores(sites, shares, {name: torch.zeros_like(s) for name, s in shares.items()}, "minitron")

    def at(budget: str) -> PreTrainedModel:
        limit_of(budget, sites)
        return realise(model, scores.plan(budget, ROUND_TO, "uniform"), batches)

    return at


def activation_norms(model: PreTrainedModel, sites: Sites, batches: list[Batch]) -> dict[str, Tensor]:
    """Site name -> (units,) the mean norm of a unit's activation over a sample."""
    sums = {site.name: torch.zeros(site.total, dtype=torch.float64) for site in sites}
    for reads in activations(model, sites, batches):
        for site in sites:
            squares = reads[site.name].square().sum(1).double().cpu()  # (batch, total * width)
            sums[site.name] += squares.unflatten(-1, (site.total, site.width)).sum(-1).sqrt().sum(0)
    samples = sum(len(batch["input_ids"]) for batch in batches)
    return {name: total / samples for name, total in sums.items()}
