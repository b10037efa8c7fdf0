"""Loads a model that hf_kdprune made smaller. This file travels inside the checkpoint; it needs torch and transformers.

Every class of transformers has a compact twin here under its own name (`modeling_kdprune.BertForSequenceClassification`): the
same class, whose layers take the shapes that `config.kdprune` states before the weights are loaded.
"""

import transformers
from torch import nn
from transformers import PreTrainedModel

VERSION = 1


class EmptiedAttention(nn.Module):
    """Stands where an attention without heads stood: nothing is computed, the output projection adds its bias."""

    def __init__(self, returns, name=None, consumer=None):
        super().__init__()
        self.returns, self.name = returns, name
        if name:
            self.add_module(name, consumer)

    def forward(self, hidden_states, *args, **kwargs):
        """(batch, seq, hidden) -> (batch, seq, 0), or what the output projection makes of it."""
        output = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        if self.name:
            output = self.get_submodule(self.name)(output)
        return (output, *[None] * (self.returns - 1)) if self.returns else output


def reshape(model, section):
    """Give the layers of a freshly built `model` the shapes that `section`, the config's "kdprune", states."""
    if section.get("version", 0) > VERSION:
        raise ValueError(
            f"this checkpoint has kdprune version {section['version']} and this file reads up to {VERSION}: "
            "take the newer modeling_kdprune.py that belongs to the checkpoint"
        )
    for site in section["sites"].values():
        for path, (rows, columns) in site["linears"].items():
            linear = model.get_submodule(path)
            linear.weight = nn.Parameter(linear.weight.detach()[:rows, :columns].clone())
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach()[:rows].clone())
            linear.out_features, linear.in_features = rows, columns
        for path, values in site["attributes"].items():
            for name, value in values.items():
                setattr(model.get_submodule(path), name, value)
        if emptied := site.get("emptied"):
            inner = emptied["consumer"]
            consumer = model.get_submodule(f"{emptied['core']}.{inner}") if inner else None
            model.set_submodule(emptied["core"], EmptiedAttention(emptied["returns"], inner, consumer))


def compact(stock):
    """The twin of `stock`, a model class of transformers, that reads `config.kdprune`."""

    def __init__(self, config, *args, **kwargs):
        stock.__init__(self, config, *args, **kwargs)
        reshape(self, config.kdprune)

    return type(stock.__name__, (stock,), {"__init__": __init__, "__module__": __name__, "__doc__": stock.__doc__})


def __getattr__(name):
    stock = getattr(transformers, name, None) if not name.startswith("_") else None
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = compact(stock)  # the same class each time, so that pickle finds it again
    return globals()[name]
