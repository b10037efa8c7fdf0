"""Did the scores tell the truth? What each site's plan was predicted to cost in the second loss, beside what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ...layers import LayerMatch, count_real, evaluating
from ..discovery import find_sites
from ..sites import Plan
from ..trial import gates_at_zero
from .ablation import loss
from .asked import Asked
from .feature_loss import Features, under_covariance, under_variance
from .probe import Batch

MEASURED: dict[str, Callable[..., Features]] = {"feature_loss": under_covariance, "feature_loss:plain": under_variance}


@torch.no_grad()
def site_losses(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[Batch],
    plan: Plan,
    matches: list[LayerMatch] | None = None,
) -> dict[str, tuple[float, float]]:
    """Gate one site at a time as planned, the others whole, and measure the rise of the second loss.

    Takes about one forward pass over the batches: each site is measured on as many of them as that allows.

    Args:
        model: The model before surgery.
        teacher: Another teacher; None: the model itself.
        batches: Those that ranked the units.
        plan: Made from scores that are a loss: "feature_loss" or "feature_loss:plain"; others predict none.
        matches: As for `score_units`.

    Returns:
        Site name -> (sum of the scores of its removed units, measured rise), of sites that lose units.
    """
    cut = [site for site in plan.sites if site.removed and site.scores]
    if plan.importance not in MEASURED or not cut:
        return {}
    sites = find_sites(model, batches[0], plan.budget.get("seq_len"))
    some = list(batches[:: min(len(batches), len(cut))])
    features = MEASURED[plan.importance](model, teacher, batches, Asked(sites, matches))
    features = replace(features, teacher=model if teacher is None else teacher)
    scale, found = count_real(batches) / max(count_real(some), 1), {}
    with evaluating(*(m for m in (model, teacher) if m is not None)):
        taught = [features.taught(batch) for batch in some]
        whole = loss(model, some, features, taught).sum()
        for site in cut:
            kept = {s.name: site.kept if s.name == site.name else range(s.total) for s in plan.sites}
            with gates_at_zero(model, {name: list(units) for name, units in kept.items()}, sites):
                rise = loss(model, some, features, taught).sum() - whole
            found[site.name] = (sum(site.scores[unit] for unit in site.removed), float(rise) * scale)
    return found
