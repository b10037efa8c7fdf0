"""Torch-Pruning: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900; the package itself.

First-order Taylor importance over the groups that its dependency graph finds, with the gradients of the task's loss over
all calibration samples; one ratio for the heads and the FFN of every layer, as in its example for BERT. Ignored are
all layers but query, key, value and the first of each FFN, so that the hidden size stays. It chooses; what it chose is cut
by our surgery, which removes the same rows and columns. Nothing makes up for what went.
"""

from __future__ import annotations

import copy
import math

from torch import nn
from transformers import PreTrainedModel

from hf_kdprune.layers import inputs_of
from hf_kdprune.prune.budget import WHOLE, Limit
from hf_kdprune.prune.sites import Site, Sites

from .common import Batch, Realiser, limit_of, plan_of, prunable, realise, task_losses

STEPS = 40  # of the bisection


def torch_pruning(model: PreTrainedModel, batches: list[Batch], seed: int) -> Realiser:
    """Taylor importance in uniform layers; nothing is random.

    Raises:
        ValueError: Queries share keys, or the FFN has a gate: Torch-Pruning then removes queries and keeps keys and values.
    """
    sites = prunable(model, batches)
    for site in sites:
        check_plain(model, site)
    scored = copy.deepcopy(model).eval().requires_grad_(True)
    scored.zero_grad()
    samples = sum(len(batch["input_ids"]) for batch in batches)
    for batch in batches:
        (task_losses(scored, batch).sum() / samples).backward()

    def at(budget: str) -> PreTrainedModel:
        limit = limit_of(budget, sites)
        kept = chosen(copy_with_gradients(scored), sites, batches[0], least_ratio(sites, limit))
        return realise(model, plan_of(sites, kept, budget, "torch_pruning"), batches)

    return at


def check_plain(model: PreTrainedModel, site: Site) -> None:
    """Raise unless the units are computed as in BERT."""
    rows = [model.get_submodule(path).weight.shape[0] for path in site.producers]
    expected = [site.total * site.width] * (3 if site.kind == "attention" else 1)
    if rows != expected:
        raise ValueError(
            f"{site.name}: the Torch-Pruning peer needs query, key and value of one size and an FFN of two layers; in groups "
            f"of queries it removes queries and keeps their keys and values, which is no unit of ours. Got rows {rows}"
        )


def copy_with_gradients(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that has the gradients too."""
    twin = copy.deepcopy(model)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    return twin


def counts(sites: Sites, ratio: float) -> dict[str, int]:
    """Site name -> units that Torch-Pruning keeps at `ratio`: it rounds heads and neurons down."""
    return {
        s.name: s.total - math.ceil(ratio * s.total) if s.kind == "attention" else int(s.total * (1 - ratio)) for s in sites
    }


def least_ratio(sites: Sites, limit: Limit) -> float:
    """The smallest ratio that meets the budget, by bisection.

    Raises:
        ValueError: It would leave a layer empty, which Torch-Pruning never does.
    """
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if WHOLE[limit.counts](sites, counts(sites, middle)) <= limit.allowed(sites):
            high = middle
        else:
            low = middle
    if not all(counts(sites, high).values()):
        raise ValueError(f"Torch-Pruning empties no layer: choose a larger budget than {limit.counts}={limit.value}")
    return high


def chosen(model: PreTrainedModel, sites: Sites, batch: Batch, ratio: float) -> dict[str, list[int]]:
    """Site name -> units that Torch-Pruning keeps; `model` has gradients and is pruned."""
    import torch_pruning as tp  # only here: the other peers do without

    attention = [path for s in sites if s.kind == "attention" for path in s.producers]
    heads = {path: s.total for s in sites if s.kind == "attention" for path in s.producers}
    roots = {*attention, *(path for s in sites if s.kind == "ffn" for path in s.producers)}
    leaves = [m for name, m in model.named_modules() if not list(m.children()) and name not in roots]
    pruner = tp.pruner.BasePruner(
        model,
        inputs_of({name: value[:1] for name, value in batch.items()}),
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=False,
        pruning_ratio=ratio,
        head_pruning_ratio=ratio,
        num_heads={model.get_submodule(path): total for path, total in heads.items()},
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[m for m in leaves if isinstance(m, nn.Linear | nn.Embedding | nn.LayerNorm)],
        in_channel_groups={},  # its defaults are shared between calls
        out_channel_groups={},
        output_transform=lambda output: output.logits.sum(),
    )
    names = {module: name for name, module in model.named_modules()}
    removed: dict[str, set[int]] = {}
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            if pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                removed.setdefault(names.get(dependency.target.module), set()).update(indices)
        group.prune()
    return {s.name: units_left(s, removed.get(s.producers[0], set())) for s in sites}


def units_left(site: Site, removed: set[int]) -> list[int]:
    """Units of a site of which no row was removed."""
    return [u for u in range(site.total) if not removed & set(range(u * site.width, (u + 1) * site.width))]
