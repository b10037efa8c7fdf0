"""The first loss: named terms and their weights, summed.

L1 = task_weight * task + logits_weight * T^2 KL + features_weight * features + auxiliary_weight * auxiliary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layers import LayerMatch, project_features
from .features import FEATURE_LOSSES
from .logits import LOGITS_LOSSES, divergence

TERMS = ("task", "logits", "features", "auxiliary")


@dataclass(frozen=True)
class Objective:
    """How the terms of the first loss are made and weighed.

    Attributes:
        weights: Term -> weight; a term of weight 0 is not computed.
        temperature: T of the logits term.
        logits_loss: A name of `LOGITS_LOSSES`.
        feature_loss: A name of `FEATURE_LOSSES`.
    """

    weights: dict[str, float]
    temperature: float = 2.0
    logits_loss: str = "forward_kl"
    feature_loss: str = "mse"

    def __post_init__(self) -> None:
        """Raise ValueError where the settings make no loss."""
        for name, value, known in (
            ("logits_loss", self.logits_loss, LOGITS_LOSSES),
            ("feature_loss", self.feature_loss, FEATURE_LOSSES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {sorted(known)}, got {value!r}")
        if any(not w >= 0 for w in self.weights.values()) or not any(self.weights.values()):
            raise ValueError(f"the weights of the first loss must be >= 0 and not all 0, got {self.weights}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")

    def uses(self, term: str) -> bool:
        """Whether the term has a weight."""
        return self.weights.get(term, 0) > 0

    def judge(self) -> Objective:
        """This loss as a judge of the finished model: less the auxiliary classifiers, which are dropped on save."""
        weights = {**self.weights, "auxiliary": 0.0}
        return replace(self, weights=weights if any(weights.values()) else {"task": 1.0})

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher pass is needed at all."""
        return self.uses("logits") or self.uses("features")

    def taught_terms(self, learnt: object, taught: object, matches: Sequence[LayerMatch], mask: Tensor) -> dict[str, Tensor]:
        """The terms that the teacher's output and features make.

        Args:
            learnt: The student's output: logits (batch, classes), hidden_states each (batch, seq, hidden).
            taught: The teacher's.
            matches: The mapped layers.
            mask: (batch, seq), True at real positions.
        """
        terms = {}
        if self.uses("logits"):
            rows = torch.ones(learnt.logits.shape[:-1], dtype=torch.bool, device=learnt.logits.device)
            total = divergence(learnt.logits, taught.logits, rows, self.temperature, self.logits_loss)
            terms["logits"] = total / rows.sum()
        if self.uses("features"):
            loss = FEATURE_LOSSES[self.feature_loss]
            targets = project_features(taught.hidden_states, matches)
            layers = [
                loss(learnt.hidden_states[m.student][mask].float(), target[mask].float(), m.variance)
                for m, target in zip(matches, targets, strict=True)
            ]
            terms["features"] = torch.stack(layers).mean()
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms that were computed."""
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
