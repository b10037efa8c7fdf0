"""Pruning in stages: what remains after each, when each is due, and a plan for what an earlier stage left.

Plans of later stages are in units of the model as it was given, like the first: budgets, keep-lists and widths mean the same
in all of them, and the last one alone makes the smaller model out of the model as given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layers import LayerMatch
from .allocation import Scores
from .budget import WHOLE, Budget
from .importance import score_units
from .schedule import Pruning, make_plan
from .sites import Plan, SitePlan, Sites
from .stock import stock_kinds

SHARE = 0.5  # of the training steps, after which the last stage is made and recovery has the rest


@dataclass(frozen=True)
class Left:
    """What an earlier stage left.

    Attributes:
        sites: The sites of the model as it was given.
        plan: What is left of it.
    """

    sites: Sites
    plan: Plan


def stage_budgets(budget: str, stages: int, sites: Sites) -> list[str]:
    """The budget of each stage, along the cubic curve 1 - (1 - budget) * (1 - (1 - k / stages)^3).

    Args:
        budget: What the last stage leaves, as the user wrote it.
        stages: How many.
        sites: Of the model as it was given.

    Source: Zhu and Gupta 2017, To prune, or not to prune.
    """
    shares = [(i.counts, i.allowed(sites) / WHOLE[i.counts](sites, None)) for i in Budget.parse(budget).limits if stages > 1]
    texts = []
    for k in range(1, stages):
        gone = 1 - (1 - k / stages) ** 3
        texts.append(",".join(f"{counts}={1 - (1 - share) * gone:.6f}" for counts, share in shares))
    return [*texts, budget]


def stage_steps(stages: int, steps: int) -> list[int]:
    """The training step before which each stage is made: evenly over the first half, the first one before all training.

    Raises:
        ValueError: There are fewer steps than that takes.
    """
    due = [round(k * steps * SHARE / max(stages - 1, 1)) for k in range(stages)]
    if len(set(due)) < stages or due[-1] >= steps:
        raise ValueError(
            f"pruning_stages={stages} are spread over the first half of the training, a step or more apart, and need "
            f"{2 * stages - 2} steps or more, got {steps}: train longer (max_steps, num_train_epochs), or take fewer stages"
        )
    return due


def plan_further(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], matches: list[LayerMatch], pruning: Pruning, left: Left
) -> Plan:
    """Rank what an earlier stage left, and plan for more to go; nothing is changed.

    Units count by how far the features would move from where they are, not by how far from the teacher's: the slope towards
    those, which training and not pruning is there to follow, is noise beside the curvature, and ranks worse.

    Args:
        model: The student as it is now.
        batches: Calibration inputs.
        matches: The layers that count, each with itself.
        pruning: The settings, with the budget of this stage.
        left: What the earlier stages left of the model as it was given.
    """
    asked = {"matches": matches, "seed": pruning.seed, "ranks": pruning.ranks}
    now = score_units(model, None, batches, pruning.importance, **asked)
    plan = make_plan(model, in_given_units(now, left, stock_kinds(model, now.sites)), batches, pruning)
    return replace(plan, weights=left.plan.weights)


def in_given_units(scores: Scores, left: Left, stock: tuple[str, ...]) -> Scores:
    """Scores of what is left, told in units of the model as it was given; those that are gone have the scores that they had."""
    values, errors, gone = {}, {}, {}
    for site in left.sites:
        earlier = left.plan[site.name]
        values[site.name] = torch.tensor(earlier.scores, dtype=torch.float64)
        errors[site.name] = torch.zeros(site.total, dtype=torch.float64)
        gone[site.name] = frozenset(earlier.removed)
        if earlier.kept:
            values[site.name][earlier.kept] = scores.values[site.name].double()
            errors[site.name][earlier.kept] = scores.errors[site.name].double()
    return Scores(left.sites, values, errors, scores.importance, stock, gone=gone)


def from_here(plan: Plan, left: Plan, sites: Sites) -> Plan:
    """A plan in units of the model as given, as a plan for the model that an earlier one left.

    Args:
        plan: Keeps some of what `left` keeps.
        left: What is there.
        sites: The sites of the model as it is.
    """
    parts = []
    for site in sites:
        there = {unit: i for i, unit in enumerate(left[site.name].kept)}
        kept = [there[unit] for unit in plan[site.name].kept]
        scores = [score for unit, score in enumerate(plan[site.name].scores) if unit in there]
        parts.append(SitePlan(site.name, site.kind, site.layer, site.total, kept, scores))
    return replace(plan, sites=parts, weights="")
