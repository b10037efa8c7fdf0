"""Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656.

Search: a unit's importance is the diagonal Fisher of its gate, F_u = sum over samples of (dL/dg_u)^2, L the task's loss.
For every number of heads, the most important ones stay and what the budget leaves is spent on the most important neurons;
the best sum of importance wins. Rearrangement: within each site, units are swapped greedily as long as the loss by the
site's full Fisher block, |sum of the removed units' gradients|^2, can be made smaller. Tuning: see `kwon_tuning`.
The Fisher is by sample, as in the paper; the authors' code squares the gradients of whole batches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kdprune.prune.budget import UNIT, WHOLE, Limit
from hf_kdprune.prune.sites import Sites

from .common import (
    Batch,
    Realiser,
    frozen_copy,
    gate_gradients,
    limit_of,
    plan_of,
    prunable,
    realise_tuned,
    task_losses,
)
from .kwon_tuning import rescale


def kwon(model: PreTrainedModel, batches: list[Batch], seed: int) -> Realiser:
    """Fisher mask search, rearrangement and tuning; nothing is random."""
    sites = prunable(model, batches)
    gradients = sample_gradients(model, sites, batches)
    fisher = {name: g.square().sum(0) for name, g in gradients.items()}

    def at(budget: str) -> PreTrainedModel:
        kept = search(sites, fisher, limit_of(budget, sites))
        kept = {name: rearranged(gradients[name], units) for name, units in kept.items()}
        plan = plan_of(sites, kept, budget, "kwon")
        tuned = frozen_copy(model)
        rescale(tuned, model, batches, sites, plan)
        return realise_tuned(model, tuned, sites, plan, batches)

    return at


def sample_gradients(model: PreTrainedModel, sites: Sites, batches: list[Batch]) -> dict[str, Tensor]:
    """Site name -> (samples, units) derivative of each sample's loss by each gate."""
    found = gate_gradients(model, sites, batches, lambda batch: task_losses(model, batch))
    tables = [gradients for _, _, gradients in found]
    return {site.name: torch.cat([table[site.name] for table in tables]) for site in sites}


def search(sites: Sites, fisher: dict[str, Tensor], limit: Limit) -> dict[str, list[int]]:
    """The units that stay: for each number of heads the rest of the budget on neurons, and the best of these."""
    heads, neurons = (ranked(sites, fisher, kind, limit) for kind in ("attention", "ffn"))
    room = math.floor(limit.allowed(sites)) - WHOLE[limit.counts](sites, {s.name: 0 for s in sites})
    head_cost, neuron_cost = (torch.tensor([0, *(u[1] for u in units)]).cumsum(0) for units in (heads, neurons))
    head_worth, neuron_worth = (
        torch.tensor([0.0, *(u[0] for u in units)], dtype=torch.float64).cumsum(0) for units in (heads, neurons)
    )
    numbers = torch.arange(int((head_cost <= room).sum()))
    fitting = torch.searchsorted(neuron_cost, room - head_cost[numbers], right=True) - 1
    best = int((head_worth[numbers] + neuron_worth[fitting]).argmax())
    kept: dict[str, list[int]] = {s.name: [] for s in sites}
    for _, _, name, unit in heads[:best] + neurons[: int(fitting[best])]:
        kept[name].append(unit)
    return kept


def ranked(sites: Sites, fisher: dict[str, Tensor], kind: str, limit: Limit) -> list[tuple[float, int, str, int]]:
    """(importance, cost, site name, unit) of all units of a kind, the most important first; what must stay before all."""
    sure = sum(float(f.sum()) for f in fisher.values()) + 1
    units = []
    for site in (s for s in sites if s.kind == kind):
        worth = fisher[site.name].clone()
        worth[worth.topk(site.least).indices] += sure
        cost = UNIT[limit.counts](site, sites)
        units += [(w, cost, site.name, i) for i, w in enumerate(worth.tolist())]
    return sorted(units, key=lambda unit: -unit[0])


def rearranged(gradients: Tensor, kept: list[int]) -> list[int]:
    """As many units, chosen by the full Fisher block of the site.

    The removed set starts as the least by the diagonal. Each other unit, ascending, is put in, and the unit whose leaving
    makes |sum of the removed gradients|^2 = 1^T F 1 smallest is taken out.

    Args:
        gradients: (samples, units).
        kept: Units that stay; only their number counts.
    """
    total = gradients.shape[1]
    if len(kept) in (0, total):
        return kept
    block = gradients.T @ gradients
    order = block.diagonal().argsort(stable=True)
    removed = torch.zeros(total, dtype=torch.bool)
    removed[order[: total - len(kept)]] = True
    rows = block[:, removed].sum(1)
    for unit in order[total - len(kept) :].tolist():
        removed[unit] = True
        rows += block[unit]
        leaving = (block.diagonal() - 2 * rows).masked_fill(~removed, torch.inf).argmin()
        removed[leaving] = False
        rows -= block[leaving]
    return (~removed).nonzero().flatten().tolist()
