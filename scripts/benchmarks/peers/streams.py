"""Sums for least-squares fits of an output projection towards what the model before pruning has behind it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_kdprune.layers import inputs_of, real_positions
from hf_kdprune.prune.sites import Part

Batch = dict[str, Tensor]


@dataclass
class Sums:
    """Over real tokens, in float64.

    Attributes:
        xx: (width + 1, width + 1) inputs of the projection by inputs; the last input is a one.
        xy: (width + 1, hidden) inputs by targets.
    """

    xx: Tensor
    xy: Tensor


class ReachedError(Exception):
    """The forward pass has come to what was asked for; the rest need not run."""


@torch.no_grad()
def sublayer_sums(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch], part: Part, first_only: bool = False
) -> Sums:
    """What fits the output projection of `part` to the teacher's stream behind it.

        target = teacher's (sub-layer input + output) - the model's sub-layer input - the projection's bias

    Args:
        model: The model that is pruned, in eval mode.
        teacher: The model before pruning, in eval mode.
        batches: Calibration inputs.
        part: Whose output projection.
        first_only: Look at the first position of each sequence alone.
    """
    linear = model.get_submodule(part.consumer)
    width, hidden = linear.in_features + 1, linear.out_features
    like = {"dtype": torch.float64, "device": linear.weight.device}
    sums = Sums(torch.zeros(width, width, **like), torch.zeros(width, hidden, **like))
    for batch in batches:
        mask = real_positions(batch).clone()
        if first_only:
            mask[:, 1:] = False
        read, wrote, stream = (t[mask] for t in up_to(model, batch, part))
        wanted = up_to(teacher, batch, part)[2][mask]
        y = wanted - (stream - wrote)
        if linear.bias is not None:
            y = y - linear.bias
        x = torch.cat([read, torch.ones_like(read[:, :1])], 1).double()
        sums.xx += x.T @ x
        sums.xy += x.T @ y.double()
    return sums


def up_to(model: nn.Module, batch: Batch, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Run `model` until the residual stream behind an output projection is known.

    Returns:
        What the projection reads (batch, seq, width), what it writes, and the stream behind it (batch, seq, hidden); the
        stream is what it writes where no norm reads the sum.
    """
    seen: dict[str, Tensor] = {}

    def at_consumer(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen["read"], seen["wrote"] = args[0], output
        if part.after is None:
            seen["stream"] = output
            raise ReachedError

    def at_norm(module: nn.Module, args: tuple) -> None:
        if "wrote" in seen:
            seen["stream"] = args[0]
            raise ReachedError

    with ExitStack() as stack:
        stack.callback(model.get_submodule(part.consumer).register_forward_hook(at_consumer).remove)
        if part.after is not None:
            stack.callback(model.get_submodule(part.after).register_forward_pre_hook(at_norm).remove)
        try:
            model(**inputs_of(batch))
        except ReachedError:
            return seen["read"], seen["wrote"], seen["stream"]
    raise RuntimeError(f"{part.consumer} was not reached on this batch")
