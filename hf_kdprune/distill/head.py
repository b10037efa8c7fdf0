"""What a model's output is, and which of its rows count: the one place that masks padding, -100 and shifted labels.

A term of the first loss is a sum over items, divided by how many there are in all micro-batches of a step on all ranks, so
that accumulation and ranks change nothing. `counts_of` says how many a batch has, before any forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CTC_MAPPING_NAMES

from ..layers import IGNORED, masks_of, positions_of, real_positions

Batch = dict[str, Tensor]
ONE = "one"  # the unit of what is a sum already
KNOWN = "single-label, multi-label and regression heads, token classification, question answering, language models, CTC"


@dataclass(frozen=True)
class Head:
    """What a model's output is.

    Attributes:
        kind: "single_label", "multi_label" or "regression", logits (batch, classes); "tokens" or "next_token", logits
            (batch, seq, classes); "frames", the same of audio (CTC); "span", start_logits and end_logits (batch, seq);
            "none": nothing that a teacher's output could be compared with.
        summed: Whether the model's own loss is a sum over its batch already (CTC).
    """

    kind: str
    summed: bool = False

    @property
    def by_token(self) -> bool:
        """Whether there is a row of logits for each position."""
        return self.kind in ("tokens", "next_token", "frames")


def head_of(model: PreTrainedModel, output: object, labels: Tensor | None) -> Head:
    """Read from one output, the config, and the labels where there are any, what `model` has as a head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, config, logits = type(base).__name__, base.config, getattr(output, "logits", None)
    if getattr(output, "start_logits", None) is not None:
        return Head("span")
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        return Head("none")
    if logits.dim() == 2:
        floats = labels is not None and labels.is_floating_point()
        by_labels = "regression" if logits.shape[-1] == 1 else "multi_label" if floats else "single_label"
        stated = {"single_label_classification": "single_label", "multi_label_classification": "multi_label"}
        problem = getattr(config, "problem_type", None)
        return Head(stated.get(problem, problem) or by_labels)
    if name in MODEL_FOR_CTC_MAPPING_NAMES.values():
        return Head("frames", getattr(config, "ctc_loss_reduction", "mean") == "sum")
    shifts = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss and not config.is_encoder_decoder
    causal = shifts or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return Head("next_token" if causal else "tokens")


def check_head(head: Head, model: PreTrainedModel) -> None:
    """Raise unless a teacher's output can be compared with the student's.

    Raises:
        ValueError: It cannot.
    """
    if head.kind == "none":
        raise ValueError(
            f"logits_weight > 0 compares logits of {KNOWN}; {type(model).__name__} gives none of these: set logits_weight=0"
        )


def rows_of(head: Head, batch: Batch) -> Tensor:
    """Which rows of logits count: (batch,), or (batch, seq) where each position has one.

    Where there are labels, those rows whose label is not -100 (for the next token: whose next label is not); elsewhere those
    at real positions.
    """
    labels = batch.get("labels")
    if head.kind == "frames":
        masks = masks_of(batch)
        return masks["frames"] if "frames" in masks else batch_of_ones(batch)
    if head.by_token:
        if "shift_labels" in batch:
            return batch["shift_labels"] != IGNORED
        real = labels != IGNORED if labels is not None else masks_of(batch).get("decoder", real_positions(batch))
        return pad(real[:, 1:], (0, 1)) & real_positions(batch) if head.kind == "next_token" else real
    if head.kind == "single_label" and labels is not None and labels.dim() == 1:
        return labels != IGNORED
    return batch_of_ones(batch)


def batch_of_ones(batch: Batch) -> Tensor:
    """(batch,) True."""
    first = next(v for v in batch.values() if isinstance(v, Tensor))
    return torch.ones(len(first), dtype=torch.bool, device=first.device)


def spans_of(batch: Batch) -> list[Tensor | None]:
    """Start and end of each answer, (batch,), -100 where it lies outside of the text, as the model's own loss has it."""
    seq = real_positions(batch).shape[1]
    spans = (batch.get(name) for name in ("start_positions", "end_positions"))
    return [None if s is None else torch.where((s.flatten() >= 0) & (s.flatten() < seq), s.flatten(), IGNORED) for s in spans]


def counts_of(head: Head, batch: Batch) -> dict[str, int]:
    """How many items of each unit a batch has.

    Returns:
        "samples"; "task", items of the model's own loss; "rows" of logits; "main", "decoder" and "frames", real positions.
    """
    counts = {"samples": len(batch_of_ones(batch)), ONE: 1}
    counts |= {name: int(mask.sum()) for name, mask in masks_of(batch).items()}
    counts |= {"rows": int(rows_of(head, batch).sum()), "task": counts["samples"]}
    if head.kind in ("single_label", "tokens", "next_token") and (labels := batch.get("labels")) is not None:
        said = batch.get("shift_labels", labels[:, 1:] if head.kind == "next_token" else labels)
        counts["task"] = int((said != IGNORED).sum())
    if head.kind == "span":
        counts |= {f"span{i}": int((s != IGNORED).sum()) for i, s in enumerate(spans_of(batch)) if s is not None}
    return counts


def total_of(counts: list[dict[str, int]]) -> dict[str, int]:
    """The counts of several batches, or ranks, together."""
    return {name: sum(count.get(name, 0) for count in counts) for name in sorted(set().union(*counts))} | {ONE: 1}


def span_logits(output: object, batch: Batch) -> list[Tensor]:
    """Logits of start and end (batch, seq) in float32, padding ruled out, so that the length of the batch changes nothing."""
    real = positions_of(batch, output.start_logits[..., None])
    outside = torch.finfo(torch.float32).min / 8  # its exponent is 0 at any temperature, and differences are finite
    return [x.float().masked_fill(~real, outside) for x in (output.start_logits, output.end_logits)]


def span_loss(output: object, batch: Batch, counts: dict[str, int]) -> Tensor:
    """As transformers' ForQuestionAnsweringLoss among real positions, with the counts of the whole step."""
    pairs = zip(span_logits(output, batch), spans_of(batch), strict=True)
    sums = [cross_entropy(logits, span, ignore_index=IGNORED, reduction="sum") for logits, span in pairs]
    return sum(total / max(counts[f"span{i}"], 1) for i, total in enumerate(sums)) / 2
