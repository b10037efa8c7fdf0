"""Loads a model that hf_kdprune made smaller. This file travels inside the checkpoint; it needs torch and transformers.

Every class of transformers has a compact twin here under its own name (`modeling_kdprune.BertForSequenceClassification`): the
same class, whose layers take the shapes that `config.kdprune` states before the weights are loaded.
"""

import torch
import transformers
from torch import nn
from transformers import Cache, PreTrainedModel

VERSION = 1
# A tensor of this name lies in each checkpoint, so that who forgets the argument reads it in transformers' report of the error.
HINT = "load_it_with.trust_remote_code=True"


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


def reshape(model, section):
    """Give the layers of a freshly built `model` the shapes that `section`, the config's "kdprune", states."""
    if section.get("version", 0) > VERSION:
        raise ValueError(
            f"this checkpoint has kdprune version {section['version']} and this file reads up to {VERSION}: "
            "take the newer modeling_kdprune.py that belongs to the checkpoint"
        )
    for site in section["sites"].values():
        for name, shape in site["tensors"].items():
            path, _, tensor = name.rpartition(".")
            module = model.get_submodule(path)
            old = getattr(module, tensor).detach()
            setattr(module, tensor, nn.Parameter(old[tuple(slice(size) for size in shape)].clone()))
        for path, numbers in site["attributes"].items():
            for name, value in numbers.items():
                set_number(model.get_submodule(path), name, value)
        for part in site["emptied"]:
            consumer = model.get_submodule(part["consumer"]) if part["inner"] else None
            model.set_submodule(part["core"], EmptiedAttention(part["returns"], part["inner"], consumer, part["cache"]))


def compact(stock):
    """The twin of `stock`, a model class of transformers, that reads `config.kdprune`."""

    def __init__(self, config, *args, **kwargs):
        stock.__init__(self, config, *args, **kwargs)
        reshape(self, config.kdprune)

    known = [*(stock._keys_to_ignore_on_load_unexpected or ()), HINT]
    body = {"__init__": __init__, "_keys_to_ignore_on_load_unexpected": known, "__doc__": stock.__doc__}
    return type(stock.__name__, (stock,), {**body, "__module__": __name__})


def __getattr__(name):
    stock = getattr(transformers, name, None) if not name.startswith("_") else None
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = compact(stock)  # the same class each time, so that pickle finds it again
    return globals()[name]
