"""A Plan made physical: rows and columns are cut out of the linear layers, in place, and the result is checked.

The smaller model must equal the gated one, in which the removed units' gates are 0, or nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..inputs import made_up_inputs
from ..layers import inputs_of
from .cutting import EmptiedAttention, Undo, cut_site, read_number
from .discovery import find_sites
from .experts import READ
from .fingerprint import check_weights
from .sites import Plan, Site, Sites
from .stock import adopt, stock_config
from .trial import STEP, difference, first_output, gates_at_zero, in_float32

CONFIG_VERSION = 1
ROUNDING = 4  # times the effect of one rounding, that many roundings in another order may have


def apply_plan(model: PreTrainedModel, plan: Plan, batch: dict[str, Tensor] | None = None) -> None:
    """Remove what `plan` does not keep, in place; exact.

    Args:
        model: The model for which the plan was made.
        plan: Which units stay.
        batch: Inputs for the check that physical equals gated; default: random tokens.

    Raises:
        ValueError: The plan is of another model, or of other weights.
        RuntimeError: The smaller model differs from the gated one by more than 1e-5 of the output's scale and by more than
            rounding explains; the model is as it was.
    """
    sites = find_sites(model, batch)
    check_plan(sites, plan)
    check_weights(model, sites, plan)
    batch = made_up_inputs(model) if batch is None else inputs_of(batch)
    stock = stock_config(model, sites, {s.name: len(plan[s.name].kept) for s in sites})
    training = model.training
    model.eval()
    undo: Undo = []
    try:
        with in_float32(model, batch) as batch:
            try:
                cut_checked(model, plan, sites, batch, undo)
            except BaseException:
                for restore in reversed(undo):
                    restore()
                raise
    finally:
        model.train(training)
    if stock is None:
        describe(model, sites, plan)
    else:  # its own class builds it
        adopt(model.config, stock)
    model.kdprune_plan = plan


def cut_checked(model: PreTrainedModel, plan: Plan, sites: Sites, batch: dict[str, Tensor], undo: Undo) -> None:
    """Cut, and raise where the smaller model is not the gated one; what reverses it is appended to `undo`."""
    with gated(model, plan, sites):
        expected = first_output(model, batch)
    for site in sites:
        cut_site(model, site, plan[site.name].kept, undo)
    got = first_output(model, batch)
    apart, allowed = difference(expected, got)
    if not apart <= allowed and not apart <= ROUNDING * by_rounding(model, batch, sites, got):
        raise RuntimeError(
            f"surgery must be exact: the smaller model differs from the gated one by {apart:.2e}, allowed are "
            f"{allowed:.2e}. The model was left as it was; please report this model class"
        )


def by_rounding(model: PreTrainedModel, batch: dict[str, Tensor], sites: Sites, expected: Tensor) -> float:
    """How far the output of the smaller model moves when what its output projections read is rounded otherwise.

    A language model that is cut to pieces can amplify the last bit a thousand times: then no sum in another order is equal to
    1e-5.
    """
    draw = torch.Generator().manual_seed(0)

    def round_otherwise(module: nn.Module, args: tuple) -> tuple:
        noise = torch.randn(args[0].shape, generator=draw).to(args[0])
        return (args[0] * (1 + torch.finfo(args[0].dtype).eps * noise), *args[1:])

    with ExitStack() as stack:
        modules = dict(model.named_modules())
        for consumer in (c for site in sites for c in site.consumers if c in modules):
            stack.callback(modules[consumer].register_forward_pre_hook(round_otherwise).remove)
        return difference(expected, first_output(model, batch))[0]


def check_plan(sites: Sites, plan: Plan) -> None:
    """Raise unless `plan` names exactly these sites, with units that exist."""
    mine = {(s.name, s.kind, s.total) for s in sites}
    theirs = {(s.name, s.kind, s.total) for s in plan.sites}
    if mine != theirs:
        odd = sorted(mine ^ theirs)[0]
        raise ValueError(f"the plan is for another model: {odd} is on one side only; make a plan for this model")
    for site in plan.sites:
        if len(set(site.kept)) != len(site.kept) or not set(site.kept) <= set(range(site.total)):
            raise ValueError(f"{site.name}: kept must be distinct indices below {site.total}, got {site.kept[:20]}")
    for site in sites:
        count = len(plan[site.name].kept)
        if count < site.least:
            raise ValueError(
                f"{site.name}: must keep {site.least} or more, its block cannot do without; the plan keeps {count or 'none'}"
            )
        if site.consumers[0].endswith(f".{READ}") and count < site.total and count % STEP:
            raise ValueError(
                f"{site.name}: experts must keep a multiple of {STEP} neurons, since grouped products read rows of 16 bytes; "
                f"the plan keeps {count}: take round_to={STEP}"
            )


def changes(model: nn.Module, sites: Sites) -> tuple[set[str], set[str]]:
    """Names of the parameters in whose place surgery puts others, and of those that repair writes into."""
    consumers = tuple(f"{consumer}." for site in sites for consumer in site.consumers)
    written = {name for name, _ in model.named_parameters(remove_duplicate=False) if name.startswith(consumers)}
    return {cut.name for site in sites for cut in site.cuts}, written


@contextmanager
def gated(model: PreTrainedModel, plan: Plan, sites: Sites | None = None) -> Iterator[None]:
    """Within the context, the gates of the units that `plan` removes are 0; the weights are untouched."""
    sites = find_sites(model) if sites is None else sites
    check_plan(sites, plan)
    check_weights(model, sites, plan)
    with gates_at_zero(model, {site.name: plan[site.name].kept for site in sites}, sites):
        yield


def describe(model: PreTrainedModel, sites: Sites, plan: Plan) -> None:
    """Write into the config what rebuilds the shapes before weights load."""
    section = getattr(model.config, "kdprune", None) or {"version": CONFIG_VERSION, "sites": {}}
    described = dict(section["sites"])
    for site in sites:
        described[site.name] = entry(model, site, plan[site.name].kept, described.get(site.name, {}))
    model.config.kdprune = {"version": CONFIG_VERSION, "sites": described}


def entry(model: PreTrainedModel, site: Site, kept: list[int], earlier: dict) -> dict:
    """What config.json says of one site: the shapes and numbers that are left, those of an earlier pruning included."""
    modules = {merged(p): m for p, m in model.named_modules() if not isinstance(m, EmptiedAttention) and ".lora_" not in p}
    tensors = dict.fromkeys((*earlier.get("tensors", ()), *(merged(cut.name) for cut in site.cuts)))
    numbers = [(p, n) for p, known in earlier.get("attributes", {}).items() for n in known]
    numbers += [(merged(path), name) for path, name, _ in site.attributes]
    attributes: dict[str, dict[str, int]] = {}
    for path, name in numbers:
        if path in modules:
            attributes.setdefault(path, {})[name] = read_number(modules[path], name)
    found = {name: name.rpartition(".") for name in tensors}
    emptied = [part for part in site.parts if part.core and not kept]
    return {
        "kind": site.kind,
        "units": len(kept),
        "tensors": {n: list(getattr(modules[path], key).shape) for n, (path, _, key) in found.items() if path in modules},
        "attributes": attributes,
        "emptied": [
            {"core": merged(p.core), "consumer": merged(p.consumer), "inner": p.inner, "returns": p.returns, "cache": p.cache}
            for p in emptied
        ],
    }


def merged(path: str) -> str:
    """The path of a layer, or of a tensor of it, once adapters of PEFT are merged."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")
