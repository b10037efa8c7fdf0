"""Tells whether a plan was made for these very weights."""

from __future__ import annotations

import hashlib

from torch import nn

from .experts import READ
from .refit import plain
from .sites import Plan, Sites

SAMPLE = 4096  # numbers of each output projection


def fingerprint(model: nn.Module, sites: Sites) -> str:
    """SHA-256 over a strided sample of each output projection's weight, as float32 in the model's order.

    Output projections are what repair and training change, and what surgery makes narrower. Stacks of routed experts have
    none of their own and are left out.
    """
    digest = hashlib.sha256()
    for path in dict.fromkeys(c for site in sites for c in site.consumers if not c.endswith(f".{READ}")):
        weight = plain(model.get_submodule(path)).weight.detach().flatten()
        sample = weight[:: max(1, -(-weight.numel() // SAMPLE))]
        digest.update(sample.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_weights(model: nn.Module, sites: Sites, plan: Plan) -> None:
    """Raise if `plan` says for which weights it was made, and these are others.

    Raises:
        ValueError: They differ.
    """
    if plan.weights and plan.weights != (mine := fingerprint(model, sites)):
        raise ValueError(
            f"the plan was made for other weights ({plan.weights[:12]}...) than the model has now ({mine[:12]}...), for which "
            "its ranking says nothing: rank again, or load the weights that were ranked (to apply it all the same, set "
            'plan.weights = "")'
        )
