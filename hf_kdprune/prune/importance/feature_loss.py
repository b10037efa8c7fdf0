"""The second loss: how far the features would move if a unit went, from teacher and student features alone.

    score(u) = -dL2/dg_u + (J^T J)_uu        L2 = ||r||^2,  J = dr/dg,  g the gates

Where student and teacher are equal the first term is exactly zero and the curvature ranks. One backward pass of random
features, scaled by the metric, estimates it for all units at once. Source: METHOD.md 1 and 2; Hutchinson 1990.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...layers import LayerMatch, at_real, hidden_states, match_layers, positions_of, real_positions, target_features
from ..experts import readable_experts
from ..sites import Site, Sites
from .asked import Asked

Batch = dict[str, Tensor]
Table = dict[str, Tensor]


def covariance(model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked) -> tuple:
    """Scores under the metric Sigma / tr(Sigma)^2: errors count in the directions in which the teacher varies."""
    return curvature(model, teacher, batches, asked, root=lambda m: matrix_root(m.covariance))


def plain(model: PreTrainedModel, teacher: PreTrainedModel | None, batches: Sequence[Batch], asked: Asked) -> tuple:
    """Scores under the metric 1 / (d Var): every direction counts alike."""

    def root(match: LayerMatch) -> Tensor:
        return torch.eye(len(match.covariance)) / (len(match.covariance) * match.variance) ** 0.5

    return curvature(model, teacher, batches, asked, root=root)


def matrix_root(covariance: Tensor) -> Tensor:
    """Sigma^(1/2) / tr(Sigma), (hidden, hidden)."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T / values.sum()).float()


def curvature(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[Batch],
    asked: Asked,
    root: Callable[[LayerMatch], Tensor],
) -> tuple[Table, Table]:
    """Score every unit by one probe a batch.

    Args:
        model: The student.
        teacher: Another model, whose first-order term is added; None: the student itself.
        batches: Calibration inputs.
        asked: Sites, mapped layers and the probe's seed.
        root: LayerMatch -> (hidden, hidden) root of the metric.

    Returns:
        Scores and their standard errors, site name -> (units,).
    """
    sites = asked.sites
    matches = asked.matches or match_layers(model, teacher, batches)
    matches = [m for m in matches if m.student > 0]  # no unit lies before the embeddings
    roots = [root(m).to(model.device) for m in matches]
    scale = (len(matches) * sum(int(real_positions(b).sum()) for b in batches)) ** -0.5
    generator = torch.Generator().manual_seed(asked.seed)
    first = {s.name: torch.zeros(s.total, dtype=torch.float64) for s in sites}
    second, fourth = ({k: v.clone() for k, v in first.items()} for _ in range(2))
    samples = 0
    with still(*(m for m in (model, teacher) if m is not None)), gate_inputs(model, sites) as inputs:
        for batch in tqdm(batches, desc="rank", unit="batch", disable=None, leave=False):  # None: on a terminal only
            states, size = hidden_states(model, batch), len(next(iter(batch.values())))
            samples += size
            if teacher is not None:
                target = target_features(teacher, batch, matches)
                errors = [(states[m.student] - t) @ r for m, t, r in zip(matches, target, roots, strict=True)]
                loss = sum((at_real(e, batch) * scale).square().sum() for e in errors)
                for site, v in unit_gradients([loss], None, inputs, sites, size):
                    first[site.name] += v.sum(0)
            learnt = [states[m.student] for m in matches]
            probe = [noise(x, positions_of(batch, x), generator) @ r * scale for x, r in zip(learnt, roots, strict=True)]
            seen = [i for i, state in enumerate(learnt) if state.requires_grad]  # a decoder's embeddings see no unit
            learnt, probe = ([part[i] for i in seen] for part in (learnt, probe))
            for site, v in unit_gradients(learnt, probe, inputs, sites, size):
                second[site.name] += v.square().sum(0)
                fourth[site.name] += v.pow(4).sum(0)
    errors = {name: (fourth[name] - second[name] ** 2 / samples).clamp(min=0).sqrt() for name in second}
    return {name: second[name] - first[name] for name in second}, errors


def noise(like: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, 0 at padding; drawn on the CPU so that every device ranks by the same probe."""
    return torch.randn(like.shape, generator=generator).to(like.device) * mask[..., None]


@contextmanager
def still(*models: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, no gradient checkpointing) with frozen weights; all as it was afterwards."""
    modes = [(m, m.training) for m in models]
    trained = [p for m in models for p in m.parameters() if p.requires_grad]
    for m in models:
        m.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for m, mode in modes:
            m.train(mode)


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
    outputs: list[Tensor], weights: list[Tensor] | None, inputs: dict[str, list[Tensor]], sites: Sites, samples: int
) -> Iterator[tuple[Site, Tensor]]:
    """The derivative of sum(weights * outputs) by each gate, a sample at a time.

    The graph stays if `weights` is None (a scalar output), for the probe that follows.

    Yields:
        A site and (batch, units) in float64 on the CPU.
    """
    reads = [read for s in sites for read in inputs[s.name]]
    found = torch.autograd.grad(outputs, reads, grad_outputs=weights, retain_graph=weights is None, allow_unused=True)
    gradients = iter(found)
    for site in sites:
        total = torch.zeros(samples, site.total, dtype=torch.float64)
        for read in inputs[site.name]:
            if (gradient := next(gradients)) is not None:  # no feature sees a block behind the last of them
                product = read.detach().float() * gradient.float()
                per_unit = product.reshape(samples, -1, product.shape[-1]).sum(1)  # some models join batch and seq
                total += per_unit.unflatten(-1, (site.total, site.width)).sum(-1).double().cpu()
        yield site, total
