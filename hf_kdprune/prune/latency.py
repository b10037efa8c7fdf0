"""What the sites of a model cost in ms, measured on smaller copies of it, and how fast a planned model really is.

A copy shares the weights that were not cut, so that ten of them fit where one does (METHOD.md 5).
"""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Sequence
from itertools import chain

from torch import Tensor
from transformers import PreTrainedModel

from ..inputs import at_length
from ..layers import evaluating, inputs_of
from ..timing import device_name, rows_of, time_rounds
from .cutting import cut_site
from .latency_table import LatencyTable, monotone
from .sites import Plan, Site, Sites
from .trial import STEP

Batch = dict[str, Tensor]
SHARES = (0, 0.25, 0.5, 0.75)  # of the units of a class of sites, beside all of them
SECONDS = 1.0  # how long each copy is timed
ROUNDS = 9  # and at least this often


def time_sites(model: PreTrainedModel, batch: Batch, sites: Sites, batch_size: int = 32) -> LatencyTable:
    """Time `model` on its device with all sites of a class at 0, 1/4, 1/2, 3/4 and all of their units.

    Args:
        model: The model; it is read, not changed.
        batch: Inputs, brought to the tokens at which the MACs of `sites` were counted.
        sites: Its sites.
        batch_size: Samples of a pass.
    """
    classes: dict[str, list[Site]] = {}
    for site in sites:
        classes.setdefault(class_of(site), []).append(site)
    points = [(name, units) for name, alike in classes.items() for units in sizes(alike[0])]
    copies = [smaller(model, {s.name: range(units) for s in classes[name]}, sites) for name, units in points]
    rows = rows_of(at_length(inputs_of(batch), sites.seq_len), batch_size)
    rounds = timed([model, *copies], rows)
    whole = statistics.median(times[0] for times in rounds)
    left = [whole * statistics.median(times[i] / times[0] for times in rounds) for i in range(1, len(copies) + 1)]
    curves = {}
    for name, alike in classes.items():
        taken = [(units, ms) for (other, units), ms in zip(points, left, strict=True) if other == name]
        taken.append((alike[0].total, whole))
        ms = monotone([total / len(alike) for _, total in taken])
        curves[name] = [[units, value - ms[0]] for (units, _), value in zip(taken, ms, strict=True)]
    kinds = {site.name: name for name, alike in classes.items() for site in alike}
    return LatencyTable(batch_size, sites.seq_len, device_name(model.device), whole, curves, kinds)


def share_of_latency(model: PreTrainedModel, batch: Batch, sites: Sites, plan: Plan, batch_size: int = 32) -> float:
    """Time of the model that `plan` leaves over that of `model`, by turns: the median over rounds of their ratio.

    Args:
        model: The model before surgery; it is read, not changed.
        batch: Inputs.
        sites: Its sites.
        plan: What stays.
        batch_size: Samples of a pass.
    """
    rows = rows_of(at_length(inputs_of(batch), sites.seq_len), batch_size)
    rounds = timed([model, smaller(model, plan.kept, sites)], rows)
    return statistics.median(after / before for before, after in rounds)


def timed(models: list[PreTrainedModel], rows: Batch) -> list[tuple[float, ...]]:
    """Milliseconds of a pass of each model, a tuple a round."""
    with evaluating(*models):
        return time_rounds(models, rows, SECONDS, ROUNDS)


def class_of(site: Site) -> str:
    """What sites have in common that take the same time: where they stand in their blocks, and their sizes."""
    pattern = re.sub(r"\.\d+\.", ".", site.parts[0].consumer)
    return f"{pattern} {site.kind} {site.total}x{site.width} {site.hidden}"


def sizes(site: Site) -> list[int]:
    """Units at which a site is timed, ascending, less all of them; FFN widths are what hardware likes, multiples of 8."""
    step = STEP if site.kind == "ffn" and site.total > 4 * STEP else 1
    numbers = {max(site.least, round(share * site.total / step) * step) for share in SHARES}
    return sorted(n for n in numbers if n < site.total)


def smaller(model: PreTrainedModel, kept: dict[str, Sequence[int]], sites: Sites) -> PreTrainedModel:
    """A copy of `model` with `kept` units of the named sites; it shares all weights that were not cut, so do not train it."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    made = copy.deepcopy(model, shared)
    for site in sites:
        if len(kept.get(site.name, range(site.total))) < site.total:
            cut_site(made, site, list(kept[site.name]), [])
    return made
