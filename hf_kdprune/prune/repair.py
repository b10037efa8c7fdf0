"""Refits each output projection in closed form after surgery, before a single training step (METHOD.md 3).

    W_K <- (A_K^T A_K + lambda I)^-1 (A_K^T (t_in + t_out - s_in - b) + lambda W_K,old)

A_K is what the smaller model's projection reads, t_in + t_out what the teacher's residual stream has behind the site, s_in
what the student's has before it. Bottom to top, each site through the sites already refitted, so that errors do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..layers import inputs_of, real_positions
from .discovery import find_sites
from .sites import Site, Sites

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
        bar = tqdm(sites, desc="repair", unit="site", disable=None, leave=False)  # None: on a terminal only
        return [repair_site(model, teacher, batches, site) for site in bar]
    finally:
        for m, mode in modes:
            m.train(mode)


def check_shapes(model: nn.Module, sites: Sites) -> None:
    """Raise unless each output projection of the teacher has a counterpart in `model` of the same hidden size."""
    modules = dict(model.named_modules())
    for site in sites:
        if getattr(modules.get(site.consumer), "out_features", None) != site.hidden:
            raise ValueError(
                f"repair refits towards the model before surgery; {site.consumer} of the teacher has no counterpart "
                f"with {site.hidden} outputs in the smaller model: give repair a copy made before apply_plan"
            )


@torch.no_grad()
def repair_site(model: nn.Module, teacher: nn.Module, batches: Sequence[Batch], site: Site) -> SiteRepair:
    """Refit one site and keep the new weights if the error on held-out tokens falls."""
    linear = model.get_submodule(site.consumer)
    if linear.in_features == 0 and linear.bias is None:
        return SiteRepair(site.name, math.nan, math.nan, False, "nothing is left to refit")
    held_out = batches[HELD_OUT - 1 :: HELD_OUT] or batches[-1:]
    fit = [b for b in batches if not any(b is h for h in held_out)]
    normal, judge = (collect(model, teacher, part, site) for part in (fit, held_out))
    old = torch.cat([linear.weight.double().T, bias_of(linear)])
    new, reason = solve(normal, old)
    before, after = judge.error(old), judge.error(new)
    if not after < before:
        return SiteRepair(site.name, before, after, False, reason or "the error on held-out tokens did not fall")
    linear.weight.copy_(new[:-1].T)
    if linear.bias is not None:
        linear.bias.copy_(new[-1])
    return SiteRepair(site.name, before, after, True, reason)


def bias_of(linear: nn.Linear) -> Tensor:
    """(1, out) the bias in float64; zeros where the layer has none."""
    if linear.bias is None:
        return torch.zeros(1, linear.out_features, dtype=torch.float64, device=linear.weight.device)
    return linear.bias.double()[None]


def collect(model: nn.Module, teacher: nn.Module, batches: Sequence[Batch], site: Site) -> Normal:
    """Gather what the fit needs: one pass of each model over `batches`, up to the site."""
    linear = model.get_submodule(site.consumer)
    size = linear.in_features + 1
    like = {"dtype": torch.float64, "device": linear.weight.device}
    normal = Normal(torch.zeros(size, size, **like), torch.zeros(size, site.hidden, **like))
    for batch in batches:
        mask = real_positions(batch)
        read, wrote, stream = (rows(t, mask) for t in up_to(model, batch, site))
        target = rows(up_to(teacher, batch, site)[2], mask)
        x = torch.cat([read, torch.ones(len(read), 1, **like)], 1)
        if linear.bias is None:
            x[:, -1] = 0  # do not invent a bias
        y = target - (stream - wrote)
        normal.xx += x.T @ x
        normal.xy += x.T @ y
        normal.yy += float(y.square().sum())
        normal.moment = normal.moment + target.sum(0)
        normal.square += float(target.square().sum())
        normal.tokens += len(x)
    return normal


def rows(features: Tensor, mask: Tensor) -> Tensor:
    """The real positions of (batch, seq, width), also where the model joined batch and seq: (tokens, width), float64."""
    return features.flatten(0, -2)[mask.flatten()].double()


def up_to(model: nn.Module, batch: Batch, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Run `model` until the residual stream behind the site is known.

    Returns:
        What the output projection reads (batch, seq, width), what it writes, and the stream behind it (batch, seq,
        hidden); the stream is what it writes where no norm reads the sum.
    """
    seen: dict[str, Tensor] = {}

    def at_consumer(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen["read"], seen["wrote"] = args[0], output
        if site.after is None:
            seen["stream"] = output
            raise Reached

    def at_norm(module: nn.Module, args: tuple) -> None:
        if "wrote" in seen:
            seen["stream"] = args[0]
            raise Reached

    with hooks(model, site, at_consumer, at_norm):
        try:
            model(**inputs_of(batch))
        except Reached:
            return seen["read"], seen["wrote"], seen["stream"]
    raise RuntimeError(f"{site.name} was not reached on this batch: its blocks do not all run; set repair=False")


@contextmanager
def hooks(model: nn.Module, site: Site, at_consumer, at_norm):
    """Watch the output projection and the norm behind it."""
    handles = [model.get_submodule(site.consumer).register_forward_hook(at_consumer)]
    if site.after is not None:
        handles.append(model.get_submodule(site.after).register_forward_pre_hook(at_norm))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
