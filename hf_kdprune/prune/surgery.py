"""A Plan made physical: rows and columns are cut out of the linear layers, in place, and the result is checked.

The smaller model must equal the gated one, in which the removed units' gates are 0, or nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers import inputs_of
from .discovery import find_sites, tiny_batch
from .sites import Plan, Site, SitePlan, Sites

TOLERANCE = 1e-5
CONFIG_VERSION = 1


class EmptiedAttention(nn.Module):
    """Stands where an attention without heads stood: nothing is computed, the output projection adds its bias.

    The file that travels with a checkpoint (publish/modeling_kdprune.py) imports nothing of this package, so it has its
    own copy of this class.
    """

    def __init__(self, returns: int, name: str | None = None, consumer: nn.Module | None = None):
        """Take the length of the tuple to return (0: a tensor) and the output projection, if it lies in here."""
        super().__init__()
        self.returns, self.name = returns, name
        if name:
            self.add_module(name, consumer)

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple:
        """(batch, seq, hidden) -> (batch, seq, 0), or what the output projection makes of it."""
        output = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        if self.name:
            output = self.get_submodule(self.name)(output)
        return (output, *[None] * (self.returns - 1)) if self.returns else output


def apply_plan(model: PreTrainedModel, plan: Plan, batch: dict[str, Tensor] | None = None) -> None:
    """Remove what `plan` does not keep, in place; exact.

    Args:
        model: The model for which the plan was made.
        plan: Which units stay.
        batch: Inputs for the check that physical equals gated; default: random tokens.

    Raises:
        ValueError: The plan is of another model.
        RuntimeError: The smaller model differs from the gated one by more than 1e-5; the model is as it was.
    """
    sites = find_sites(model, batch)
    check_plan(sites, plan)
    batch = tiny_batch(model) if batch is None else inputs_of(batch)
    training = model.training
    model.eval()
    undo: list[Callable[[], None]] = []
    try:
        with gated(model, plan, sites):
            expected = first_output(model, batch)
        for site in sites:
            cut_site(model, site, plan[site.name], undo)
        check_equal(expected, first_output(model, batch))
    except BaseException:
        for restore in reversed(undo):
            restore()
        raise
    finally:
        model.train(training)
    describe(model, sites, plan)


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


@contextmanager
def gated(model: PreTrainedModel, plan: Plan, sites: Sites | None = None) -> Iterator[None]:
    """Within the context, the gates of the units that `plan` removes are 0; the weights are untouched."""
    sites = find_sites(model) if sites is None else sites
    check_plan(sites, plan)

    def gate(site: Site) -> Callable:
        mask = torch.zeros(site.total)
        mask[sorted(plan[site.name].kept)] = 1
        mask = mask.repeat_interleave(site.width)
        return lambda module, args: (args[0] * mask.to(args[0]), *args[1:])

    with ExitStack() as stack:
        for site in sites:
            hook = model.get_submodule(site.consumer).register_forward_pre_hook(gate(site))
            stack.callback(hook.remove)
        yield


@torch.no_grad()
def first_output(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The logits, or whatever the model gives first."""
    return model(**batch)[0].float()


def check_equal(expected: Tensor, got: Tensor) -> None:
    """Raise unless the two agree to 1e-5 of their scale (at least 1; fp32)."""
    difference = float((expected - got).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise RuntimeError(
            f"surgery must be exact: the smaller model differs from the gated one by {difference:.2e}, allowed are "
            f"{allowed:.2e}. The model was left as it was; please report this model class"
        )


def cut_site(model: nn.Module, site: Site, plan: SitePlan, undo: list[Callable[[], None]]) -> None:
    """Cut one site; what reverses it is appended to `undo`."""
    kept = torch.tensor(sorted(plan.kept), dtype=torch.long)
    channels = (kept[:, None] * site.width + torch.arange(site.width)).flatten()
    for path in site.producers:
        cut_linear(model.get_submodule(path), channels, 0, undo)
    cut_linear(model.get_submodule(site.consumer), channels, 1, undo)
    for path, name, unit in site.attributes:
        module = model.get_submodule(path)
        undo.append(lambda module=module, name=name, old=getattr(module, name): setattr(module, name, old))
        setattr(module, name, unit * len(kept))
    if site.core and not len(kept):
        old = model.get_submodule(site.core)
        inner = consumer_inside(site)
        model.set_submodule(
            site.core, EmptiedAttention(site.returns, inner, model.get_submodule(site.consumer) if inner else None)
        )
        undo.append(lambda: model.set_submodule(site.core, old))


def consumer_inside(site: Site) -> str | None:
    """The name of the output projection within the attention module, or None if it lies outside."""
    inside = site.core is not None and site.consumer.startswith(site.core + ".")
    return site.consumer[len(site.core) + 1 :] if inside else None


def cut_linear(linear: nn.Linear, channels: Tensor, dim: int, undo: list[Callable[[], None]]) -> None:
    """Keep the given rows (dim 0) or columns (dim 1) of a linear layer, in place."""
    names = ("weight", "bias") if dim == 0 and linear.bias is not None else ("weight",)
    for name in names:
        old = getattr(linear, name)
        undo.append(lambda name=name, old=old: setattr(linear, name, old))
        new = old.detach().index_select(dim, channels.to(old.device)).clone()
        setattr(linear, name, nn.Parameter(new, requires_grad=old.requires_grad))
    size = "out_features" if dim == 0 else "in_features"
    undo.append(lambda old=getattr(linear, size): setattr(linear, size, old))
    setattr(linear, size, len(channels))


def describe(model: PreTrainedModel, sites: Sites, plan: Plan) -> None:
    """Write into the config what rebuilds the shapes before weights load, and keep the plan with the model."""
    section = getattr(model.config, "kdprune", None) or {"version": CONFIG_VERSION, "sites": {}}
    described = dict(section["sites"])
    for site in sites:
        kept = len(plan[site.name].kept)
        linears = {path: [kept * site.width, site.hidden] for path in site.producers}
        linears[site.consumer] = [site.hidden, kept * site.width]
        entry = {"kind": site.kind, "units": kept, "linears": linears, "attributes": {}}
        for path, name, unit in site.attributes:
            entry["attributes"].setdefault(path, {})[name] = unit * kept
        if site.core and not kept:
            entry["emptied"] = {"core": site.core, "returns": site.returns, "consumer": consumer_inside(site)}
        described[site.name] = entry
    model.config.kdprune = {"version": CONFIG_VERSION, "sites": described}
    model.kdprune_plan = plan
