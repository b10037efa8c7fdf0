"""A Plan made physical: rows and columns are cut out of the linear layers, in place, and the result is checked.

The smaller model must equal the gated one, in which the removed units' gates are 0, or nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from ..inputs import made_up_inputs
from ..layers import inputs_of
from .cutting import EmptiedAttention, Undo, cut_site, read_number
from .discovery import find_sites
from .sites import Plan, Sites
from .trial import difference, first_output, gates_at_zero

CONFIG_VERSION = 1


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
    batch = made_up_inputs(model) if batch is None else inputs_of(batch)
    training = model.training
    model.eval()
    undo: Undo = []
    try:
        with gated(model, plan, sites):
            expected = first_output(model, batch)
        for site in sites:
            cut_site(model, site, plan[site.name].kept, undo)
        apart, allowed = difference(expected, first_output(model, batch))
        if not apart <= allowed:
            raise RuntimeError(
                f"surgery must be exact: the smaller model differs from the gated one by {apart:.2e}, allowed are "
                f"{allowed:.2e}. The model was left as it was; please report this model class"
            )
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
    for site in sites:
        if len(plan[site.name].kept) < site.least:
            raise ValueError(f"{site.name}: must keep {site.least} unit, its block cannot do without; the plan keeps none")


@contextmanager
def gated(model: PreTrainedModel, plan: Plan, sites: Sites | None = None) -> Iterator[None]:
    """Within the context, the gates of the units that `plan` removes are 0; the weights are untouched."""
    sites = find_sites(model) if sites is None else sites
    check_plan(sites, plan)
    with gates_at_zero(model, {site.name: plan[site.name].kept for site in sites}, sites):
        yield


def describe(model: PreTrainedModel, sites: Sites, plan: Plan) -> None:
    """Write into the config what rebuilds the shapes before weights load, and keep the plan with the model."""
    section = getattr(model.config, "kdprune", None) or {"version": CONFIG_VERSION, "sites": {}}
    described = dict(section["sites"])
    for site in sites:
        kept = len(plan[site.name].kept)
        emptied = [vars(part) | {"inner": part.inner} for part in site.parts if part.core and not kept]
        entry = {"kind": site.kind, "units": kept, "tensors": {}, "attributes": {}, "emptied": emptied}
        for cut in site.cuts:
            module = dict(model.named_modules()).get(cut.path)
            if module is not None:  # it went with an emptied attention
                entry["tensors"][cut.name] = list(getattr(module, cut.tensor).shape)
        for path, name, _ in site.attributes:
            if path in dict(model.named_modules()) and not isinstance(model.get_submodule(path), EmptiedAttention):
                entry["attributes"].setdefault(path, {})[name] = read_number(model.get_submodule(path), name)
        described[site.name] = entry
    model.config.kdprune = {"version": CONFIG_VERSION, "sites": described}
    model.kdprune_plan = plan
