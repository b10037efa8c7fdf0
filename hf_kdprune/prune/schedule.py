"""When to prune: at once, before training. (In stages, with training between them: a later version.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from ..layers import LayerMatch
from .importance import score_units
from .repair import SiteRepair, repair
from .sites import Plan
from .surgery import apply_plan

SCHEDULES = ("one_shot",)


@dataclass(frozen=True)
class Pruning:
    """What to do, as the user set it.

    Attributes:
        budget: "macs=0.5" and so on.
        importance: The score.
        repair: Whether to refit.
        round_to: FFN widths become multiples of it.
        shapes: "free", "uniform" or "stock".
        seed: Of the probe.
    """

    budget: str
    importance: str = "feature_loss"
    repair: bool = True
    round_to: int = 8
    shapes: str = "free"
    seed: int = 0


def one_shot(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[dict[str, Tensor]],
    matches: list[LayerMatch],
    pruning: Pruning,
) -> Plan:
    """Rank every unit once and plan for the whole budget; nothing is changed.

    Args:
        model: The student.
        teacher: Another model as teacher; None: the student itself.
        batches: Calibration inputs.
        matches: Which student layer learns from which teacher layer.
        pruning: The settings.
    """
    scores = score_units(model, teacher, batches, pruning.importance, matches=matches, seed=pruning.seed)
    return scores.plan(pruning.budget, pruning.round_to, pruning.shapes)


def realise(
    model: PreTrainedModel,
    original: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    plan: Plan,
    pruning: Pruning,
) -> list[SiteRepair]:
    """Surgery and repair: `model` is smaller afterwards.

    Args:
        model: The student.
        original: A copy of the student as it is now, towards which repair refits.
        batches: Calibration inputs.
        plan: What stays.
        pruning: The settings.
    """
    apply_plan(model, plan, batches[0])
    return repair(model, original, batches) if pruning.repair else []
