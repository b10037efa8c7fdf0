"""Refits each output projection in closed form after surgery, before a single training step (METHOD.md 3).

    W_K <- (A_K^T A_K + lambda I)^-1 (A_K^T (t_in + t_out - s_in - b) + lambda W_K,old)

A_K is what the smaller model's projection reads, t_in + t_out what the teacher's residual stream has behind the site, s_in
what the student's has before it. Bottom to top, each site through the sites already refitted, so that errors do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..layers import inputs_of, positions_of
from .discovery import find_sites
from .experts import READ
from .sites import Part, Site, Sites

Batch = dict[str, Tensor]
RIDGE = 0.01  # share of the mean diagonal; .001 to .1 make no difference (METHOD.md 3)
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
    """

    site: str
    before: float
    after: float
    accepted: bool
    reason: str = ""


@dataclass
class Normal:
    """Sums for one least-squares fit: inputs x (width + 1, the last a one), targets y (hidden)."""

    xx: Tensor
    xy: Tensor
    yy: float = 0.0
    moment: Tensor | float = 0.0  # of the teacher's stream: sum
    square: float = 0.0  # of the teacher's stream: sum of squares
    tokens: int = 0

    def error(self, weight: Tensor) -> float:
        """Mean squared error of x @ weight against y, over the variance of the teacher's stream."""
        residual = self.yy - 2 * (weight * self.xy).sum() + ((self.xx @ weight) * weight).sum()
        variance = self.square - (self.moment / self.tokens).square().sum() * self.tokens
        return float(residual / variance)


class Reached(Exception):
    """The forward pass has come to what was asked for; the rest need not run."""


def repair(model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch]) -> list[SiteRepair]:
    """Refit every output projection of a model after surgery, in place.

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
    sites = find_sites(teacher, batches[0])
    check_shapes(model, sites)
    modes = [(m, m.training) for m in (model, teacher)]
    for m, _ in modes:
        m.eval()
    try:
        parts = [(site, part) for site in sites for part in site.parts]
        bar = tqdm(parts, desc="repair", unit="site", disable=None, leave=False)  # None: on a terminal only
        return [repair_part(model, teacher, batches, site, part) for site, part in bar]
    finally:
        for m, mode in modes:
            m.train(mode)


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


def plain(module: nn.Module) -> nn.Module:
    """The layer itself where an adapter of PEFT wraps it."""
    return getattr(module, "base_layer", module)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as (in, out), a view."""
    return linear.weight if isinstance(linear, Conv1D) else linear.weight.T


@torch.no_grad()
def repair_part(model: nn.Module, teacher: nn.Module, batches: Sequence[Batch], site: Site, part: Part) -> SiteRepair:
    """Refit one output projection and keep the new weights if the error on held-out tokens falls."""
    name = site.name if len(site.parts) == 1 else part.consumer
    if part.consumer.endswith(READ):
        return SiteRepair(name, math.nan, math.nan, False, "routed experts are not refitted")
    linear = plain(model.get_submodule(part.consumer))
    weight = weight_of(linear)
    if not len(weight) and linear.bias is None:
        return SiteRepair(name, math.nan, math.nan, False, "nothing is left to refit")
    held_out = batches[HELD_OUT - 1 :: HELD_OUT] or batches[-1:]
    fit = [b for b in batches if not any(b is h for h in held_out)]
    normal, judge = (collect(model, teacher, part_of_data, part) for part_of_data in (fit, held_out))
    old = torch.cat([weight.double(), bias_of(linear)])
    new, reason = solve(normal, old)
    before, after = judge.error(old), judge.error(new)
    if not after < before:
        return SiteRepair(name, before, after, False, reason or "the error on held-out tokens did not fall")
    weight.copy_(new[:-1])
    if linear.bias is not None:
        linear.bias.copy_(new[-1])
    return SiteRepair(name, before, after, True, reason)


def bias_of(linear: nn.Module) -> Tensor:
    """(1, out) the bias in float64; zeros where the layer has none."""
    weight = weight_of(linear)
    return linear.bias.double()[None] if linear.bias is not None else weight.new_zeros(1, weight.shape[1]).double()


def collect(model: nn.Module, teacher: nn.Module, batches: Sequence[Batch], part: Part) -> Normal:
    """Gather what the fit needs: one pass of each model over `batches`, up to the output projection."""
    linear = plain(model.get_submodule(part.consumer))
    size, hidden = len(weight_of(linear)) + 1, weight_of(linear).shape[1]
    like = {"dtype": torch.float64, "device": linear.weight.device}
    normal = Normal(torch.zeros(size, size, **like), torch.zeros(size, hidden, **like))
    for batch in batches:
        seen = up_to(model, batch, part)
        mask = positions_of(batch, seen[0])
        read, wrote, stream = (rows(t, mask) for t in seen)
        target = rows(up_to(teacher, batch, part)[2], mask)
        x = torch.cat([read, torch.ones(len(read), 1, **like)], 1)
        if linear.bias is None:
            x[:, -1] = 0  # do not invent a bias
        y = target - (stream - wrote)
        normal.xx += x.float().T @ x.float()  # the sums are in float64, the products of one batch need not be
        normal.xy += x.float().T @ y.float()
        normal.yy += float(y.square().sum())
        normal.moment = normal.moment + target.sum(0)
        normal.square += float(target.square().sum())
        normal.tokens += len(x)
    return normal


def rows(features: Tensor, mask: Tensor) -> Tensor:
    """The real positions of (batch, seq, width), also where the model joined batch and seq: (tokens, width), float64."""
    return features.flatten(0, -2)[mask.flatten()].double()


def up_to(model: nn.Module, batch: Batch, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Run `model` until the residual stream behind the output projection is known.

    Returns:
        What the output projection reads (batch, seq, width), what it writes, and the stream behind it (batch, seq,
        hidden); the stream is what it writes where no norm reads the sum.
    """
    seen: dict[str, Tensor] = {}

    def at_consumer(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen["read"], seen["wrote"] = args[0], output
        if part.after is None:
            seen["stream"] = output
            raise Reached

    def at_norm(module: nn.Module, args: tuple) -> None:
        if "wrote" in seen:
            seen["stream"] = args[0]
            raise Reached

    with ExitStack() as stack:
        stack.callback(model.get_submodule(part.consumer).register_forward_hook(at_consumer).remove)
        if part.after is not None:
            stack.callback(model.get_submodule(part.after).register_forward_pre_hook(at_norm).remove)
        try:
            model(**inputs_of(batch))
        except Reached:
            return seen["read"], seen["wrote"], seen["stream"]
    raise RuntimeError(f"{part.consumer} was not reached on this batch: its blocks do not all run; set repair=False")


def solve(normal: Normal, old: Tensor) -> tuple[Tensor, str]:
    """The ridge solution towards `old`, (width + 1, hidden), and a remark if the ridge had to grow."""
    diagonal = normal.xx.diagonal()
    ridge = RIDGE * float(diagonal[:-1].mean() if len(diagonal) > 1 else diagonal.mean()) or 1.0
    for attempt in range(6):
        penalty = ridge * 10**attempt * torch.eye(len(diagonal), dtype=torch.float64, device=diagonal.device)
        factor, failed = torch.linalg.cholesky_ex(normal.xx + penalty)
        if not int(failed):
            remark = f"ridge x{10**attempt}: the inputs are nearly dependent" if attempt else ""
            return torch.cholesky_solve(normal.xy + penalty @ old, factor), remark
    return old, "no ridge made the fit possible"
