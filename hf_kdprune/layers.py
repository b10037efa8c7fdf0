"""Hidden states of teacher and student, and which student layer learns from which teacher layer.

Both losses read this file, so it stands above the rooms that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

Batch = dict[str, Tensor]
TOKENS_PER_COLUMN = 5  # that make a covariance or a least-squares fit (METHOD.md 3)
LABELS = ("labels", "label", "label_ids")
RULE = 'layer_map must be "auto", "last", "uniform" or a list of [student, teacher] pairs; 0 is the embeddings'


@dataclass(frozen=True)
class LayerMatch:
    """One student layer, the teacher layer it learns from, and what the teacher's features look like there.

    Attributes:
        student: Index into the student's hidden states; 0 is the embeddings.
        teacher: Index into the teacher's.
        covariance: (hidden, hidden) of the teacher's features over real positions, in the student's space.
        projection: (teacher hidden + 1, student hidden) from teacher features to the student's space, the last row a
            bias; None where the widths are equal.
    """

    student: int
    teacher: int
    covariance: Tensor
    projection: Tensor | None = None

    @property
    def variance(self) -> float:
        """Mean variance of a dimension."""
        return float(self.covariance.diagonal().mean())


def inputs_of(batch: Batch) -> Batch:
    """The batch less its labels."""
    return {k: v for k, v in batch.items() if k not in LABELS}


def hidden_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """Features of every layer, embeddings first: each (batch, seq, hidden). Labels are not looked at."""
    return model(**inputs_of(batch), output_hidden_states=True).hidden_states


def real_positions(batch: Batch) -> Tensor:
    """(batch, seq), True where a position is no padding."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    first = next(iter(inputs_of(batch).values()))
    return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)


def positions_of(batch: Batch, features: Tensor) -> Tensor:
    """(batch, seq), True where `features` (batch, seq, hidden), or with batch and seq joined, stand at no padding.

    They stand at the tokens of the batch, at those of its decoder, or, as in images, at nothing that is ever padded.
    """
    count = features.shape[:-1].numel()
    for name in ("attention_mask", "decoder_attention_mask"):
        if name in batch and batch[name].dim() == 2 and batch[name].numel() == count:
            return batch[name].bool()
    return torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device)


def layer_pairs(layer_map: str | list, students: int, teachers: int) -> list[tuple[int, int]]:
    """Pair student layers with teacher layers.

    Args:
        layer_map: "auto" and "uniform": each student block with the teacher block at the same relative depth (the same
            one where the depths are equal); "last": the last blocks; or pairs.
        students: Number of student blocks.
        teachers: Number of teacher blocks.

    Raises:
        ValueError: The map is none of these, or names a layer that is not there.
    """
    if layer_map in ("auto", "uniform"):
        return [(i, max(1, round(i * teachers / students))) for i in range(1, students + 1)]
    if layer_map == "last":
        return [(students, teachers)]
    if isinstance(layer_map, str) or not layer_map or any(len(pair) != 2 for pair in layer_map):
        raise ValueError(f"{RULE}; got {layer_map!r}")
    for student, teacher in layer_map:
        if not (0 <= student <= students and 0 <= teacher <= teachers):
            raise ValueError(f"{RULE}; got {[student, teacher]} with {students} student and {teachers} teacher blocks")
    return [(int(student), int(teacher)) for student, teacher in layer_map]


def enough(batches: Sequence[Batch], width: int) -> Sequence[Batch]:
    """Every so many of the batches, so that they hold about TOKENS_PER_COLUMN real tokens for each of `width`."""
    tokens = sum(int(real_positions(batch).sum()) for batch in batches)
    return batches[:: max(1, min(len(batches), tokens // (TOKENS_PER_COLUMN * width)))]


@torch.no_grad()
def match_layers(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[Batch],
    layer_map: str | list = "auto",
) -> list[LayerMatch]:
    """Pair the layers and measure the teacher's features, on as many of the batches as that needs.

    Where the widths differ, the teacher's features are brought into the student's space by the linear map that fits
    the student's present features best (ridge least squares): what a linear map cannot explain is not asked for.

    Raises:
        ValueError: The layer map does not fit, or a feature is NaN or infinite.
    """
    source = model if teacher is None else teacher
    depth = (model.config.num_hidden_layers, source.config.num_hidden_layers)
    pairs = layer_pairs(layer_map, *depth)
    other = source is not model and source.config.hidden_size != model.config.hidden_size
    modes = [(m, m.training) for m in {id(m): m for m in (model, source)}.values()]
    for m, _ in modes:
        m.eval()
    width = source.config.hidden_size
    try:
        moments = joint_moments(source, model if other else None, enough(batches, width), pairs)
    finally:
        for m, mode in modes:
            m.train(mode)
    return [LayerMatch(s, t, *describe(m, width, other)) for (s, t), m in zip(pairs, moments, strict=True)]


def joint_moments(
    source: PreTrainedModel, model: PreTrainedModel | None, batches: Sequence[Batch], pairs: list[tuple[int, int]]
) -> list[Tensor]:
    """Second moments of [teacher features, 1, student features if `model` is given] over real positions, by pair."""
    moments = [0.0] * len(pairs)
    for batch in batches:
        mask = real_positions(batch)
        taught = hidden_states(source, batch)
        learnt = hidden_states(model, batch) if model is not None else taught
        for i, (s, t) in enumerate(pairs):
            x = taught[t][mask].double()
            if not bool(x.isfinite().all()):
                raise ValueError(f"teacher features must be finite; layer {t} gave NaN or infinity: check the model")
            parts = [x, x.new_ones(len(x), 1)] + ([learnt[s][mask].double()] if model is not None else [])
            joint = torch.cat(parts, 1)
            moments[i] = moments[i] + (joint.T @ joint).cpu()
    return moments


def describe(moments: Tensor, width: int, project: bool) -> tuple[Tensor, Tensor | None]:
    """Covariance and projection from the joint second moments of [teacher, 1, student].

    Args:
        moments: (width + 1 [+ student hidden], the same).
        width: Hidden size of the teacher.
        project: Whether the student's features are in there.
    """
    count = moments[width, width]
    mean = moments[:width, width] / count
    covariance = moments[:width, :width] / count - torch.outer(mean, mean)
    if not project:
        return covariance.float(), None
    gram = moments[: width + 1, : width + 1]
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(width + 1, dtype=gram.dtype)
    projection = torch.linalg.solve(gram + ridge, moments[: width + 1, width + 1 :])
    return (projection[:-1].T @ covariance @ projection[:-1]).float(), projection.float()


@torch.no_grad()
def target_features(teacher: PreTrainedModel, batch: Batch, matches: Sequence[LayerMatch]) -> list[Tensor]:
    """The teacher's features of the mapped layers in the student's space: each (batch, seq, student hidden)."""
    return project_features(hidden_states(teacher, batch), matches)


def project_features(states: Sequence[Tensor], matches: Sequence[LayerMatch]) -> list[Tensor]:
    """Hidden states of the teacher, brought into the student's space where the widths differ."""
    out = []
    for match in matches:
        state = states[match.teacher]
        if match.projection is not None:
            projection = match.projection.to(state)
            state = state @ projection[:-1] + projection[-1]
        out.append(state)
    return out
