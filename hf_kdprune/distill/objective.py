"""The first loss: named terms and their weights, summed.

L1 = task_weight * task + logits_weight * T^2 KL + features_weight * features + auxiliary_weight * auxiliary

Each term is a sum over items over their number in the whole step: all micro-batches, all ranks (`head.counts_of`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from ..layers import LayerMatch, masked_by, positions_of, project_features, stacks_of
from .features import FEATURE_LOSSES
from .head import IGNORED, Head, batch_of_ones, rows_of, span_logits, spans_of
from .logits import LOGITS_LOSSES, binary_divergence, divergence, squared_difference

TERMS = ("task", "logits", "features", "auxiliary")
Batch = dict[str, Tensor]
Counts = Mapping[str, int]


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

    @property
    def needs_features(self) -> bool:
        """Whether the student's hidden states are needed."""
        return self.uses("features") or self.uses("auxiliary")

    def logits_term(self, head: Head, learnt: object, taught: object, batch: Batch, counts: Counts) -> Tensor:
        """What the teacher's output teaches.

        Args:
            head: What both have as a head.
            learnt: The student's output: logits (batch[, seq], classes), or start_logits and end_logits (batch, seq).
            taught: The teacher's; its logits may be a `TopK`.
            batch: The inputs, with the labels that say which rows count.
            counts: Items of the whole step, by unit.

        Raises:
            ValueError: The logits stand at other positions than the labels.
        """
        if head.kind == "span":
            return self.span_term(learnt, taught, batch, counts)
        student, teacher, rows = learnt.logits, taught.logits, rows_of(head, batch)
        if isinstance(teacher, Tensor) and teacher.shape[-1] != student.shape[-1]:  # a vocabulary padded to another size
            student, teacher = (x[..., : min(student.shape[-1], teacher.shape[-1])] for x in (student, teacher))
        if rows.shape != student.shape[:-1]:
            raise ValueError(
                f"the logits term compares rows where the labels, or the inputs, stand: {list(rows.shape)}; the logits are "
                f"{list(student.shape)}: set logits_weight=0 for this model"
            )
        if head.kind == "regression":
            return squared_difference(student, teacher, rows) / max(counts["rows"], 1)
        loss = binary_divergence if head.kind == "multi_label" else divergence
        return loss(student, teacher, rows, self.temperature, self.logits_loss) / max(counts["rows"], 1)

    def span_term(self, learnt: object, taught: object, batch: Batch, counts: Counts) -> Tensor:
        """The mean of start and end of an answer, each a choice among the real positions of its text."""
        parts = []
        pairs = zip(span_logits(learnt, batch), span_logits(taught, batch), spans_of(batch), strict=True)
        for i, (student, teacher, span) in enumerate(pairs):
            rows = batch_of_ones(batch) if span is None else span != IGNORED
            total = divergence(student, teacher, rows, self.temperature, self.logits_loss)
            parts.append(total / max(counts["samples"] if span is None else counts[f"span{i}"], 1))
        return (parts[0] + parts[1]) / 2

    def features_term(
        self,
        learnt: object,
        taught: object,
        matches: Sequence[LayerMatch],
        batch: Batch,
        counts: Counts,
        mapped: Mapping[int, tuple[Tensor, float]] = MappingProxyType({}),
    ) -> Tensor:
        """What the teacher's features teach: the mean over the mapped layers.

        Args:
            learnt: The student's output, with hidden states, each (batch, seq, hidden).
            taught: The teacher's.
            matches: The mapped layers.
            batch: The inputs.
            counts: Items of the whole step, by unit.
            mapped: Where widths differ and maps are learned: the student's features in the teacher's space and the teacher's
                variance, by number of the mapped layer. Elsewhere the teacher's are brought to the student's space.
        """
        row = FEATURE_LOSSES[self.feature_loss]
        states = [(stack, state) for stack, found in stacks_of(learnt).items() for state in found]
        theirs = [state for found in stacks_of(taught).values() for state in found]
        targets = project_features(theirs, matches) if row.projected else [theirs[m.teacher] for m in matches]
        layers = []
        for i, (match, target) in enumerate(zip(matches, targets, strict=True)):
            (stack, state), variance = states[match.student], match.variance
            items = items_of(row.item, state, stack, batch, counts)
            mask = positions_of(batch, state, stack)
            if i in mapped:
                (state, variance), target = mapped[i], theirs[match.teacher]
            layers.append(row.loss(state, target, mask, variance) / items)
        return torch.stack(layers).mean()

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms that were computed."""
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()


def items_of(item: str, state: Tensor, stack: str, batch: Batch, counts: Counts) -> int:
    """How many "positions" or "samples" the features of a layer have in the whole step."""
    if item == "positions" and (name := masked_by(batch, state, stack)):
        return max(counts[name], 1)
    first = next(value for value in batch.values() if isinstance(value, Tensor))
    whole = state.shape[:-1].numel() if item == "positions" else len(state)  # never padded: alike in all micro-batches
    return max(counts["samples"] * whole // len(first), 1)
