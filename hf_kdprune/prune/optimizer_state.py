"""The optimizer's state of a model, cut along when the model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .cutting import entries_left
from .sites import Plan, Site

Shapes = dict[str, torch.Size]


def check_optimizer(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
    """Raise unless what the optimizer remembers of a weight is cut as the weight is.

    Args:
        optimizer: Of `weight` alone; it takes a step.
        weight: A matrix of which nothing else is made.

    Raises:
        ValueError: It remembers tensors of other shapes.
    """
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    odd = {k: list(v.shape) for k, v in optimizer.state[weight].items() if isinstance(v, Tensor) and not fits(v, weight.shape)}
    if odd:
        raise ValueError(
            f"pruning in stages cuts the optimizer's state along with the weights; {type(optimizer).__name__} keeps "
            f"{odd} of a weight of {list(weight.shape)}, which cannot be cut: take an optimizer such as adamw_torch, or "
            'schedule="one_shot"'
        )


def fits(remembered: Tensor, shape: torch.Size) -> bool:
    """Whether a tensor of the state is shaped like its weight, or is a single number."""
    return remembered.shape == shape or not remembered.shape


def shapes_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> Shapes:
    """Names and shapes of the weights that `optimizer` holds, in the order in which its state dict numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: p.shape for group in optimizer.param_groups for p in group["params"]}


def cut_along(state: dict, before: Shapes, smaller: nn.Module, fresh: torch.optim.Optimizer, cuts: Mapping) -> dict:
    """A state dict of the optimizer for the smaller model.

    Args:
        state: That of the larger model.
        before: What it numbered, see `shapes_of`.
        smaller: The model after surgery.
        fresh: An optimizer of it, made in the same way.
        cuts: See `cuts_of`.
    """
    names = list(before)
    states = {
        names[i]: {key: narrowed(value, before[names[i]], cuts.get(names[i], ())) for key, value in mine.items()}
        for i, mine in state["state"].items()
    }
    groups = zip(state["param_groups"], fresh.state_dict()["param_groups"], strict=True)
    numbered = enumerate(shapes_of(fresh, smaller))
    return {
        "state": {i: states[name] for i, name in numbered if name in states},
        "param_groups": [{**old, "params": new["params"]} for old, new in groups],
    }


def cuts_of(model: nn.Module, sites: Sequence[Site], plan: Plan) -> dict[str, list[tuple[int, Tensor]]]:
    """Name of a tensor -> (dimension, entries that stay) of each cut that surgery makes in it, in its order.

    Args:
        model: Before surgery.
        sites: Its sites.
        plan: What stays.
    """
    cuts: dict[str, list[tuple[int, Tensor]]] = {}
    for site in sites:
        for cut in site.cuts:
            size = getattr(model.get_submodule(cut.path), cut.tensor).shape[cut.dim]
            cuts.setdefault(cut.name, []).append((cut.dim, entries_left(cut, plan[site.name].removed, size)))
    return cuts


def narrowed(remembered: object, shape: torch.Size, cuts: Sequence[tuple[int, Tensor]]) -> object:
    """What is left of one entry of the state."""
    if isinstance(remembered, Tensor) and remembered.shape == shape:
        for dim, kept in cuts:
            remembered = remembered.index_select(dim, kept.to(remembered.device))
    return remembered
