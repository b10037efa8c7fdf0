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
from hf_kdprune.prune.budget import UNIT, WHOLE, Limit
from hf_kdprune.prune.sites import Site, Sites

from .common import Batch, Realiser, limit_of, plan_of, prunable, realise, task_losses


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
        share = ratios(sites, limit_of(budget, sites))
        kept = chosen(copy_with_gradients(scored), sites, batches[0], share)
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


def ratios(sites: Sites, limit: Limit) -> dict[str, float]:
    """Kind -> the share to remove, the same in all layers, as Torch-Pruning must be told it.

    One ratio for both kinds gives the number of heads, to the nearest; neurons take what the budget then leaves. Half a
    unit is added, since Torch-Pruning rounds what is kept down.

    Raises:
        ValueError: A layer would be left empty, which Torch-Pruning never does.
    """
    nothing = WHOLE[limit.counts](sites, {s.name: 0 for s in sites})
    room = limit.allowed(sites) - nothing
    share = room / (WHOLE[limit.counts](sites, None) - nothing)
    heads, neurons = ([s for s in sites if s.kind == kind] for kind in ("attention", "ffn"))
    kept = max(1, round(share * heads[0].total))
    room -= kept * sum(UNIT[limit.counts](s, sites) for s in heads)
    width = min(neurons[0].total, math.floor(room / sum(UNIT[limit.counts](s, sites) for s in neurons)))
    if width < 1:
        raise ValueError(f"Torch-Pruning empties no layer: choose a larger budget than {limit.counts}={limit.value}")
    return {"attention": left_out(kept, heads[0].total), "ffn": left_out(width, neurons[0].total)}


def left_out(kept: int, total: int) -> float:
    """The ratio at which Torch-Pruning keeps exactly `kept` of `total`."""
    return max(0.0, 1 - (kept + 0.5) / total)


def chosen(model: PreTrainedModel, sites: Sites, batch: Batch, share: dict[str, float]) -> dict[str, list[int]]:
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
        pruning_ratio=share["ffn"],
        head_pruning_ratio=share["attention"],
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
