"""Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656.

Search: a unit's importance is the diagonal Fisher of its gate, F_u = sum over samples of (dL/dg_u)^2, L the task's loss.
For every number of heads, the most important ones stay and what the budget leaves is spent on the most important neurons;
the best sum of importance wins. Rearrangement: within each site, units are swapped greedily as long as the loss by the
site's full Fisher block, |sum of the removed units' gradients|^2, can be made smaller. Tuning: bottom to top, the values
of the kept units' gates are fitted by least squares so that the sub-layer's output is again that of the whole model:
LSMR with damping 1 around 1, and tuning ends at the first site where a value leaves [-10, 10].

As in the authors' code, the attention of the first block is not tuned, that of others has a constant beside it in the fit,
and the last FFN of a sentence classifier is fitted at the first position alone. The Fisher is by sample, as in the paper.
"""

from __future__ import annotations

import math

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor
from transformers import PreTrainedModel

from hf_kdprune.prune.budget import UNIT, WHOLE, Limit
from hf_kdprune.prune.sites import Plan, Site, Sites

from .common import (
    Batch,
    Realiser,
    channels,
    frozen_copy,
    gate_gradients,
    limit_of,
    plan_of,
    prunable,
    realise_tuned,
    task_losses,
)
from .streams import Sums, sublayer_sums

DAMPING, LARGEST = 1.0, 10.0


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


@torch.no_grad()
def rescale(tuned: PreTrainedModel, model: PreTrainedModel, batches: list[Batch], sites: Sites, plan: Plan) -> None:
    """Set the gates' values in the output projections of `tuned`: 0 for removed units, fitted ones for those that stay."""
    for site in sites:
        for part in site.parts:
            weight = tuned.get_submodule(part.consumer).weight
            weight[:, channels(plan[site.name].removed, site.width)] = 0
    last = [s.name for s in sites if s.kind == "ffn"][-1:]
    for site in sites:
        kept = plan[site.name].kept
        if not kept or (site.kind == "attention" and site.layer == 0):
            continue
        for part in site.parts:
            first_only = site.name in last and reads_first(tuned, sites, batches[0])
            sums = sublayer_sums(tuned, model, batches, part, first_only)
            weight = tuned.get_submodule(part.consumer).weight
            values = scales(sums, weight, site, kept)
            if values is None:
                return
            weight[:, channels(kept, site.width)] *= values.to(weight).repeat_interleave(site.width)


def reads_first(model: PreTrainedModel, sites: Sites, batch: Batch) -> bool:
    """Whether the head is one that classifies sentences at their first token."""
    causal = any(getattr(model.get_submodule(p.core), "is_causal", False) for s in sites for p in s.parts if p.core)
    return not causal and "labels" in batch and batch["labels"].dim() == 1


def scales(sums: Sums, weight: Tensor, site: Site, kept: list[int]) -> Tensor | None:
    """The least-squares values of the kept units' gates, (kept,); None if the fit failed or one is beyond [-10, 10].

    With o_u = x_u W_u^T a unit's share of the output: A_uv = sum over tokens of o_u . o_v, b_u of o_u . target.
    """
    chosen = channels(kept, site.width).to(weight.device)
    w = weight.double()[:, chosen].T
    a = by_unit(by_unit((w @ w.T) * sums.xx[chosen][:, chosen], site.width).T, site.width)
    b = by_unit((w * sums.xy[chosen]).sum(1), site.width)
    if site.kind == "attention":  # a constant added to every output
        ones = by_unit(w.sum(1) * sums.xx[chosen, -1], site.width)
        corner = sums.xx[-1, -1] * w.shape[1]
        a = torch.cat([torch.cat([a, ones[:, None]], 1), torch.cat([ones, corner[None]])[None]])
        b = torch.cat([b, sums.xy[-1].sum()[None]])
    solution, stopped, *_ = lsmr(a.cpu().numpy(), (b - a.sum(1)).cpu().numpy(), damp=DAMPING)
    values = torch.from_numpy(solution)[: len(kept)] + 1
    return values if stopped < 3 and bool((values.abs() <= LARGEST).all()) else None


def by_unit(table: Tensor, width: int) -> Tensor:
    """Sum of the first dimension over the channels of each unit."""
    return table.unflatten(0, (-1, width)).sum(1)
