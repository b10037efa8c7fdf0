"""Gates, and whether a site can be cut: tried on the model itself, compared with the gates, and undone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from .cutting import Undo, cut_site
from .experts import readable_experts
from .sites import Site

TOLERANCE = 1e-5
STEP = 8  # neurons that are tried at once: products of grouped experts want rows of a multiple of 16 bytes


@contextmanager
def gates_at_zero(model: nn.Module, kept: dict[str, list[int]], sites: Sequence[Site]) -> Iterator[None]:
    """Within the context, the gates of all units of `sites` but `kept` are 0; the weights are untouched."""

    def gate(site: Site):
        mask = torch.zeros(site.total)
        mask[sorted(kept[site.name])] = 1
        mask = mask.repeat_interleave(site.width)
        return lambda module, args: (args[0] * mask.to(args[0]), *args[1:])

    with readable_experts(model), ExitStack() as stack:
        for site in sites:
            for consumer in site.consumers:
                hook = model.get_submodule(consumer).register_forward_pre_hook(gate(site))
                stack.callback(hook.remove)
        yield


@contextmanager
def in_float32(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Within the context, what `model` holds in half precision is float32, in which 1e-5 can be told; gives `batch` alike.

    Behind it each parameter is of its own type again, bit by bit, also one that was made smaller.
    """

    def named() -> dict[str, Tensor]:
        return dict([*model.named_parameters(), *model.named_buffers()])

    before = {name: (t, t.data) for name, t in named().items() if half(t)}
    try:
        for t, data in before.values():
            t.data = data.float()
        yield {name: t.float() if before and half(t) else t for name, t in batch.items()}
    finally:
        for name, t in named().items():
            if name in before:  # what is no other parameter has its memory again, which a teacher may share
                same, data = before[name]
                t.data = data if t is same else t.data.to(data.dtype)


def half(tensor: Tensor) -> bool:
    """Whether `tensor` is of floats of less than 32 bits."""
    return tensor.is_floating_point() and tensor.itemsize < 4


@torch.no_grad()
def first_output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits, or whatever the model gives first; of a backbone's features, those of its last stage."""
    first = model(**batch)[0]
    return (first[-1] if isinstance(first, tuple) else first).float()


def difference(expected: Tensor, got: Tensor) -> tuple[float, float]:
    """How far the two are apart, and how far they may be: 1e-5 of their scale (at least 1) in fp32."""
    if expected.shape != got.shape:
        return float("inf"), TOLERANCE
    return float((expected - got).abs().max()), TOLERANCE * max(1.0, float(expected.abs().max()))


def tried(model: nn.Module, site: Site, batch: dict[str, Tensor]) -> tuple[Site | None, str]:
    """The site with `least` set, or None and the reason if no unit of it can be cut out exactly.

    Args:
        model: In eval mode; afterwards it is as it was.
        site: A site of it.
        batch: Inputs.
    """
    step = STEP if site.kind == "ffn" else 1
    reason = failure(model, site, list(range(step, site.total)), batch) if site.total > step else ""
    if reason:
        return None, reason
    least = next(n for n in (0, 1, step) if n == step or not failure(model, site, list(range(n)), batch))
    return replace(site, least=min(least, site.total)), ""


def failure(model: nn.Module, site: Site, kept: list[int], batch: dict[str, Tensor]) -> str:
    """Why the site cannot be cut to `kept`; "" if it can."""
    undo: Undo = []
    with gates_at_zero(model, {site.name: kept}, [site]):
        expected = first_output(model, batch)
    try:
        cut_site(model, site, kept, undo)
        apart, allowed = difference(expected, first_output(model, batch))
        return "" if apart <= allowed else f"the smaller model differs from the gated one by {apart:.2e}"
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:  # whatever the model's code makes of it
        return f"{type(error).__name__}: {error}"
    finally:
        for restore in reversed(undo):
            restore()
