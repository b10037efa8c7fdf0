"""Plans in which every layer is alike: the exact loop over the number of heads, with the rest spent on neurons."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from .budget import KINDS, WHOLE, Limit
from .sites import Site, Sites

SHAPES = ("free", "uniform", "stock")


def allowed_kinds(shapes: str, limit: Limit, stock: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds of sites that may shrink under `limit` in these shapes.

    Raises:
        ValueError: The model's own class can express none of them.
    """
    if shapes not in SHAPES:
        raise ValueError(f"shapes must be one of {list(SHAPES)}, got {shapes!r}")
    kinds = KINDS[limit.counts]
    if shapes == "uniform":
        return kinds
    if not set(kinds) & set(stock):
        raise ValueError(
            f"shapes='stock' needs a config field for what shrinks; this class has none that states fewer {' or '.join(kinds)} "
            f"units for all layers (it can have fewer of: {', '.join(stock) or 'nothing'}): take shapes='uniform', which "
            "loads with trust_remote_code=True, or a budget on what it can"
        )
    return tuple(kind for kind in kinds if kind in stock)


def uniform(
    sites: Sites, values: dict[str, Tensor], limit: Limit, round_to: int, kinds: tuple[str, ...]
) -> dict[str, int]:
    """Site name -> units kept, the same in all sites of a kind, at the least lost score within `limit`.

    Args:
        sites: The sites.
        values: Site name -> (units,) scores.
        limit: What may remain.
        round_to: FFN widths become multiples of it.
        kinds: The kinds of sites that may shrink.

    Raises:
        ValueError: The layers are not alike to begin with, or the limit cannot be reached.
    """
    choices, lost = {}, {}
    for kind in kinds:
        mine = [site for site in sites if site.kind == kind]
        totals = {site.total for site in mine}
        if len(totals) > 1:
            raise ValueError(
                f"shapes other than 'free' need layers that are alike; this model has {kind} sites of {sorted(totals)} units: "
                "take shapes='free'"
            )
        if mine:
            choices[kind] = counts(mine[0], round_to)
            lost[kind] = lost_by_count(mine, values)
    best: tuple[float, dict[str, int]] | None = None
    allowed = limit.allowed(sites)
    for numbers in product(*choices.values()):
        chosen = dict(zip(choices, numbers, strict=True))
        score = sum(float(lost[kind][n]) for kind, n in chosen.items())
        if best is None or score < best[0]:
            kept = {s.name: chosen[s.kind] for s in sites if s.kind in chosen}
            if WHOLE[limit.counts](sites, kept) <= allowed:
                best = (score, kept)
    if best is None:
        least = WHOLE[limit.counts](sites, {s.name: choices[s.kind][0] for s in sites if s.kind in choices})
        raise ValueError(
            f"the budget allows {allowed:,.0f} {limit.counts}; in layers that are all alike, with round_to={round_to} and "
            f"fewer of {', '.join(kinds)} only, {least:,} is the least: choose a larger budget, or shapes='free'"
        )
    return best[1]


def counts(site: Site, round_to: int) -> list[int]:
    """How many units a site may keep, ascending: at least one, FFN widths in multiples of `round_to`."""
    step = round_to if site.kind == "ffn" else 1
    return sorted({*range(step, site.total + 1, step), site.total})


def lost_by_count(sites: list[Site], values: dict[str, Tensor]) -> Tensor:
    """(units + 1,) score lost over all sites if each keeps its best n."""
    sums = [values[s.name].sort().values.cumsum(0).flip(0) for s in sites]
    return torch.cat([torch.stack(sums).sum(0), torch.zeros(1, dtype=torch.float64)])
