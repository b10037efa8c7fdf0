"""Finds the sites of a transformers model from the model itself: no table of architectures.

One channel of one linear layer is shaken on a tiny input; the channels that move at the input of the next linear layer
tell what it is. A neuron or a value channel moves its own channel alone, a query or key channel moves its whole head.
"""

from __future__ import annotations

import logging
import os.path
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers import inputs_of
from .sites import Site, Sites

logger = logging.getLogger(__name__)

# Integers of an attention module that state its heads, with the channels that one unit adds (0: the head size).
HEAD_ATTRIBUTES = {"num_attention_heads": 1, "num_heads": 1, "n_heads": 1, "all_head_size": 0}


@dataclass
class Trace:
    """What one forward pass over the tiny input showed, in the order of execution."""

    linears: dict[str, nn.Linear] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)  # linear layers and norms
    repeated: dict[str, int] = field(default_factory=dict)  # linear layers that ran more than once -> rows then read
    outputs: dict[str, object] = field(default_factory=dict)


def find_sites(model: PreTrainedModel, batch: dict[str, Tensor] | None = None, seq_len: int | None = None) -> Sites:
    """Find every attention and FFN of `model` whose heads or neurons can be removed.

    Args:
        model: Any transformers model; it is run on a tiny input and left as it was.
        batch: Inputs, if eight random tokens will not do.
        seq_len: Tokens at which MACs are counted; default: those of `batch`.

    Raises:
        ValueError: The model is wrapped, or no site was found, with the reason.
    """
    sites = trace_sites(model, batch, seq_len)
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no prunable site: no block in which separate query, key, value and output "
            "projections, or an up and a down projection, could be told apart. Give a transformer encoder"
        )
    report_uncut(model, sites)
    return sites


def report_uncut(model: nn.Module, sites: Sites) -> None:
    """Log the linear layers of blocks that no site cuts: they stay as they are."""
    cut = {name for site in sites for name in (*site.producers, site.consumer)}
    blocks = tuple(f"{path}." for _, path in enumerate_blocks(model))
    uncut = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(blocks) and name not in cut and module.weight.numel()
    ]
    if uncut:
        logger.warning("%d linear layers were not understood and stay as they are, such as %s", len(uncut), uncut[0])


def trace_sites(model: PreTrainedModel, batch: dict[str, Tensor] | None = None, seq_len: int | None = None) -> Sites:
    """As `find_sites`, but a model without any site gives an empty list with its fixed costs."""
    refuse_wrapped(model)
    batch = tiny_batch(model) if batch is None else {k: v[:1] for k, v in inputs_of(batch).items()}
    was_training = model.training
    model.eval()
    try:
        trace = record(model, batch)
        sites = [site for i, path in enumerate_blocks(model) for site in sites_of_block(model, batch, trace, (i, path))]
    finally:
        model.train(was_training)
    return with_costs(model, sites, trace, next(iter(batch.values())).shape[1], seq_len)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if `model` is no plain transformers model: its linear layers would not be its own."""
    if hasattr(model, "peft_config") or not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"A plain transformers PreTrainedModel is needed, not {type(model).__name__}: "
            "unwrap it first (model.merge_and_unload() for PEFT, model.module for DDP)"
        )


def tiny_batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """Eight random tokens; the same at each call.

    Raises:
        ValueError: The model does not read tokens.
    """
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name!r}, and made-up inputs exist for 'input_ids' only: "
            "give batch=, one real batch of its inputs"
        )
    generator = torch.Generator().manual_seed(0)
    low = min(5, model.config.vocab_size - 1)  # past the special tokens: padding would be masked
    ids = torch.randint(low, model.config.vocab_size, (1, 8), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def record(model: nn.Module, batch: dict[str, Tensor]) -> Trace:
    """Run `model` once and note what each linear layer reads and what each module gives."""
    trace = Trace()

    def note(module: nn.Module, args: tuple, output: object, name: str) -> None:
        trace.outputs[name] = output
        if name in trace.linears:
            trace.repeated[name] = trace.repeated.get(name, 0) + args[0].numel() // max(args[0].shape[-1], 1)
        elif isinstance(module, nn.Linear):
            trace.linears[name], trace.inputs[name] = module, args[0]
            trace.calls.append(name)
        elif type(module).__name__.endswith("Norm"):
            trace.calls.append(name)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_hook(lambda m, a, o, name=name: note(m, a, o, name))
            stack.callback(hook.remove)
        model(**batch)
    return trace


@torch.no_grad()
def record_shaken(model: nn.Module, batch: dict[str, Tensor], shaken: list[tuple[str, int]]) -> dict[str, Tensor]:
    """What linear layers read, (1 + shaken, seq, width): row 0 as it is, row i + 1 with shaken[i] = (name, channel)."""
    rows = {k: v.expand(1 + len(shaken), *v.shape[1:]) for k, v in batch.items()}
    inputs: dict[str, Tensor] = {}

    def shake(module: nn.Module, args: tuple, output: Tensor, name: str) -> Tensor:
        if len(output) % (1 + len(shaken)):
            return output  # of a table of positions, which all rows share
        inputs.setdefault(name, args[0].reshape(1 + len(shaken), -1, args[0].shape[-1]))
        by_row = output.clone().reshape(1 + len(shaken), -1, output.shape[-1])  # some models join batch and seq
        for row, (_, channel) in ((i, s) for i, s in enumerate(shaken, 1) if s[0] == name):
            # Other at each position (softmax forgets a shift of all keys), and large enough to pass a ReLU.
            noise = torch.randn(by_row.shape[1], generator=torch.Generator().manual_seed(1)).to(output)
            by_row[row, :, channel] += noise * (10 * by_row[row].float().std() + 1).to(output.dtype)
        return by_row.reshape(output.shape)

    with ExitStack() as stack:
        for name in {name for name, _ in shaken}:
            hook = model.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: shake(m, a, o, name))
            stack.callback(hook.remove)
        model(**rows)
    return inputs


def enumerate_blocks(model: nn.Module) -> list[tuple[int, str]]:
    """(position, path) of each block: the elements of module lists that hold linear layers, outermost lists only."""
    found: list[tuple[int, str]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(path + ".") for _, path in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found += [
                (i, f"{name}.{i}")
                for i, block in enumerate(module)
                if any(isinstance(m, nn.Linear) for m in block.modules()) and not isinstance(block, nn.Linear)
            ]
    return found


def sites_of_block(model: nn.Module, batch: dict[str, Tensor], base: Trace, block: tuple[int, str]) -> list[Site]:
    """The sites of one block: consumers whose inputs single channels of earlier linear layers can be traced to."""
    inside = [name for name in base.calls if name.startswith(block[1] + ".") and name in base.linears]
    live = [name for name in inside if base.linears[name].weight.numel()]  # less those that surgery emptied
    shaken = [(name, channel) for name in live for channel in (0, base.linears[name].out_features - 1)]
    inputs = record_shaken(model, batch, shaken) if shaken else {}
    own: dict[str, list[str]] = {}  # consumer -> producers that move their own channel alone
    heads: dict[str, dict[str, int]] = {}  # consumer -> producers that move a whole head, with its size
    for i, name in enumerate(live):
        width = base.linears[name].out_features
        later = inside[inside.index(name) + 1 :]
        first, last = (first_moved(inputs, later, row) for row in (2 * i + 1, 2 * i + 2))
        if first is None or last is None or first[0] != last[0]:
            continue
        consumer, size = first[0], len(first[1])
        if base.linears[consumer].in_features != width or last[1] != list(range(width - size, width)):
            continue
        if size == 1 and first[1] == [0]:
            own.setdefault(consumer, []).append(name)
        elif first[1] == list(range(size)):
            heads.setdefault(consumer, {})[name] = size
    return [make_site(model, base, block, own[c], heads.get(c, {}), c) for c in inside if c in own]


def first_moved(inputs: dict[str, Tensor], later: list[str], row: int) -> tuple[str, list[int]] | None:
    """The first of the layers `later` whose input in `row` is not that of row 0, and the channels that moved."""
    for name in later:
        if name not in inputs or not inputs[name].shape[-1]:
            continue
        base = inputs[name][0]
        difference = (inputs[name][row] - base).abs().amax(0)
        if difference.max() > 1e-5 * base.abs().max():  # rows of one batch differ by rounding
            return name, (difference > 1e-3 * difference.max()).nonzero().flatten().tolist()
    return None


def make_site(
    model: nn.Module, base: Trace, block: tuple[int, str], own: list[str], heads: dict[str, int], consumer: str
) -> Site:
    """Describe one site from its producers and its consumer.

    Raises:
        ValueError: Heads are coupled in a way that this version does not cut.
    """
    width = base.linears[consumer].in_features
    size = next(iter(heads.values()), 1)
    names = [n for n in base.calls if n in own or n in heads]
    if any(other != size for other in heads.values()):
        raise ValueError(f"{consumer}: its heads have sizes {heads}; grouped keys and values are not supported yet")
    if consumer in base.repeated:
        raise ValueError(
            f"{consumer} runs more than once in a pass; blocks that share weights are not supported yet: give a model "
            "whose blocks have their own, such as BERT"
        )
    core = module_path(names) if heads else None
    if heads:
        refuse_head_bias(model, width // size, core)
    output = base.outputs.get(core)
    return Site(
        name=f"{block[1]}.{'attention' if heads else 'ffn'}",
        kind="attention" if heads else "ffn",
        layer=block[0],
        total=width // size,
        width=size,
        producers=tuple(names),
        consumer=consumer,
        hidden=base.linears[consumer].out_features,
        biases=sum(base.linears[n].bias is not None for n in names),
        after=norm_behind(base, consumer),
        core=core,
        returns=len(output) if isinstance(output, tuple) else 0,
        attributes=head_attributes(model, core, width // size, size) if heads else (),
        table=sum(base.repeated.get(n, 0) for n in names),
    )


def module_path(names: list[str]) -> str:
    """The innermost module that holds all of `names`."""
    return os.path.commonpath([n.replace(".", "/") for n in names]).replace("/", ".")


def norm_behind(base: Trace, consumer: str) -> str | None:
    """The first norm that runs behind `consumer` on a tensor of its output's shape: it reads the residual stream."""
    for name in base.calls[base.calls.index(consumer) + 1 :]:
        if name not in base.linears and same_rows(base.outputs[name], base.outputs[consumer]):
            return name
    return None


def same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, or would if batch and seq were joined in both (OPT joins them)."""
    return a.shape[-1] == b.shape[-1] and a.numel() == b.numel()


def head_attributes(model: nn.Module, core: str, heads: int, size: int) -> tuple[tuple[str, str, int], ...]:
    """Integers of `core` that state the number of heads or their joint width, so that surgery can keep them true."""
    module = model.get_submodule(core)
    found = [(name, unit or size) for name, unit in HEAD_ATTRIBUTES.items()]
    return tuple((core, name, unit) for name, unit in found if getattr(module, name, None) == heads * unit)


def refuse_head_bias(model: nn.Module, heads: int, core: str) -> None:
    """Raise if the model has a learned bias for each head: it would have to lose its heads too."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == heads:
            raise ValueError(
                f"{core}: {name} holds a bias for each of its {heads} heads; that is not supported yet: give a model "
                "without one, such as BERT"
            )


def with_costs(model: nn.Module, sites: list[Site], trace: Trace, traced_len: int, seq_len: int | None) -> Sites:
    """Add what the rest of the model costs: linear layers that run at each token, and those that run once a sample."""
    cut = {name for site in sites for name in (*site.producers, site.consumer)}
    token, sample = 0, 0
    for name, linear in trace.linears.items():
        if name not in cut:
            rows = trace.inputs[name].numel() // max(linear.in_features, 1)
            each = linear.in_features * linear.out_features
            token, sample = (token + each, sample) if rows == traced_len else (token, sample + rows * each)
    params = sum(p.numel() for p in model.parameters()) - sum(s.unit_params * s.total for s in sites)
    return Sites(sites, token_macs=token, sample_macs=sample, other_params=params, seq_len=seq_len or traced_len)
