"""K-prune: Park et al. 2024, "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models" (ICLR),
arXiv 2308.03449.

Sub-layer by sub-layer from the bottom: (1) measure the knowledge of all channels c of this and the later sub-layers in the
model as it is by now,

    predictive(c) = 1 / 2N * sum over groups of 32 samples of ( d KL / d g_c )^2    KL = mean of T^2 KL(teacher/T || model/T)
    representational(c) = mean over tokens of x_c^2 * mean over outputs of W_c^2
    score(u) = sum over the channels of u of (predictive + lambda * representational) / cost of u

(2) remove the units of this sub-layer that lie below the threshold at which all of these sub-layers together meet what is
left of the budget, (3) refit the output projection by least squares to the uncompressed model's stream behind it.
T = 2 and lambda = 2.5e-4 as published; the published weight of heads, mu = 64, only turns the authors' mean over a head's
64 channels into the sum. KL is zero before anything is removed, so the first sub-layer is cut by the representational
knowledge alone: this is the method's own.

Simplifications: in models of more than 24 sub-layers (BERT-base, for which it was made, has 24) knowledge is measured at
every n-th of them, 24 times at most; in language models the KL of a sample is the mean over its real tokens; what least
squares cannot determine (units without activation) takes the solution of least norm.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_kdprune.layers import inputs_of, real_positions
from hf_kdprune.prune.budget import UNIT, WHOLE, Limit
from hf_kdprune.prune.sites import Site, Sites

from .common import Batch, Realiser, channels, frozen_copy, gate_gradients, limit_of, plan_of, prunable, realise_tuned
from .streams import Sums, sublayer_sums

TEMPERATURE, LAMBDA, GROUP, MEASUREMENTS = 2.0, 2.5e-4, 32, 24


def kprune(model: PreTrainedModel, batches: list[Batch], seed: int) -> Realiser:
    """Knowledge-preserving pruning; its scores depend on what was cut already, so each budget measures anew."""
    sites = prunable(model, batches)

    def at(budget: str) -> PreTrainedModel:
        limit = limit_of(budget, sites)
        room = limit.allowed(sites) - WHOLE[limit.counts](sites, {s.name: 0 for s in sites})
        teacher, tuned = frozen_copy(model), frozen_copy(model)
        step = math.ceil(len(sites) / MEASUREMENTS)
        kept: dict[str, list[int]] = {}
        for i, site in enumerate(sites):
            if i % step == 0:
                scores = knowledge(tuned, teacher, rest_of(sites, i), batches)
            kept[site.name] = survivors(rest_of(sites, i), scores, limit, room)
            room -= UNIT[limit.counts](site, sites) * len(kept[site.name])
            cut(tuned, teacher, batches, site, kept[site.name])
        plan = plan_of(sites, kept, budget, "kprune")
        return realise_tuned(model, tuned, sites, plan, batches)

    return at


def rest_of(sites: Sites, start: int) -> Sites:
    """The sites from `start` on."""
    return Sites(sites[start:], other_macs=sites.other_macs, other_params=sites.other_params, seq_len=sites.seq_len)


def knowledge(model: PreTrainedModel, teacher: PreTrainedModel, sites: Sites, batches: list[Batch]) -> dict[str, Tensor]:
    """Site name -> (units,) knowledge of each unit, not yet divided by its cost."""
    by_channel = rest_of(sites, 0)
    by_channel[:] = [replace(s, total=s.total * s.width, width=1) for s in sites]
    derivatives: dict[str, list[Tensor]] = {s.name: [] for s in by_channel}
    squares = {s.name: torch.zeros(s.total, dtype=torch.float64) for s in by_channel}
    tokens = sum(int(real_positions(batch).sum()) for batch in batches)
    found = gate_gradients(model, by_channel, batches, lambda batch: divergence(model, teacher, batch))
    for batch, reads, gradients in found:
        mask = real_positions(batch)[..., None]
        for site in by_channel:
            derivatives[site.name].append(gradients[site.name].float())
            squares[site.name] += (reads[site.name][0].detach() * mask).double().square().sum((0, 1)).cpu()
    scores = {}
    for site in sites:
        weights = sum(model.get_submodule(c).weight.double().square().mean(0).cpu() for c in site.consumers)
        known = predictive(torch.cat(derivatives[site.name])) + LAMBDA * squares[site.name] / tokens * weights
        scores[site.name] = known.unflatten(0, (site.total, site.width)).sum(1)
    return scores


def predictive(gradients: Tensor) -> Tensor:
    """(samples, channels) derivatives of each sample's KL -> (channels,) 1 / 2N * sum of (mean over 32 samples)^2."""
    return sum(group.double().mean(0).square() for group in gradients.split(GROUP)) / (2 * len(gradients))


def divergence(model: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> Tensor:
    """(batch,) T^2 KL of the outputs; for one output the squared error, for language models the mean over real tokens."""
    with torch.no_grad():
        wanted = teacher(**inputs_of(batch)).logits.float()
    logits = model(**inputs_of(batch)).logits.float()
    if logits.shape[-1] == 1:
        return (logits - wanted).square().flatten(1).mean(1)
    pair = ((x / TEMPERATURE).log_softmax(-1) for x in (logits, wanted))
    each = F.kl_div(*pair, reduction="none", log_target=True).sum(-1) * TEMPERATURE**2
    if each.dim() == 1:
        return each
    mask = real_positions(batch)
    return (each * mask).sum(1) / mask.sum(1)


def survivors(sites: Sites, scores: dict[str, Tensor], limit: Limit, room: float) -> list[int]:
    """Units of the first of `sites` that stay when the least units of all `sites` go until the rest fits into `room`."""
    costs = [UNIT[limit.counts](s, sites) for s in sites]
    density = []
    for site, cost in zip(sites, costs, strict=True):
        each = scores[site.name] / cost
        each[each.topk(site.least).indices] = torch.inf
        density.append(each)
    cost = torch.cat([torch.full_like(d, c) for d, c in zip(density, costs, strict=True)])
    order = torch.cat(density).argsort(descending=True, stable=True)
    fits = cost[order].cumsum(0) <= room
    return sorted(unit for unit in order[fits].tolist() if unit < sites[0].total)


@torch.no_grad()
def cut(tuned: PreTrainedModel, teacher: PreTrainedModel, batches: list[Batch], site: Site, kept: list[int]) -> None:
    """Silence the other units of a sub-layer and refit its output projection, in place."""
    removed = sorted(set(range(site.total)) - set(kept))
    for part in site.parts:
        weight = tuned.get_submodule(part.consumer).weight
        weight[:, channels(removed, site.width)] = 0
        if kept:
            weight.copy_(reconstruction(sublayer_sums(tuned, teacher, batches, part), channels(kept, site.width)))


def reconstruction(sums: Sums, kept: Tensor) -> Tensor:
    """(hidden, channels) the weight that brings the stream back best, 0 for channels that are not kept."""
    kept = kept.to(sums.xx.device)
    found = torch.zeros_like(sums.xy[:-1])
    found[kept] = torch.linalg.pinv(sums.xx[kept][:, kept], hermitian=True, rtol=1e-10) @ sums.xy[kept]
    return found.T
