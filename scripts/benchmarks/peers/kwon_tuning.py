"""Mask tuning of Kwon et al. 2022 (arXiv 2204.09656): the values of the kept units' gates, by least squares.

Bottom to top, so that each sub-layer's output is again that of the whole model: LSMR with damping 1 around 1, and tuning ends
at the first site where a value leaves [-10, 10]. As in the authors' code, the attention of the first block is not tuned, that
of others has a constant beside it in the fit, and the last FFN of a sentence classifier is fitted at the first position alone.
"""

from __future__ import annotations

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor
from transformers import PreTrainedModel

from hf_kdprune.prune.sites import Plan, Site, Sites

from .common import Batch, channels
from .streams import Sums, sublayer_sums

DAMPING, LARGEST, ITERATIONS = 1.0, 10.0, 100_000


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
    solution, stopped, *_ = lsmr(a.cpu().numpy(), (b - a.sum(1)).cpu().numpy(), damp=DAMPING, maxiter=ITERATIONS)
    values = torch.from_numpy(solution)[: len(kept)] + 1
    return values if stopped < 3 and bool((values.abs() <= LARGEST).all()) else None


def by_unit(table: Tensor, width: int) -> Tensor:
    """Sum of the first dimension over the channels of each unit."""
    return table.unflatten(0, (-1, width)).sum(1)
