"""What scores by derivatives share: gates on what output projections read, and the derivative by each gate, a sample at a time.

The curvature of a loss ||r||^2 at a unit is the expectation of (z^T dr/dg)^2 over random z: one backward pass of random
numbers estimates it for all units at once. Source: METHOD.md 2; Hutchinson 1990.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...layers import evaluating, inputs_of, known
from ...ranks import Ranks, draw_for
from ..experts import readable_experts
from ..sites import Site, Sites
from .asked import Asked

Batch = dict[str, Tensor]
Table = dict[str, Tensor]
Weighted = tuple[list[Tensor], list[Tensor] | None]  # tensors with a graph, and their weights; None: a scalar
Watch = Callable[[object, Batch, torch.Generator], list[Weighted]]


class Sums:
    """Sums over samples of the derivative by each gate: of itself, its size, its square, its fourth power.

    Attributes:
        first, size, second, fourth: Site name -> (units,), float64.
        samples: How many.
    """

    def __init__(self, sites: Sites):
        """All zero."""
        self.first, self.size, self.second, self.fourth = (
            {s.name: torch.zeros(s.total, dtype=torch.float64) for s in sites} for _ in range(4)
        )
        self.samples = 0

    def add(self, site: Site, derivatives: Tensor) -> None:
        """Take (samples, units)."""
        self.first[site.name] += derivatives.sum(0)
        self.size[site.name] += derivatives.abs().sum(0)
        self.second[site.name] += derivatives.square().sum(0)
        self.fourth[site.name] += derivatives.pow(4).sum(0)

    def over(self, ranks: Ranks) -> Sums:
        """The sums of all processes."""
        tables = (self.first, self.size, self.second, self.fourth)
        parts = [value for table in tables for value in table.values()] + [torch.tensor([self.samples]).double()]
        totals = iter(ranks.total(torch.cat(parts)).split([len(part) for part in parts]))
        for table in tables:
            table.update({name: next(totals) for name in table})
        self.samples = int(next(totals))
        return self

    def squares(self) -> tuple[Table, Table]:
        """The sum of squares, and its standard error."""
        return self.second, {n: spread(self.second[n], self.fourth[n], self.samples) for n in self.second}

    def sizes(self) -> tuple[Table, Table]:
        """The sum of sizes, and its standard error."""
        return self.size, {n: spread(self.size[n], self.second[n], self.samples) for n in self.size}


def spread(total: Tensor, squares: Tensor, samples: int) -> Tensor:
    """Standard error of a sum over samples."""
    return (squares - total**2 / samples).clamp(min=0).sqrt()


def derivatives(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    asked: Asked,
    watch: Watch,
    kinds: int,
    labels: bool = False,
) -> list[Sums]:
    """Run the model once over the batches and sum the derivatives of what `watch` makes of its output.

    Each process runs its share of the batches, and has the sums of all of them.

    Args:
        model: Read, not changed; in eval mode, weights frozen.
        batches: Calibration inputs.
        asked: Where the gates are, the seed of the random numbers, and who runs which batches.
        watch: Model output, batch, and its random numbers -> what to derive; one backward pass for each.
        kinds: How many that are; a `Sums` for each.
        labels: Whether the model is given the labels, and makes a loss; else its output holds hidden states.
    """
    sums, ranks, sites = [Sums(asked.sites) for _ in range(kinds)], asked.ranks, asked.sites
    quiet = True if ranks.index else None  # None: a bar on a terminal only
    with still(model), gate_inputs(model, sites) as inputs:
        for number, batch in tqdm(ranks.share(batches), desc="rank", unit="batch", disable=quiet, leave=False):
            output = model(**(known(batch) if labels else inputs_of(batch)), output_hidden_states=not labels)
            watched, size = watch(output, batch, draw_for(asked.seed, number)), len(next(iter(batch.values())))
            del output
            for mine in sums:
                mine.samples += size
                for site, found in unit_gradients(*watched.pop(0), inputs, sites, size, keep=bool(watched)):
                    mine.add(site, found)
    return [mine.over(ranks) for mine in sums]


def noise(like: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, 0 at padding; drawn on the CPU so that every device ranks by the same probe."""
    return torch.randn(like.shape, generator=generator).to(like.device) * mask[..., None]


@contextmanager
def still(*models: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, no gradient checkpointing) with frozen weights; all as it was afterwards."""
    trained = [p for m in models for p in m.parameters() if p.requires_grad]
    with evaluating(*models):
        for m in models:
            m.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


@contextmanager
def gate_inputs(model: nn.Module, sites: Sites) -> Iterator[dict[str, list[Tensor]]]:
    """Yield site name -> what its output projections read, each (batch, seq, total * width), refilled by each forward pass.

    A site has several where its units are computed in several places, or run more than once in a pass.
    """
    inputs: dict[str, list[Tensor]] = {}

    def catch(module: nn.Module, args: tuple, name: str) -> tuple:
        # The first site of the model starts the graph: nothing before it needs a gradient.
        read = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)
        inputs.setdefault(name, []).append(read)
        return (read, *args[1:])

    with readable_experts(model), ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(lambda module, args: inputs.clear()).remove)
        for site in sites:
            for consumer in site.consumers:
                hook = model.get_submodule(consumer).register_forward_pre_hook(
                    lambda module, args, name=site.name: catch(module, args, name)
                )
                stack.callback(hook.remove)
        yield inputs


def unit_gradients(
    outputs: list[Tensor],
    weights: list[Tensor] | None,
    inputs: dict[str, list[Tensor]],
    sites: Sites,
    samples: int,
    keep: bool = False,
) -> Iterator[tuple[Site, Tensor]]:
    """The derivative of sum(weights * outputs) by each gate, a sample at a time.

    Args:
        outputs: Tensors with a graph; those without see no unit.
        weights: One for each, of its shape; None for a scalar.
        inputs: What `gate_inputs` yields.
        sites: The sites.
        samples: Samples in the batch.
        keep: Keep the graph, for another pass.

    Yields:
        A site and (batch, units) in float64 on the CPU.
    """
    seen = [i for i, output in enumerate(outputs) if output.requires_grad]  # a decoder's embeddings see no unit
    outputs, weights = ([part[i] for i in seen] if part is not None else None for part in (outputs, weights))
    totals = {site.name: torch.zeros(samples, site.total, dtype=torch.float64) for site in sites}
    lift = lift_of(outputs, weights)
    weights = weights if lift == 1 else [w * lift for w in weights]

    def take(gradient: Tensor, site: Site, read: Tensor) -> None:
        product = read.detach().float() * gradient.float()
        per_unit = product.reshape(samples, -1, product.shape[-1]).sum(1)  # some models join batch and seq
        totals[site.name] += per_unit.unflatten(-1, (site.total, site.width)).sum(-1).double().cpu() / lift

    with ExitStack() as stack:  # hooks, so that no gradient lives longer than the backward pass needs it
        for site in sites:
            for read in inputs[site.name]:
                stack.callback(read.register_hook(lambda g, site=site, read=read: take(g, site, read)).remove)
        torch.autograd.backward(outputs, weights, retain_graph=keep)
    for read in (read for reads in inputs.values() for read in reads if read.is_leaf):
        read.grad = None
    yield from ((site, totals[site.name]) for site in sites)


def lift_of(outputs: Sequence[Tensor], weights: Sequence[Tensor] | None) -> float:
    """By how much to multiply the weights of float16 outputs, whose derivatives would else be too small for it.

    A power of two, so that the largest weight is about one and nothing is rounded. bfloat16 has the exponents of float32.
    """
    if weights is None or all(output.dtype != torch.float16 for output in outputs):
        return 1.0
    most = max((float(weight.abs().max()) for weight in weights), default=0.0)
    return 2.0 ** -math.floor(math.log2(most)) if 0 < most < math.inf else 1.0
