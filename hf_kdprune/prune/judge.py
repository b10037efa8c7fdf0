"""How much worse a smaller model is: what a budget of "loss=" bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layers import LayerMatch, at_real, evaluating, hidden_states, target_features


@dataclass(frozen=True)
class Judge:
    """Measures what was lost.

    Attributes:
        loss: Model -> its loss, less is better: the feature loss, or the share of a metric that was lost.
        before: The loss of the model as given.
        facts: What the plan says of it: {"metric": "accuracy", "before": 0.91}.
    """

    loss: Callable[[PreTrainedModel], float]
    before: float
    facts: dict = field(default_factory=dict)


@torch.no_grad()
def feature_error(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    matches: Sequence[LayerMatch],
) -> float:
    """Feature loss: mean over mapped layers and real positions of ||h_s - h_t||^2 / (d Var(h_t)).

    0 where the features are the teacher's, 1 where they are as good as its mean.

    Args:
        model: The student.
        teacher: The teacher.
        batches: Inputs.
        matches: Which layer learns from which, and the teacher's variance there.

    Source: DESIGN.md, the second loss with the plain metric.
    """
    total = positions = 0.0
    with evaluating(model, teacher):
        for batch in batches:
            learnt, taught = hidden_states(model, batch), target_features(teacher, batch, matches)
            for match, target in zip(matches, taught, strict=True):
                error = (at_real(learnt[match.student], batch) - at_real(target, batch)).double()
                total += float(error.square().mean(1).sum()) / match.variance
                positions += len(error)
    return total / positions


def feature_judge(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[dict[str, Tensor]],
    matches: Sequence[LayerMatch],
) -> Judge:
    """Judges by the feature loss on `batches`, which neither ranked nor repaired; teacher None: `model` as it is."""
    source = model if teacher is None else teacher
    return Judge(
        lambda smaller: feature_error(smaller, source, batches, matches), feature_error(model, source, batches, matches)
    )


def metric_judge(measured: Callable[[PreTrainedModel], float], name: str, before: float, greater: bool) -> Judge:
    """Judges by the share of a metric that was lost.

    Args:
        measured: Model -> the metric on data that neither ranked nor repaired.
        name: Of the metric.
        before: The metric of the model as given.
        greater: Whether more is better.

    Raises:
        ValueError: The metric is 0 as it is, of which nothing is a share.
    """
    if not abs(before) > 0:
        raise ValueError(
            f"a budget of loss=..% allows a share of the metric, and {name} of the model as given is {before}: choose another "
            'metric_for_best_model, or bound the feature loss: "loss=0.1"'
        )
    sign = 1 if greater else -1
    return Judge(lambda model: sign * (before - measured(model)) / abs(before), 0.0, {"metric": name, "before": before})
