"""Refits each output projection in closed form after surgery, before a single training step (METHOD.md 3).

    W_K <- (A_K^T A_K + lambda I)^-1 (A_K^T (t_in + t_out - s_in - b) + lambda W_K,old)

A_K is what the smaller model's projection reads, t_in + t_out what the teacher's residual stream has behind the site, s_in
what the student's has before it. Bottom to top, each site through the sites already refitted, so that errors do not add up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..inputs import completed
from ..layers import TOKENS_PER_COLUMN, count_real, evaluating, positions_of, root_mean_square
from .discovery import find_sites
from .experts import READ
from .lockstep import Pass, Stop, passes
from .refit import Seen, plain, refit, weight_of
from .sites import Part, Sites

Batch = dict[str, Tensor]
logger = logging.getLogger(__name__)
HELD_OUT = 8  # every eighth batch judges the refit


@dataclass
class SiteRepair:
    """What the refit did at one site.

    Attributes:
        site: Its name.
        before: Squared error of the residual stream behind the site on held-out tokens, over the variance there.
        after: The same with the refitted weights.
        accepted: Whether they were taken.
        reason: Why not, or that the ridge had to grow.
        predicted: What the removed units' scores said that the second loss would rise, if only this site were cut; None
            where the score is no loss, or nothing was removed.
        realised: What it rose, before the refit, see `importance.realised`.
    """

    site: str
    before: float
    after: float
    accepted: bool
    reason: str = ""
    predicted: float | None = None
    realised: float | None = None


@torch.no_grad()
def repair(model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch]) -> list[SiteRepair]:
    """Refit every output projection of a model after surgery, in place, in one pass of both models over the batches.

    Args:
        model: The smaller model.
        teacher: The model as it was before surgery, or one of the same shape as that.
        batches: Calibration inputs; every eighth one judges the refit.

    Returns:
        What was done, a record a site, bottom to top.

    Raises:
        ValueError: Fewer than two batches, or a teacher with other sites.
    """
    if len(batches) < 2:
        raise ValueError(f"repair needs at least 2 calibration batches, one to judge the other, got {len(batches)}")
    batches = [completed(teacher, batch) for batch in batches]
    sites = find_sites(teacher, batches[0])
    check_shapes(model, sites)
    warn_of_few(model, sites, batches)
    names = {part: site.name if len(site.parts) == 1 else part.consumer for site in sites for part in site.parts}
    done = {part: left(model, part, name) for part, name in names.items()}
    with evaluating(model, teacher):
        refitted = refits(model, teacher, batches, [part for part, record in done.items() if record is None])
        for parts, (before, after, reason) in tqdm(refitted, desc="repair", unit="site", disable=None, leave=False):
            accepted = after < before
            done |= {part: SiteRepair(names[part], before, after, accepted, reason) for part in parts}
    return list(done.values())


def left(model: nn.Module, part: Part, name: str) -> SiteRepair | None:
    """The record of a projection that is left as it is; None if it is to be refitted."""
    if part.consumer.endswith(READ):
        return SiteRepair(name, math.nan, math.nan, False, "routed experts are not refitted")
    linear = plain(model.get_submodule(part.consumer))
    if not len(weight_of(linear)) and linear.bias is None:
        return SiteRepair(name, math.nan, math.nan, False, "nothing is left to refit")
    return None


def check_shapes(model: nn.Module, sites: Sites) -> None:
    """Raise unless each output projection of the teacher has a counterpart in `model` of the same hidden size."""
    modules = dict(model.named_modules())
    for site in sites:
        for consumer in (c for c in site.consumers if not c.endswith(READ)):
            if consumer not in modules or weight_of(plain(modules[consumer])).shape[1] != site.hidden:
                raise ValueError(
                    f"repair refits towards the model before surgery; {consumer} of the teacher has no counterpart "
                    f"with {site.hidden} outputs in the smaller model: give repair a copy made before apply_plan"
                )


def warn_of_few(model: nn.Module, sites: Sites, batches: Sequence[Batch]) -> None:
    """Say so where there are too few tokens for the widest projection: the refit then leans on the present weights."""
    consumers = [c for site in sites for c in site.consumers if not c.endswith(READ)]
    width = max((len(weight_of(plain(model.get_submodule(c)))) for c in consumers), default=0)
    tokens, needed = count_real(batches), TOKENS_PER_COLUMN * width
    if tokens < needed:
        logger.warning(
            f"repair has {tokens:,} tokens for projections of up to {width:,} inputs, and wants {needed:,} "
            f"({TOKENS_PER_COLUMN} for each): it is accepted only where held-out error falls, and will gain less. Give "
            f"{needed / max(tokens, 1):.1f} times as many samples (calibration_samples)"
        )


def refits(
    model: nn.Module, teacher: nn.Module, batches: Sequence[Batch], parts: Sequence[Part]
) -> Iterator[tuple[tuple[Part, ...], tuple[float, float, str]]]:
    """Refit projection after projection as the passes come to them; yields whose, the errors before and after, a remark.

    Layers that run several times in a pass are refitted the first time: later inputs depend on the fit.
    """
    waiting = set(parts)
    with passes(model, batches, parts) as students, passes(teacher, batches, parts) as teachers:
        while stops := list(advance(students, teachers, batches)):
            at = stops[0][0].parts
            if not waiting.issuperset(at):
                continue
            waiting.difference_update(at)
            linears = [plain(model.get_submodule(part.consumer)) for part in at]
            yield at, refit(look(stops, linears), linears)
            for stop, *_ in stops:
                stop.rewrite([model.get_submodule(p.consumer).forward(x) for p, x in zip(at, stop.reads, strict=True)])


def advance(
    students: Sequence[Pass], teachers: Sequence[Pass], batches: Sequence[Batch]
) -> Iterator[tuple[Stop, Tensor, Tensor]]:
    """Let all passes go to their next stop: the student's stop, the teacher's stream there, and which positions are real."""
    for student, teacher, batch in zip(students, teachers, batches, strict=True):
        stop, taught = student.go(), teacher.go()
        if (stop and stop.parts) != (taught and taught.parts):
            raise RuntimeError(
                f"the same blocks must run in both models and on each batch; one is at {stop and stop.parts}, the other at "
                f"{taught and taught.parts}: set repair=False"
            )
        if stop is not None:
            yield stop, taught.stream, positions_of(batch, stop.stream).flatten()


def look(stops: Sequence[tuple[Stop, Tensor, Tensor]], linears: Sequence[nn.Module]) -> Seen:
    """What the batches show: inputs, and what the projections should write so that the stream is the teacher's.

    Each position is taken over the root mean square of the stream, as the next norm takes it: else the first token of a
    language model, whose stream is a hundred times larger, would be all that is fitted.
    """
    seen = Seen()
    for i, (stop, taught, mask) in enumerate(stops):
        reads = torch.cat([rows(read, mask) for read in stop.reads], 1)
        bias = linears[0].bias is not None  # where there is none, none is invented
        ones = reads.new_full((len(reads), 1), float(bias))
        # What adapters add to the projections stays, so it counts among the others.
        wrote = sum(linear.forward(read) for linear, read in zip(linears, stop.reads, strict=True))
        taught, others = rows(taught, mask), rows(stop.stream - wrote.view(stop.stream.shape), mask)
        judges = i % HELD_OUT == HELD_OUT - 1 or (len(stops) < HELD_OUT and i == len(stops) - 1)
        size = root_mean_square(taught)
        seen.add(torch.cat([reads, ones], 1) / size, (taught - others) / size, taught / size if judges else None)
    return seen


def rows(features: Tensor, mask: Tensor) -> Tensor:
    """The real positions of (batch, seq, width), also where the model joined batch and seq: (tokens, width), float32."""
    return features.flatten(0, -2)[mask].float()
