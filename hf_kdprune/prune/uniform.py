"""Plans in which every layer is alike: the exact loop over the number of heads, with the rest spent on neurons."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from .budget import KINDS, WHOLE, Limit
from .rules import Bounds, Rules
from .sites import Site, Sites


def allowed_kinds(shapes: str, limit: Limit, stock: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of sites that may shrink under `limit` in these shapes.

    Raises:
        ValueError: The model's own class can express none of them.
    """
    kinds = KINDS[limit.counts]
    if shapes != "stock":
        return kinds
    if not set(kinds) & set(stock):
        raise ValueError(
            f"shapes='stock' needs a config field for what shrinks; this class has none that states fewer {' or '.join(kinds)} "
            f"units for all layers (it can have fewer of: {', '.join(stock) or 'nothing'}): take shapes='uniform', which "
            "loads with trust_remote_code=True, or a budget on what it can"
        )
    return tuple(kind for kind in kinds if kind in stock)


def uniform(
    sites: Sites, ordered: dict[str, Tensor], limit: Limit, rules: Rules, bounds: Bounds, stock: tuple[str, ...]
) -> dict[str, int]:
    """Site name -> units kept, the same in all sites of a kind, at the least lost score within `limit`, which is in reach.

    Args:
        sites: The sites.
        ordered: Site name -> (units,) scores in the order in which units go.
        limit: What may remain.
        rules: Widths and shapes.
        bounds: What must stay.
        stock: The kinds of sites that the model's own class can have fewer of.

    Raises:
        ValueError: The layers are not alike to begin with.
    """
    choices = counts(sites, limit, rules, bounds, stock)
    lost = {kind: lost_by_count([s for s in sites if s.kind == kind], ordered) for kind in choices}
    best, least = in_all(sites, {kind: numbers[0] for kind, numbers in choices.items()}), float("inf")
    allowed = limit.allowed(sites)
    for numbers in product(*choices.values()):
        chosen = dict(zip(choices, numbers, strict=True))
        score = sum(float(lost[kind][n]) for kind, n in chosen.items())
        if score < least:
            kept = in_all(sites, chosen)
            if WHOLE[limit.counts](sites, kept) <= allowed:
                best, least = kept, score
    return best


def in_all(sites: Sites, chosen: dict[str, int]) -> dict[str, int]:
    """Site name -> units kept, from a number for each kind."""
    return {s.name: chosen[s.kind] for s in sites if s.kind in chosen}


def counts(sites: Sites, limit: Limit, rules: Rules, bounds: Bounds, stock: tuple[str, ...]) -> dict[str, list[int]]:
    """Kind -> how many units its sites may keep, ascending: at least one, FFN widths in multiples of `round_to`.

    Raises:
        ValueError: The layers are not alike to begin with.
    """
    choices: dict[str, list[int]] = {}
    for kind in allowed_kinds(rules.shapes, limit, stock):
        mine = [site for site in sites if site.kind == kind]
        totals = {site.total for site in mine}
        if len(totals) > 1:
            raise ValueError(
                f"shapes other than 'free' need layers that are alike; this model has {kind} sites of {sorted(totals)} units: "
                "take shapes='free'"
            )
        if mine:
            step = rules.round_to if kind == "ffn" else 1
            floor = max(1, *(bounds.floors[site.name] for site in mine))
            most = min(bounds.ceilings[site.name] for site in mine)
            choices[kind] = sorted({*range(rules.narrowest(mine[0], floor), most + 1, step), most})
    return choices


def lost_by_count(sites: list[Site], ordered: dict[str, Tensor]) -> Tensor:
    """(units + 1,) score lost over all sites if each keeps its best n."""
    sums = [ordered[s.name].cumsum(0).flip(0) for s in sites]
    return torch.cat([torch.stack(sums).sum(0), torch.zeros(1, dtype=torch.float64)])
