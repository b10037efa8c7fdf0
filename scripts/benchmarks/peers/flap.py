"""FLAP: An et al. 2023, "Fluctuation-based Adaptive Structured Pruning for Large Language Models", arXiv 2312.11983.

    fluctuation of channel c = Var over tokens(x_c) * |W_c|^2             "WIFV"; x is what the output projection W reads
    score = (fluctuation - mean over the layer) / std over the layer       "AL-AM": one list of all layers and both kinds
    bias += sum over the removed channels of  W_c mean(x_c)

As in the authors' code, an attention's fluctuations are squared before they are standardised, and a head's score is the mean
over its channels; the score alone gives the order, and a unit's cost only counts against the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_kdprune.prune.allocation import Scores
from hf_kdprune.prune.budget import UNIT
from hf_kdprune.prune.sites import Plan, Site, Sites

from .common import ROUND_TO, Batch, Realiser, activations, channels, limit_of, prunable, realise


@dataclass
class Moments:
    """Of what one output projection reads: mean and variance of each channel over real tokens, (channels,)."""

    mean: Tensor
    variance: Tensor


def flap(model: PreTrainedModel, batches: list[Batch], seed: int) -> Realiser:
    """Fluctuations, and biases that make up for what went; nothing is random."""
    sites = prunable(model, batches)
    moments = input_moments(model, sites, batches)
    standard = {s.name: standardised(fluctuations(model, s, moments[s.name]), s) for s in sites}
    errors = {name: torch.zeros_like(score) for name, score in standard.items()}

    def at(budget: str) -> PreTrainedModel:
        cost = UNIT[limit_of(budget, sites).counts]
        values = {s.name: standard[s.name] * cost(s, sites) for s in sites}  # the plan's order is by value / cost
        plan = Scores(sites, values, errors, "flap").plan(budget, ROUND_TO)
        smaller = realise(model, plan, batches)
        compensate(smaller, model, sites, plan, moments)
        return smaller

    return at


def input_moments(model: PreTrainedModel, sites: Sites, batches: list[Batch]) -> dict[str, Moments]:
    """Site name -> moments over the real tokens of all batches."""
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    sums = {s.name: torch.zeros(s.total * s.width, dtype=torch.float64) for s in sites}
    for reads in activations(model, sites, batches):
        for name, read in reads.items():
            sums[name] += read.double().sum((0, 1)).cpu()
    means = {name: total / tokens for name, total in sums.items()}
    squares = {name: torch.zeros_like(total) for name, total in sums.items()}
    for batch, reads in zip(batches, activations(model, sites, batches), strict=True):
        mask = batch["attention_mask"][..., None]
        for name, read in reads.items():  # around the mean, so that a constant has a variance of exactly 0
            squares[name] += ((read.double() - means[name].to(read.device)) * mask).square().sum((0, 1)).cpu()
    return {name: Moments(means[name], squares[name] / (tokens - 1)) for name in sums}


def fluctuations(model: PreTrainedModel, site: Site, moments: Moments) -> Tensor:
    """(channels,) the variance that a channel brings into the output."""
    weights = sum(model.get_submodule(c).weight.detach().double().square().sum(0).cpu() for c in site.consumers)
    return moments.variance * weights


def standardised(fluctuation: Tensor, site: Site) -> Tensor:
    """(units,) scores that can be compared between layers and kinds."""
    metric = fluctuation.square() if site.kind == "attention" else fluctuation
    return ((metric - metric.mean()) / metric.std()).unflatten(0, (site.total, site.width)).mean(1)


@torch.no_grad()
def compensate(smaller: PreTrainedModel, model: PreTrainedModel, sites: Sites, plan: Plan, moments: dict[str, Moments]) -> None:
    """Add what the removed channels gave on average to the biases of `smaller`; a projection without one gets one."""
    for site in sites:
        gone = channels(plan[site.name].removed, site.width)
        if not len(gone):
            continue
        for consumer in site.consumers:
            weight, linear = model.get_submodule(consumer).weight, smaller.get_submodule(consumer)
            shift = (weight[:, gone.to(weight.device)].double() @ moments[site.name].mean[gone].to(weight.device)).to(weight)
            linear.bias = nn.Parameter(shift if linear.bias is None else linear.bias + shift)
