"""Distil and physically prune a fine-tuned transformers model, and publish a checkpoint that loads."""

from .config import KDPruneConfig
from .measure import Measurement, measure
from .prune.allocation import Scores
from .prune.discovery import find_sites
from .prune.importance import score_units
from .prune.repair import repair
from .prune.sites import Plan, Site, Unit
from .prune.surgery import apply_plan, gated
from .publish.checkpoint import load_pretrained, save_pretrained
from .trainer import KDPruneTrainer

__version__ = "0.1.0"
__all__ = [
    "KDPruneConfig",
    "KDPruneTrainer",
    "Measurement",
    "Plan",
    "Scores",
    "Site",
    "Unit",
    "apply_plan",
    "find_sites",
    "gated",
    "load_pretrained",
    "measure",
    "repair",
    "save_pretrained",
    "score_units",
]
