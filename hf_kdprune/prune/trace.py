"""One forward pass, watched: what each linear layer reads and writes, how often, and which channels depend on which.

The output of each linear layer is cut from the graph. So the derivative of what a layer reads leads back to the layers that
feed it directly, and no further: a neuron's channel to its own rows, a head's channel to the rows of its head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers import evaluating
from .experts import READ, readable_experts

LINEAR = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        linears: Path -> linear layer, in the order in which they ran.
        reads: Path of a linear layer or a norm -> what it read the first time.
        writes: Path -> what a module gave the first time; of a linear layer, a leaf of the graph.
        calls: Path of a linear layer or of experts -> (rows, positions) of each call.
        order: Linear layers and norms, in the order in which they ran.
        returns: Path of a module -> length of the tuple that it returns, 0 for anything else.
        other_macs: MACs of convolutions and routers.
    """

    linears: dict[str, nn.Module] = field(default_factory=dict)
    reads: dict[str, Tensor] = field(default_factory=dict)
    writes: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    returns: dict[str, int] = field(default_factory=dict)
    other_macs: int = 0


def record(model: nn.Module, batch: dict[str, Tensor], graph: bool) -> Trace:
    """Run `model` once and watch.

    Args:
        model: The model; it is left as it was.
        batch: Inputs of one sample.
        graph: Keep the graph between neighbouring linear layers (see above); within `only_tables_learn`.
    """
    trace = Trace()

    def watch(module: nn.Module, args: tuple, kwargs: dict, output: object, name: str) -> Tensor | None:
        read = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        first = output[0] if isinstance(output, tuple) and output else output
        linear, known = isinstance(module, LINEAR), name in trace.writes
        if linear or name.endswith(f".{READ}"):
            positions = read.shape[-2] if read.dim() > 1 else 1
            trace.calls.setdefault(name, []).append((read.numel() // max(read.shape[-1], 1), positions))
        elif isinstance(first, Tensor) and (isinstance(module, CONVOLUTIONS) or "Router" in type(module).__name__):
            trace.other_macs += direct_macs(module, read, first)
        made = first.detach().requires_grad_() if linear and graph else first
        if not known and isinstance(first, Tensor):
            trace.writes[name], trace.returns[name] = made, len(output) if isinstance(output, tuple) else 0
            if linear or type(module).__name__.endswith("Norm"):
                trace.reads[name] = read
                trace.order.append(name)
            if linear:
                trace.linears[name] = module
        return made.clone() if linear and graph else None  # some models write into what they are given

    with evaluating(model), ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(graph))
        stack.enter_context(readable_experts(model))
        for name, module in model.named_modules():
            hook = module.register_forward_hook(lambda m, a, k, o, name=name: watch(m, a, k, o, name), with_kwargs=True)
            stack.callback(hook.remove)
        model(**batch)
    return trace


def direct_macs(module: nn.Module, read: Tensor, wrote: Tensor) -> int:
    """MACs of a convolution (of each output number: the weights of its channel) or of a router (of each row: all)."""
    weights = module.weight.numel()
    if isinstance(module, CONVOLUTIONS):
        return wrote.numel() * weights // wrote.shape[1] if wrote.dim() > 2 else 0
    return read.numel() // read.shape[-1] * weights


def tables_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path -> parameters of no linear layer, convolution or norm: embeddings, position biases, and the like."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if not isinstance(module, (*LINEAR, *CONVOLUTIONS)) and not type(module).__name__.endswith("Norm")
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point()
    }


@contextmanager
def only_tables_learn(model: nn.Module) -> Iterator[None]:
    """Within the context, of all parameters only the tables have gradients."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    tables = {id(p) for p in tables_of(model).values()}
    try:
        for parameter, _ in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in tables)
        yield
    finally:
        for parameter, wanted in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(wanted)


def noise_like(read: Tensor) -> Tensor:
    """The same random numbers at every call, shaped like `read`."""
    return torch.randn(read.shape, generator=torch.Generator().manual_seed(0)).to(read)


def is_term_of(wrote: Tensor, read: Tensor) -> bool:
    """Whether `read` is a sum of `wrote` and things that do not depend on it: whether the derivative is one."""
    found = moved(read, None, {"wrote": wrote}).get("wrote")
    return found is not None and torch.equal(found.flatten(), noise_like(read).flatten())


def moved(read: Tensor, channels: Sequence[int] | None, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which entries of `leaves` the given channels of `read` depend on; None: all channels.

    Args:
        read: (..., width), with a graph.
        channels: Of the last dimension.
        leaves: Name -> tensor in that graph.

    Returns:
        Name -> derivatives that are not all zero, shaped like the leaf.
    """
    weight = noise_like(read)
    if channels is not None:
        one = torch.zeros(read.shape[-1], dtype=read.dtype, device=read.device)
        one[list(channels)] = 1
        weight = weight * one
    found = torch.autograd.grad(read, list(leaves.values()), weight, retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None and bool(g.any())}
