"""Cuts one site out of the weights, in place, and knows how to undo it.

What stands from EmptiedAttention to set_number is also in publish/modeling_kdprune.py, which travels with a checkpoint and
imports nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache

from .sites import Cut, Site

Undo = list[Callable[[], None]]


class EmptiedAttention(nn.Module):
    """Stands where an attention without heads stood: nothing is computed, the output projection adds its bias."""

    def __init__(self, returns, name=None, consumer=None, cache=None):
        super().__init__()
        self.returns, self.name, self.cache = returns, name, cache
        if name:
            self.add_module(name, consumer)

    def forward(self, *args, **kwargs):
        """(batch, seq, hidden) -> (batch, seq, 0), or what the output projection makes of it."""
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        hidden_states = next(value for value in given if isinstance(value, torch.Tensor))
        for cache in (value for value in given if isinstance(value, Cache) and self.cache is not None):
            # the cache tells the length of the text by what its first layer holds
            cache = getattr(cache, "self_attention_cache", cache)
            empty = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(empty, empty, self.cache)
        output = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        if self.name:
            output = self.get_submodule(self.name)(output)
        return (output, *[None] * (self.returns - 1)) if self.returns else output


class LayerConfig:
    """The config of the model as one layer sees it, which has other numbers than the rest."""

    def __init__(self, config):
        self.__dict__["config"] = config

    def __getattr__(self, name):
        if name == "config":  # not there yet while it is copied
            raise AttributeError(name)
        return getattr(self.config, name)


def set_number(module, name, value):
    """Set an attribute of `module`, or of its own view of the config where it is called "config...."."""
    owner, _, name = name.rpartition(".")
    if owner and not isinstance(module.config, LayerConfig):
        module.config = LayerConfig(module.config)
    setattr(module.config if owner else module, name, value)


def cut_site(model: nn.Module, site: Site, kept: list[int], undo: Undo) -> None:
    """Keep the units `kept` of one site; what reverses it is appended to `undo`."""
    removed = sorted(set(range(site.total)) - set(kept))
    for cut in site.cuts:
        cut_tensor(model.get_submodule(cut.path), cut, removed, undo)
    for path, name, unit in site.attributes:
        module = model.get_submodule(path)
        undo.append(snapshot(module, name))
        set_number(module, name, read_number(module, name) - unit * len(removed))
    for part in site.parts:
        if part.core and not kept:
            old, consumer = model.get_submodule(part.core), model.get_submodule(part.consumer)
            model.set_submodule(
                part.core, EmptiedAttention(part.returns, part.inner, consumer if part.inner else None, part.cache)
            )
            undo.append(lambda path=part.core, old=old: model.set_submodule(path, old))


def read_number(module: nn.Module, name: str) -> int:
    """An attribute of `module`, or of its config."""
    owner, _, name = name.rpartition(".")
    return getattr(module.config if owner else module, name)


def snapshot(module: nn.Module, name: str) -> Callable[[], None]:
    """What puts a number of `module` back as it is now."""
    owner, _, attribute = name.rpartition(".")
    if owner and isinstance(module.config, LayerConfig):  # of an earlier pruning
        config, old = module.config, dict(vars(module.config))
        return lambda: vars(config).update(old)
    name = owner or attribute
    return lambda old=getattr(module, name): setattr(module, name, old)


def cut_tensor(module: nn.Module, cut: Cut, removed: list[int], undo: Undo) -> None:
    """Take the entries of the removed units out of one tensor, in place."""
    old = getattr(module, cut.tensor)
    undo.append(lambda: setattr(module, cut.tensor, old))
    new = old.detach().index_select(cut.dim, entries_left(cut, removed, old.shape[cut.dim]).to(old.device)).clone()
    setattr(module, cut.tensor, nn.Parameter(new, requires_grad=old.requires_grad))


def entries_left(cut: Cut, removed: list[int], size: int) -> torch.Tensor:
    """The entries of a dimension of `size` that stay when the units `removed` go, ascending."""
    gone = set(cut.indices(removed))
    return torch.tensor([i for i in range(size) if i not in gone], dtype=torch.long)
