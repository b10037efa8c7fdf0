"""Finds the sites of a transformers model from the model itself: no table of architectures.

The derivative of what an output projection reads, by what the layers before it wrote, tells what feeds it: a neuron's
channel depends on its own rows alone, a head's on the rows of its query, its key and its value, in whatever layout.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..inputs import at_length, made_up_inputs
from ..layers import evaluating, inputs_of
from .describe import Found, experts_site, make_site, outer, with_macs
from .experts import find_experts
from .layout import Layout, find_layout
from .sites import Site, Sites
from .trace import LINEAR, only_tables_learn, record, tables_of
from .trial import first_output, in_float32, tried

logger = logging.getLogger(__name__)


def find_sites(model: PreTrainedModel, batch: dict[str, Tensor] | None = None, seq_len: int | None = None) -> Sites:
    """Find every attention and FFN of `model` whose heads or neurons can be removed.

    Args:
        model: Any transformers model, in PEFT or not; it is run on a tiny input and left as it was.
        batch: Inputs, if made-up ones will not do; the first row is used.
        seq_len: Tokens at which MACs are counted; default: those of `batch`.

    Raises:
        ValueError: The model is wrapped, quantised or offloaded, or no site was found, with the reason.
    """
    sites = trace_sites(model, batch, seq_len)
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no prunable site: no block in which the projections of an attention, or the two "
            "layers of an FFN, could be told apart from the derivatives. Give a transformer, or batch=, real inputs of it"
        )
    report_uncut(model, sites)
    return sites


def trace_sites(model: PreTrainedModel, batch: dict[str, Tensor] | None = None, seq_len: int | None = None) -> Sites:
    """As `find_sites`, but a model without any site gives an empty list with its fixed costs."""
    refuse_unfit(model)
    batch = None if batch is None else {k: v[:1] for k, v in inputs_of(batch).items()}
    tiny = made_up_inputs(model) if batch is None or "input_ids" in batch else batch
    counted = batch or tiny
    counted = at_length(counted, seq_len) if seq_len else counted
    blocks = enumerate_blocks(model)
    with torch.random.fork_rng(devices=[]):  # before transformers 5.23, wav2vec2 and its like draw in evaluation too
        with evaluating(model), in_float32(model, tiny) as tiny:
            with only_tables_learn(model):
                layouts, sites = understood(model, tiny, blocks)
            sites = that_can_be_cut(model, sites, tiny)
        count = record(model, counted, graph=False)
    sources = {layout.consumer: layout.sources for _, _, layout in layouts}
    priced = [with_macs(model, count, site, sources) for site in sites]
    linear = sum(sum(rows for rows, _ in count.calls[n]) * m.weight.numel() for n, m in count.linears.items())
    return Sites(
        named(site for site, _ in priced),
        other_macs=linear + count.other_macs - sum(part * site.total for site, part in priced),
        other_params=sum(p.numel() for p in model.parameters()) - sum(s.unit_params * s.total for s in sites),
        seq_len=counted["input_ids"].shape[1] if "input_ids" in counted else None,
    )


def understood(model: nn.Module, batch: dict[str, Tensor], blocks: list[tuple[int, str]]) -> tuple[list[Found], list[Site]]:
    """What the derivatives tell: layouts in front of each output projection, and the sites that they make, less costs."""
    trace, tables = record(model, batch, graph=True), tables_of(model)
    inside = [(name, block) for name in trace.linears for block in blocks if name.startswith(block[1] + ".")]
    layouts = [(*block, find_layout(trace, name, block[1], tables)) for name, block in inside]
    layouts = [found for found in layouts if found[2] is not None and not within_adapter(model, found[2])]
    sites = [site for group in coupled(layouts) if (site := make_site(model, trace, group)) is not None]
    sites += [experts_site(path, experts, block_of(blocks, path)) for path, experts in find_experts(model)]
    ran = {outer(model, name): i for i, name in enumerate(trace.calls)}
    return layouts, sorted(sites, key=lambda site: ran[site.parts[0].consumer])


def within_adapter(model: nn.Module, layout: Layout) -> bool:
    """Whether the units are the ranks of an adapter, which go with it when it is merged."""
    wrapped = outer(model, layout.consumer)
    return wrapped != layout.consumer and any(outer(model, source) == wrapped for source in layout.sources)


def that_can_be_cut(model: nn.Module, sites: list[Site], batch: dict[str, Tensor]) -> list[Site]:
    """The sites whose smaller form equals the gated one; one of each group of blocks is tried, the others are like it.

    Where one alone cannot lose a head, all of its group may together: T5 hands a bias for all heads from block to block.
    """
    groups: dict[tuple, list[Site]] = {}
    for site in sites:
        pattern = re.sub(r"\.\d+\.", ".", site.parts[0].consumer)
        groups.setdefault((pattern, site.kind, site.total, site.width), []).append(site)
    good = []
    if not bool(first_output(model, batch).isfinite().all()):
        raise ValueError(f"{type(model).__name__} must give finite outputs, and gives NaN or infinity: look at its weights")
    for group in groups.values():
        like, reason = tried(model, group[0], batch)
        if like is None and len(group) > 1 and tried(model, together(group), batch)[0] is not None:
            group = [together(group)]
            like, reason = tried(model, group[0], batch)
        if like is None:
            say_once(f"{group[0].name} and its like stay as they are: a smaller one would not compute the same ({reason})")
        else:
            good += [replace(site, least=like.least) for site in group]
    return sorted(good, key=sites_order(sites))


def sites_order(sites: list[Site]) -> Callable[[Site], int]:
    """Where a site, or the first that it was made of, stands in `sites`."""
    places = {site.parts[0].consumer: i for i, site in enumerate(sites)}
    return lambda site: places[site.parts[0].consumer]


def together(sites: list[Site]) -> Site:
    """One site of several that lose the same units."""
    return replace(
        sites[0],
        parts=tuple(part for site in sites for part in site.parts),
        cuts=tuple(cut for site in sites for cut in site.cuts),
        attributes=tuple(number for site in sites for number in site.attributes),
        unit_params=sum(site.unit_params for site in sites),
    )


def report_uncut(model: nn.Module, sites: Sites) -> None:
    """Say once which linear layers of blocks no site cuts: they stay as they are."""
    cut = {cut.path for site in sites for cut in site.cuts}
    blocks = tuple(f"{path}." for _, path in enumerate_blocks(model))
    uncut = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and name.startswith(blocks) and name not in cut and module.weight.numel()
    ]
    if uncut:
        say_once(f"{len(uncut)} linear layers of the blocks stay as they are, such as {uncut[0]}")


@cache
def say_once(message: str) -> None:
    """Log a warning, the first time that it is said."""
    logger.warning(message)


def refuse_unfit(model: nn.Module) -> None:
    """Raise if the weights of `model` could not be cut.

    Raises:
        ValueError: It is wrapped, quantised, compiled, or partly not in memory.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"A plain transformers PreTrainedModel is needed, not {type(model).__name__}: unwrap it first (model.module for "
            "DDP, model._orig_mod for a compiled model)"
        )
    if getattr(base, "hf_quantizer", None) is not None or getattr(base, "is_quantized", False):
        raise ValueError(
            f"{type(base).__name__} is quantised, and surgery cuts plain weights: load it without quantization_config, "
            "prune it, then quantise the smaller model"
        )
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in base.modules()):
        raise ValueError(
            f"{type(base).__name__} was compiled in place, and a compiled graph sees no gates: prune the model first, then "
            "call its compile()"
        )
    if away := [name for name, p in base.named_parameters() if p.is_meta]:
        raise ValueError(
            f"{type(base).__name__} has weights that are not in memory, such as {away[0]}: load it without offloading, on "
            "a device that holds it"
        )


def enumerate_blocks(model: nn.Module) -> list[tuple[int, str]]:
    """(position, path) of each block: the elements of module lists that hold linear layers, outermost lists only."""
    found: list[tuple[int, str]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(path + ".") for _, path in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found += [
                (i, f"{name}.{i}")
                for i, block in enumerate(module)
                if any(isinstance(m, LINEAR) for m in block.modules()) and not isinstance(block, LINEAR)
            ]
    return found


def block_of(blocks: list[tuple[int, str]], path: str) -> tuple[int, str]:
    """The block in which `path` lies."""
    return next(block for block in blocks if path.startswith(block[1] + "."))


def coupled(layouts: list[Found]) -> list[list[Found]]:
    """Layouts in groups that share layers or tables (adapters, a position bias of all blocks): they lose the same units."""
    groups: list[list[Found]] = []
    for item in layouts:
        owned = {*item[2].runs, *item[2].tables}
        mine = [g for g in groups if any(owned & {*other.runs, *other.tables} for _, _, other in g)]
        groups = [g for g in groups if g not in mine] + [[found for g in mine for found in g] + [item]]
    order = {id(item): i for i, item in enumerate(layouts)}
    return sorted(groups, key=lambda group: order[id(group[0])])


def named(sites: list[Site]) -> list[Site]:
    """Where several sites of a block are of one kind, each is named by its own module."""
    sites = list(sites)
    counts = Counter(site.name for site in sites)
    return [
        replace(s, name=s.parts[0].core or s.parts[0].consumer.rpartition(".")[0]) if counts[s.name] > 1 else s for s in sites
    ]
