"""Published ways to prune a transformer without training, written anew from their papers: what our ranking is compared with.

    from peers import PEERS                               # with scripts/benchmarks on sys.path
    at = PEERS["kwon"](model, batches, seed=0)            # scores once; `model` stays as it is
    smaller = at("macs=0.5")                              # a new model within the budget, with the peer's own compensation

`batches` are calibration inputs, padded on the right, with "labels" for classifiers.
"""

from __future__ import annotations

from collections.abc import Callable

from .flap import flap
from .kprune import kprune
from .kwon import kwon
from .minitron import minitron
from .torchpruning import torch_pruning

PEERS: dict[str, Callable] = {
    "kwon": kwon,
    "kprune": kprune,
    "flap": flap,
    "minitron": minitron,
    "torch_pruning": torch_pruning,
}
