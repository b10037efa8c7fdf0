"""Puts what was found of a site into words: its parts, what surgery cuts, which numbers it must keep true, what it costs."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import READ
from .layout import Layout
from .sites import Cut, Part, Site
from .trace import Trace, is_term_of, moved

# What is special: numbers of an attention that surgery must keep true, and what one unit adds to them. "heads": its query
# heads; "groups": its keys and values; "ratio": its query heads, where one key and value serves all; "channels": its width.
NUMBERS = {
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head", "config.num_attention_heads"), "heads"),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "config.num_key_value_heads"), "groups"),
    **dict.fromkeys(("num_key_value_groups",), "ratio"),
    **dict.fromkeys(("all_head_size", "embed_dim", "inner_dim", "split_size"), "channels"),
}
HEAD_SIZE = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
Found = tuple[int, str, Layout]  # position and path of the block, and the units


def make_site(model: nn.Module, trace: Trace, group: list[Found]) -> Site | None:
    """Describe a site, less its MACs; None where its units cannot be removed alike.

    Args:
        model: The model.
        trace: With a graph.
        group: Layouts that share layers or tables, and so lose the same units.
    """
    index, block, first = group[0]
    layouts = [layout for _, _, layout in group]
    if any((x.kind, x.total) != (first.kind, first.total) for x in layouts):
        return None
    parts = {outer(model, x.consumer): make_part(model, trace, x) for x in layouts}
    if first.kind == "attention" and any(part.core is None for part in parts.values()):
        return None
    cuts = tuple({cut.name: cut for x in layouts for cut in cuts_of(model, x)}.values())
    numbers = {(path, name): unit for x in layouts for path, name, unit in numbers_of(model, x, parts)}
    return Site(
        name=f"{block}.{first.kind}",
        kind=first.kind,
        layer=index,
        total=first.total,
        width=first.width,
        parts=tuple(parts.values()),
        cuts=cuts,
        hidden=trace.writes[first.consumer].shape[-1],
        unit_macs=0,
        unit_params=sum(per_unit(model, cut) for cut in cuts),
        attributes=tuple((*key, unit) for key, unit in numbers.items()),
    )


def experts_site(path: str, experts: nn.Module, block: tuple[int, str]) -> Site:
    """The neurons of stacked experts: neuron i of all of them, since they share one tensor."""
    hidden, total = experts.down_proj.shape[1:]
    cuts = (Cut(path, "gate_up_proj", 1, ((0, 1, 1), (total, 1, 1))), Cut(path, "down_proj", 2, ((0, 1, 1),)))
    numbers = ((path, "intermediate_dim", 1),) if getattr(experts, "intermediate_dim", None) == total else ()
    params = 3 * hidden * len(experts.down_proj)
    part = (Part(f"{path}.{READ}"),)
    return Site(path, "ffn", block[0], total, 1, part, cuts, hidden, 0, params, numbers)


def outer(model: nn.Module, path: str) -> str:
    """The layer that an adapter of PEFT wraps, adapter included; `path` itself where there is none."""
    names = path.split(".")
    for end in range(len(names) - 1, 0, -1):
        if hasattr(model.get_submodule(".".join(names[:end])), "base_layer"):
            return ".".join(names[:end])
    return path


def make_part(model: nn.Module, trace: Trace, layout: Layout) -> Part:
    """Where the units of `layout` are computed."""
    consumer = outer(model, layout.consumer)
    after = norm_behind(trace, layout.consumer)
    if layout.kind == "ffn":
        return Part(consumer, after)
    core = core_of(model, [outer(model, s) for s in layout.sources])
    inputs = {trace.reads[s].data_ptr() for s in layout.sources if outer(model, s) in (s, s.removesuffix(".base_layer"))}
    cache = getattr(model.get_submodule(core), "layer_idx", None) if core and len(inputs) == 1 else None
    return Part(consumer, after, core, trace.returns.get(core, 0), cache)


def core_of(model: nn.Module, sources: list[str]) -> str | None:
    """The innermost module named an attention that holds all of `sources`."""
    names = sources[0].split(".")
    for end in range(len(names) - 1, 0, -1):
        path = ".".join(names[:end])
        if "Attention" in type(model.get_submodule(path)).__name__ and all(s.startswith(path + ".") for s in sources):
            return path
    return None


def norm_behind(trace: Trace, consumer: str) -> str | None:
    """The first norm behind `consumer` that reads what it wrote, if it reads the sum with the residual stream.

    None if it reads something else: a scaled output (DINOv2), a part of the positions (Swin, CLIP).
    """
    wrote = {consumer: trace.writes[consumer]}
    for name in trace.order[trace.order.index(consumer) + 1 :]:
        read = trace.reads[name]
        if name not in trace.linears and read.requires_grad and moved(read, None, wrote):
            return name if is_term_of(trace.writes[consumer], read) else None
    return None


def cuts_of(model: nn.Module, layout: Layout) -> list[Cut]:
    """Rows of the sources, columns of the consumer, entries of the tables."""
    cuts = []
    for path, runs in layout.runs.items():
        module = model.get_submodule(path)
        cuts.append(Cut(path, "weight", int(isinstance(module, Conv1D)), runs))
        if getattr(module, "bias", None) is not None:
            cuts.append(Cut(path, "bias", 0, runs))
    columns = 1 - int(isinstance(model.get_submodule(layout.consumer), Conv1D))
    cuts.append(Cut(layout.consumer, "weight", columns, ((0, layout.width, layout.width),)))
    for name, (dim, runs) in layout.tables.items():
        cuts.append(Cut(*name.rsplit(".", 1), dim, runs))
    return cuts


def numbers_of(model: nn.Module, layout: Layout, parts: dict[str, Part]) -> list[tuple[str, str, int]]:
    """(module path, attribute, change a unit) for each number that states channels or heads."""
    found = []
    for cut in cuts_of(model, layout):
        module = model.get_submodule(cut.path)
        names = ("nx", "nf") if isinstance(module, Conv1D) else ("out_features", "in_features")
        if isinstance(module, nn.Embedding):
            found.append((cut.path, "embedding_dim", cut.size))
        elif cut.tensor == "weight":
            found.append((cut.path, names[cut.dim], cut.size))
    if layout.kind == "ffn":
        return found
    core = parts[outer(model, layout.consumer)].core
    return found + [x for path in {core: 0, **tables_owners(layout)} for x in head_numbers(model, path, core, layout)]


def tables_owners(layout: Layout) -> dict[str, int]:
    """Paths of the modules that own the tables."""
    return {name.rsplit(".", 1)[0]: 0 for name in layout.tables}


def head_numbers(model: nn.Module, path: str, core: str, layout: Layout) -> list[tuple[str, str, int]]:
    """The numbers of one module that count the heads of an attention."""
    module = model.get_submodule(path)
    size = next((getattr(model.get_submodule(core), n) for n in HEAD_SIZE if hasattr(model.get_submodule(core), n)), None)
    heads = layout.width // size if isinstance(size, int) and layout.width % size == 0 else 1
    change = {"heads": heads, "groups": 1, "ratio": heads, "channels": layout.width}
    found = []
    for name, what in NUMBERS.items():
        owner, _, attribute = name.rpartition(".")
        if owner and not reads_config(module, attribute):
            continue
        value = getattr(getattr(module, owner, None) if owner else module, attribute, None)
        if type(value) is int and value == layout.total * change[what]:
            found.append((path, name, change[what]))
    return found


def reads_config(module: nn.Module, attribute: str) -> bool:
    """Whether the forward pass of `module` asks the config, which is one for all layers (Phi-3)."""
    return f"self.config.{attribute}" in inspect.getsource(type(module).forward)


def tensor(model: nn.Module, cut: Cut) -> Tensor:
    """The tensor that `cut` is about."""
    return getattr(model.get_submodule(cut.path), cut.tensor)


def per_unit(model: nn.Module, cut: Cut) -> int:
    """Numbers of one unit in the tensor of `cut`."""
    whole = tensor(model, cut)
    return whole.numel() // whole.shape[cut.dim] * cut.size


def with_macs(model: nn.Module, count: Trace, site: Site, sources: dict[str, tuple[str, ...]]) -> tuple[Site, int]:
    """The site with the MACs of a unit, and how many of these linear layers do.

    Args:
        model: The model.
        count: One pass over the sample whose MACs are counted.
        site: The site.
        sources: Consumer -> the linear layers that feed it.
    """
    linear = sum(
        sum(rows for rows, _ in count.calls[cut.path]) * per_unit(model, cut)
        for cut in site.cuts
        if cut.path in count.calls and cut.tensor == "weight"
    )
    other = 0
    for part in site.parts:
        if part.consumer.endswith(f".{READ}"):
            rows = sum(rows for rows, _ in count.calls[part.consumer])
            other += rows * site.unit_params // len(tensor(model, site.cuts[0]))
        elif site.kind == "attention":
            other += products(count, part.consumer, sources, site.width)
    return replace(site, unit_macs=linear + other), linear


def products(count: Trace, consumer: str, sources: dict[str, tuple[str, ...]], width: int) -> int:
    """MACs of one unit's attention products: queries by keys, weights by values, queries and keys by position tables."""
    name = next(c for c in sources if c == consumer or c == f"{consumer}.base_layer")
    calls = count.calls[name]
    keys = Counter(count.calls[source][0][1] for source in sources[name]).most_common(1)[0][0]
    extra = [call for s in sources[name] for call in count.calls[s][0 if "pos_" in s else len(calls) :]]
    return sum(2 * rows * keys * width for rows, _ in calls) + sum(rows * keys * width for rows, _ in extra)
