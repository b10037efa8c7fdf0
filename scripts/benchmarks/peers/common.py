"""What the peers share: the task's loss by sample, what the output projections read, budgets, and plans made real."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_kdprune.layers import inputs_of, real_positions
from hf_kdprune.prune.budget import Budget, Limit
from hf_kdprune.prune.discovery import find_sites
from hf_kdprune.prune.importance import mean_length
from hf_kdprune.prune.importance.probe import gate_inputs, still, unit_gradients
from hf_kdprune.prune.sites import Plan, SitePlan, Sites
from hf_kdprune.prune.surgery import apply_plan

Batch = dict[str, Tensor]
Realiser = Callable[[str], PreTrainedModel]  # budget -> a new, smaller model
ROUND_TO = 1  # no peer was published with rounded widths


def prunable(model: PreTrainedModel, batches: list[Batch]) -> Sites:
    """The sites of `model`, MACs counted at the mean length of the calibration samples."""
    return find_sites(model, batches[0], mean_length(batches))


def limit_of(budget: str, sites: Sites) -> Limit:
    """What "macs=0.5" or "params=0.8" allows.

    Raises:
        ValueError: It counts something else, or cannot be reached.
    """
    parsed = Budget.parse(budget)
    parsed.check(sites)
    if parsed.limits[0].counts not in ("macs", "params"):
        raise ValueError(f'the peers are compared at budgets in "macs=" or "params=", got {budget!r}')
    return parsed.limits[0]


def plan_of(sites: Sites, kept: dict[str, list[int]], budget: str, importance: str) -> Plan:
    """The plan that keeps these units."""
    counts = {name: len(units) for name, units in kept.items()}
    (reached,) = Budget.parse(budget).reached(sites, counts).values()
    parts = [SitePlan(s.name, s.kind, s.layer, s.total, sorted(kept[s.name])) for s in sites]
    return Plan(parts, {"asked": budget, "reached": reached, "seq_len": sites.seq_len}, importance)


def realise(model: PreTrainedModel, plan: Plan, batches: list[Batch]) -> PreTrainedModel:
    """A smaller copy of `model`."""
    smaller = copy.deepcopy(model)
    apply_plan(smaller, plan, {name: value[:2] for name, value in batches[0].items()})
    return smaller


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy of `model` in eval mode, on whose output projections a peer works before surgery."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def channels(units: list[int], width: int) -> Tensor:
    """Inputs of the output projection that carry `units`, ascending."""
    return (torch.tensor(sorted(units), dtype=torch.long)[:, None] * width + torch.arange(width)).flatten()


@torch.no_grad()
def realise_tuned(
    model: PreTrainedModel, tuned: PreTrainedModel, sites: Sites, plan: Plan, batches: list[Batch]
) -> PreTrainedModel:
    """A smaller copy of `model` whose output projections are those of `tuned`, which has all units."""
    smaller = realise(model, plan, batches)
    for site in sites:
        for consumer in site.consumers:
            weight = tuned.get_submodule(consumer).weight
            kept = channels(plan[site.name].kept, site.width).to(weight.device)
            smaller.get_submodule(consumer).weight.copy_(weight[:, kept])
    return smaller


def task_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The task's own loss of each sample, (batch,).

    Classifiers: cross-entropy, or the squared error where there is one output. Causal language models: the mean
    cross-entropy of a sequence's real tokens after the first; labels are made from `input_ids` where there are none.

    Raises:
        ValueError: A classifier's batch has no labels.
    """
    logits = model(**inputs_of(batch)).logits.float()
    if logits.dim() == 3:
        labels = batch.get("labels", batch["input_ids"]).masked_fill(~real_positions(batch), -100)[:, 1:]
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return each.sum(1) / (labels != -100).sum(1).clamp(min=1)
    if "labels" not in batch:
        raise ValueError('this peer ranks by the task\'s loss: batches need "labels"')
    if logits.shape[-1] == 1:
        return F.mse_loss(logits[:, 0], batch["labels"].float(), reduction="none")
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def gate_gradients(
    model: PreTrainedModel, sites: Sites, batches: list[Batch], losses: Callable[[Batch], Tensor]
) -> Iterator[tuple[Batch, dict[str, list[Tensor]], dict[str, Tensor]]]:
    """The derivative of each sample's loss by each gate.

    Args:
        model: It is read, not changed.
        sites: Whose gates.
        batches: Calibration inputs.
        losses: Batch -> (batch,) loss of each sample, from a forward pass of `model`.

    Yields:
        The batch, what the output projections read as in `gate_inputs`, and site name -> (batch, units) derivatives.
    """
    with still(model), gate_inputs(model, sites) as inputs:
        for batch in batches:
            each = losses(batch)
            yield batch, inputs, {s.name: g for s, g in unit_gradients([each.sum()], None, inputs, sites, len(each))}


def activations(model: PreTrainedModel, sites: Sites, batches: list[Batch]) -> Iterator[dict[str, Tensor]]:
    """For each batch, site name -> what its output projection reads, (batch, seq, total * width), 0 at padding."""
    with still(model), gate_inputs(model, sites) as inputs:
        for batch in batches:
            with torch.no_grad():
                model(**inputs_of(batch))
            mask = real_positions(batch)[..., None]
            yield {name: reads[0].detach() * mask for name, reads in inputs.items()}
