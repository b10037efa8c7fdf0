"""Pruning in stages: what remains after each, when each is due, and a plan for what an earlier stage left.

Plans of later stages are in units of the model as it was given, like the first: budgets, keep-lists and widths mean the same
in all of them, and the last one alone makes the smaller model out of the model as given.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layers import LayerMatch, match_layers
from .allocation import Scores, lowest
from .budget import WHOLE, Budget, Limit
from .discovery import find_sites
from .importance import mean_length, score_units
from .judge import Judge
from .schedule import Pruning, make_plan, one_shot, realise
from .sites import Plan, SitePlan, Sites
from .stock import stock_kinds

MANY, MOST = 4, 0.8  # so many rounds where a larger share of what can go goes (docs/ranking.md)
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
    shares = [(limit.counts, share_of(limit, sites)) for limit in Budget.parse(budget).limits if stages > 1]
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


def plan_in_rounds(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[dict[str, Tensor]],
    matches: list[LayerMatch],
    pruning: Pruning,
    judge: Judge | None = None,
) -> Plan:
    """Rank and plan for the whole budget; nothing is changed. Arguments as of `one_shot`.

    Scores are of second order around the model that was ranked. Where nearly all goes, a copy is cut and refitted on the way,
    and what is left of it is ranked again, along the curve of `stage_budgets` without training.
    """
    sites = find_sites(model, batches[0], mean_length(batches))
    rounds = rounds_of(pruning, sites, stock_kinds(model, sites))
    budgets = stage_budgets(pruning.budget, rounds, sites)
    plan = here = one_shot(model, teacher, batches, matches, replace(pruning, budget=budgets[0]), judge)
    smaller = model
    for budget in budgets[1:]:
        before, smaller = smaller, copy.deepcopy(smaller)
        realise(smaller, before, batches, here, pruning)
        itself = match_layers(smaller, None, batches, [[m.student, m.student] for m in matches], pruning.ranks)
        left = Left(sites, plan)
        plan = plan_further(smaller, batches, itself, replace(pruning, budget=budget), left)
        here = from_here(plan, left.plan, find_sites(smaller, batches[0]))
    return plan


def rounds_of(pruning: Pruning, sites: Sites, stock: tuple[str, ...]) -> int:
    """In how many rounds a budget is planned: as set, or MANY where more than MOST of what can go goes, else one."""
    budget = Budget.parse(pruning.budget)
    if budget.measured or pruning.rounds is not None:
        return 1 if budget.measured else pruning.rounds
    shares = [(1 - share_of(limit, sites), 1 - lowest(limit, sites, pruning.rules(), stock)) for limit in budget.limits]
    return MANY if any(gone > MOST * most for gone, most in shares) else 1


def share_of(limit: Limit, sites: Sites) -> float:
    """What a limit allows, as a share of the model as given."""
    return limit.allowed(sites) / WHOLE[limit.counts](sites, None)


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
