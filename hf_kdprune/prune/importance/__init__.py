"""Scores of units, a file each; `score_units` looks them up in one literal table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ...inputs import completed
from ...layers import real_positions
from ..allocation import Scores
from ..discovery import find_sites
from ..fingerprint import fingerprint
from ..stock import stock_kinds
from .ablation import ablation
from .asked import Asked
from .baselines import activation, magnitude, random
from .feature_loss import covariance, plain
from .labels import fisher, taylor
from .logits import with_logits

IMPORTANCE: dict[str, Callable] = {
    "feature_loss": covariance,
    "feature_loss:plain": plain,
    "feature_loss+logits": with_logits,
    "taylor": taylor,
    "fisher": fisher,
    "ablation": ablation,
    "activation": activation,
    "magnitude": magnitude,
    "random": random,
}


def check_importance(importance: str) -> None:
    """Raise unless `importance` names a score of this version."""
    if importance not in IMPORTANCE:
        raise ValueError(f"importance must be one of {sorted(IMPORTANCE)}, got {importance!r}")


def score_units(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[dict[str, Tensor]],
    importance: str = "feature_loss",
    **asked: object,
) -> Scores:
    """Score every unit by what the second loss would rise if it went.

    Args:
        model: The student; it is read, not changed.
        teacher: The teacher; None: the student itself.
        batches: Calibration inputs, dictionaries of tensors (batch, seq); only "taylor" and "fisher" look at labels in them.
        importance: A name of `IMPORTANCE`.
        **asked: Fields of `Asked`: matches, which student layer learns from which teacher layer (default: by depth); seed, of
            the random probe (0); ranks, the processes that share the batches (this one runs all).

    Raises:
        ValueError: Unknown importance, no calibration data, no prunable site, or features that are not finite.
    """
    check_importance(importance)
    if not batches:
        raise ValueError("batches must hold at least one batch of calibration inputs, got none")
    if not any(bool(real_positions(batch).any()) for batch in batches):
        raise ValueError(
            f"calibration inputs must have positions that are no padding; all of the {len(batches)} batches are padded "
            "throughout: look at their attention_mask"
        )
    batches = [completed(model, batch) for batch in batches]
    sites = find_sites(model, batches[0], mean_length(batches))
    other = None if teacher is model else teacher
    values, errors = IMPORTANCE[importance](model, other, batches, Asked(sites, **asked))
    return Scores(sites, values, errors, importance, stock_kinds(model, sites), fingerprint(model, sites))


def mean_length(batches: Sequence[dict[str, Tensor]]) -> int | None:
    """Mean number of real tokens of a sample, rounded: the length at which MACs are counted; None where there are none."""
    if "input_ids" not in batches[0]:
        return None
    masks = [real_positions(batch) for batch in batches]
    return max(1, round(sum(int(m.sum()) for m in masks) / sum(len(m) for m in masks)))
