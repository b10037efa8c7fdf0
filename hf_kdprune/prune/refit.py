"""One least-squares fit of output projections: ridge towards the present weights, in float64 by Cholesky (METHOD.md 3).

Source: METHOD.md 3; ridge regression, Hoerl and Kennard 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Shares of the mean diagonal, of which the one that errs least on held-out tokens is taken. Where tokens are many the first is
# (METHOD.md 3); with ten for each input of a language model it fits what other text does not have, and 1 does better.
RIDGES = (0.01, 0.1, 1.0, 10.0)

SINGULAR = "no ridge made the fit possible"


@dataclass
class Seen:
    """What the batches showed at some output projections whose outputs meet, of the smaller model and of the teacher.

    Attributes:
        xx: (width + 1, the same), inputs by inputs over the batches that fit; the last input is a one.
        xy: (width + 1, hidden), inputs by targets.
        judged: (inputs, targets, the teacher's stream) of each batch that judges the fit, (tokens, ...).
    """

    xx: Tensor | float = 0.0
    xy: Tensor | float = 0.0
    judged: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor, stream: Tensor | None) -> None:
        """Take inputs (tokens, width + 1) and targets (tokens, hidden); with the teacher's stream they judge, else they fit."""
        if stream is not None:
            self.judged.append((x, y, stream))
        else:  # the sums are in float64, the products of one batch need not be
            self.xx, self.xy = self.xx + (x.T @ x).double(), self.xy + (x.T @ y).double()

    def error(self, weight: Tensor) -> float:
        """Mean squared error on the batches that judge, over the variance of the teacher's stream there."""
        squares = sum(float((x @ weight.float() - y).double().square().sum()) for x, y, _ in self.judged)
        stream = torch.cat([t for _, _, t in self.judged]).double()
        return squares / float((stream - stream.mean(0)).square().sum())


def plain(module: nn.Module) -> nn.Module:
    """The layer itself where an adapter of PEFT wraps it."""
    return getattr(module, "base_layer", module)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as (in, out), a view."""
    return linear.weight if isinstance(linear, Conv1D) else linear.weight.T


def bias_of(linear: nn.Module) -> Tensor:
    """(1, out) the bias in float64; zeros where the layer has none."""
    weight = weight_of(linear)
    return linear.bias.double()[None] if linear.bias is not None else weight.new_zeros(1, weight.shape[1]).double()


def refit(seen: Seen, linears: Sequence[nn.Module]) -> tuple[float, float, str]:
    """Refit projections whose outputs are summed, in place, if the error on held-out tokens falls.

    Returns:
        The error before and after, and a remark: why not, or that a larger ridge was taken.
    """
    old = torch.cat([*(weight_of(linear).double() for linear in linears), sum(bias_of(linear) for linear in linears)])
    before, tried = seen.error(old), {share: solve(seen.xx, seen.xy, old, share) for share in RIDGES}
    errors = {share: seen.error(new) for share, new in tried.items() if new is not None}
    if not errors or not min(errors.values()) < before:
        return before, min(errors.values(), default=before), "the error on held-out tokens did not fall" if errors else SINGULAR
    best = min(errors, key=errors.get)
    new, after = tried[best], errors[best]
    reason = f"ridge x{best / RIDGES[0]:g}: it errs less on held-out tokens" if best > RIDGES[0] else ""
    biased = [linear.bias for linear in linears if linear.bias is not None]
    rest = new[-1] - sum(bias.double() for bias in biased[1:])  # one of them takes the whole change
    for bias in biased[:1]:
        bias.copy_(rest)
    for linear, part in zip(linears, new[:-1].split([len(weight_of(linear)) for linear in linears]), strict=True):
        weight_of(linear).copy_(part)
    return before, after, reason


def solve(xx: Tensor, xy: Tensor, old: Tensor, share: float) -> Tensor | None:
    """The ridge solution towards `old`, (width + 1, hidden); None where the inputs are too nearly dependent for this ridge."""
    diagonal = xx.diagonal()
    ridge = share * float(diagonal[:-1].mean() if len(diagonal) > 1 else diagonal.mean()) or share
    penalty = torch.full_like(diagonal, ridge)
    factor, failed = torch.linalg.cholesky_ex(xx + penalty.diag())
    return None if int(failed) else torch.cholesky_solve(xy + penalty[:, None] * old, factor)
