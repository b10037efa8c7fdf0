"""Whether a model's own class can express a smaller shape by the fields of its config alone, with no code of ours."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .describe import HEAD_SIZE, tensor
from .sites import Site, Sites

# The fields of a config that state FFN widths and heads; each is set only where it says what the model has.
FFN_FIELDS = (
    *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim", "n_inner", "d_inner"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"),
)
HEAD_FIELDS = (
    *("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads"),
    "num_decoder_attention_heads",
)
GROUP_FIELDS = ("num_key_value_heads", "num_kv_heads")


def stock_config(model: PreTrainedModel, sites: Sites, kept: dict[str, int]) -> PreTrainedConfig | None:
    """The config by which the stock class of `model` builds the shapes that are left; None if no config does.

    Args:
        model: The model before surgery, or one whose `sites` say how it was.
        sites: Its sites.
        kept: Site name -> number of units that stay.
    """
    config = copy.deepcopy(model.config)
    if getattr(config, "kdprune", None) or not isinstance(model, PreTrainedModel):
        return None  # it was no stock model to begin with
    for kind in ("ffn", "attention"):
        mine = [s for s in sites if s.kind == kind]
        sizes = {(s.total, kept[s.name]) for s in mine}
        if any(before != after for before, after in sizes) and not set_fields(model, config, mine, sizes):
            return None
    wanted = shapes_after(model, sites, kept)
    stock = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers."))
    try:
        with torch.device("meta"):
            built = stock(config)
    except (ValueError, RuntimeError, AssertionError):  # hidden sizes that heads do not divide
        return None
    return config if {name: tuple(p.shape) for name, p in built.state_dict().items()} == wanted else None


def set_fields(model: nn.Module, config: PreTrainedConfig, sites: list[Site], sizes: set[tuple[int, int]]) -> bool:
    """Write the sizes that are left into `config`; False where the layers are not alike."""
    if len(sizes) != 1 or 0 in {after for _, after in sizes}:
        return False
    ((before, after),) = sizes
    if sites[0].kind == "ffn":
        change(config, FFN_FIELDS, before, after)
        return True
    core = model.get_submodule(sites[0].parts[0].core)
    size = next((getattr(core, name) for name in HEAD_SIZE if isinstance(getattr(core, name, None), int)), sites[0].width)
    heads = sites[0].width // size
    change(config, HEAD_FIELDS, before * heads, after * heads)
    change(config, GROUP_FIELDS, before, after)
    if not isinstance(getattr(type(config), "head_dim", None), property):
        config.head_dim = size  # it would be derived from the new number of heads
    return True


def change(config: PreTrainedConfig, fields: tuple[str, ...], before: int, after: int) -> None:
    """Set those of `fields` that say `before`, or leave it to be derived; also in the configs of towers."""
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name in fields:
            if name in vars(part) and getattr(part, name) in (before, None):
                setattr(part, name, after)


def adopt(config: PreTrainedConfig, other: PreTrainedConfig) -> None:
    """Make `config`, to which all parts of a model refer, say what `other` says."""
    names = ("", *config.sub_configs)
    for mine, theirs in ((getattr(c, n) if n else c for c in (config, other)) for n in names):
        for name, value in vars(theirs).items():
            if name not in config.sub_configs and vars(mine).get(name) != value:
                setattr(mine, name, value)


def shapes_after(model: nn.Module, sites: Sites, kept: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in the state dict once `kept` is left."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for site in sites:
        for cut in site.cuts:
            shape = list(tensor(model, cut).shape)
            shape[cut.dim] -= cut.size * (site.total - kept[site.name])
            shapes[cut.name] = tuple(shape)
    return shapes


def stock_kinds(model: PreTrainedModel, sites: Sites) -> tuple[str, ...]:
    """Which of "attention" and "ffn" the stock class can have fewer of, in all layers alike."""
    kinds = []
    for kind in ("attention", "ffn"):
        kept = {s.name: s.total - int(s.kind == kind) for s in sites}
        if any(s.kind == kind and s.total > 1 for s in sites) and stock_config(model, sites, kept) is not None:
            kinds.append(kind)
    return tuple(kinds)
