"""A loss of rows of logits, summed, that holds no more than the student's gradient: chunk by chunk, derivative by hand.

Autograd would keep several tensors of the logits' size (1024 rows of 151,936 classes: 0.6 GiB each). Here the forward pass
works on a few rows at a time, which stay in the cache, and writes the gradient as it goes; the backward pass scales it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 1 << 20}  # a chunk and its few temporaries stay in the cache: 1.3 times as fast as 8 MiB
ACCELERATOR_CHUNK_BYTES = 32 << 20  # enough work for each kernel to outlast its launch
FLOOR = -1e30  # of log-probabilities: finite, so that a class that both models rule out (-inf) adds 0 and not NaN

# (rows, classes) log-probabilities of the student, a chunk of each of the teacher's tensors
#   -> loss (rows,), its derivative by the student's logits / T (rows, classes)
RowLoss = Callable[..., tuple[Tensor, Tensor]]


def summed(student: Tensor, teacher: tuple[Tensor, ...], rows: Tensor, temperature: float, loss: RowLoss) -> Tensor:
    """T^2 times the sum of a loss over the rows that count; differentiable once, by the student's logits.

    Args:
        student: Logits (..., classes), any float dtype and strides.
        teacher: Tensors (..., any), which `loss` is given row by row; they get no gradient.
        rows: (...) bool, the rows that count; the others are not read, and get a gradient of exactly zero.
        temperature: T.
        loss: Of a chunk: see `RowLoss`.

    Returns:
        A scalar: float32, or float64 where the student is.
    """
    learns = torch.is_grad_enabled() and student.requires_grad
    return Summed.apply(student if learns else student.detach(), teacher, rows, temperature, loss)


class Summed(torch.autograd.Function):
    """`summed`; the forward pass computes the gradient where one is wanted, the backward pass scales it in place."""

    @staticmethod
    def forward(ctx, student, teacher, rows, temperature, loss):
        """The sum, and the gradient less the factor T."""
        dtype, classes = torch.promote_types(student.dtype, torch.float32), student.shape[-1]
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device) if wanted else None
        total = torch.zeros((), dtype=dtype, device=student.device)
        flags = rows.reshape(-1)
        counted = flags.nonzero()[:, 0]
        if wanted and len(counted) < len(flags):
            gradient.view(-1, classes).index_fill_(0, (~flags).nonzero()[:, 0], 0)
        elif len(counted) == len(flags) and all(x.is_contiguous() for x in (student, *teacher)):
            counted = None
        for at in chunks(counted, len(flags), rows_of(student, dtype)):
            part, *taught = (take(x, at) for x in (student, *teacher))
            losses, derivative = loss(log_probs(part, temperature, dtype), *taught)
            total += losses.sum()
            if wanted:
                put(gradient.view(-1, classes), at, derivative)
        ctx.gradient, ctx.temperature = gradient, temperature
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        """The gradient, which is let go: autograd may keep the buffer, and does not copy it."""
        if ctx.gradient is None:
            raise RuntimeError(
                "the gradient of a divergence is computed once, in place, and was asked for again: compute the loss again, "
                "or sum the losses before backward() instead of retain_graph=True"
            )
        gradient, ctx.gradient = ctx.gradient, None
        scale = upstream * ctx.temperature
        for part in gradient.view(-1).split(chunk_bytes(gradient.device) // scale.element_size()):
            torch.mul(part.to(scale.dtype), scale, out=part)  # in float32: 1/n in bfloat16 would bias every row
        return gradient, None, None, None, None


def log_probs(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Log-probabilities (rows, classes) at the temperature, a new tensor; NaN logits stay NaN."""
    return (logits.to(dtype) / temperature).log_softmax(-1).clamp_(min=FLOOR)


def chunk_bytes(device: torch.device) -> int:
    """Size of one chunk of logits in the dtype that they are computed in."""
    return CHUNK_BYTES.get(device.type, ACCELERATOR_CHUNK_BYTES)


def rows_of(logits: Tensor, dtype: torch.dtype) -> int:
    """Rows of a chunk."""
    return max(1, chunk_bytes(logits.device) // (max(1, logits.shape[-1]) * dtype.itemsize))


def chunks(counted: Tensor | None, count: int, size: int) -> Iterator[slice | Tensor]:
    """Numbers of `size` rows at a time: slices of all `count` rows, or parts of the numbers that count."""
    if counted is None:
        yield from (slice(i, i + size) for i in range(0, count, size))
    elif len(counted):
        yield from counted.split(size)


def take(x: Tensor, at: slice | Tensor) -> Tensor:
    """Rows of x (..., classes), its leading dimensions counted as one: (rows, classes); a slice is not copied."""
    if not x.is_contiguous():  # a view of the whole may not exist, and a copy of the whole is what this file avoids
        return x[torch.unravel_index(at, x.shape[:-1])]
    flat = x.view(-1, x.shape[-1])
    return flat[at] if isinstance(at, slice) else flat.index_select(0, at)


def put(flat: Tensor, at: slice | Tensor, values: Tensor) -> None:
    """Write rows of (rows, classes), in its dtype."""
    if isinstance(at, slice):
        flat[at] = values
    else:
        flat.index_copy_(0, at, values.to(flat.dtype))
