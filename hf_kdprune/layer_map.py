"""Which student layer learns from which teacher layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RULE = 'layer_map must be "auto", "last", "uniform" or a list of [student, teacher] pairs; 0 is the embeddings'


def layer_pairs(layer_map: str | list, students: int, teachers: int, similar: Tensor | None = None) -> list[tuple[int, int]]:
    """Pair student layers with teacher layers.

    Args:
        layer_map: "uniform": each student block with the teacher block at the same relative depth (the same one where the
            depths are equal); "auto": the same where the depths are equal, else those that are most alike; "last": the
            last blocks; or pairs.
        students: Number of student blocks.
        teachers: Number of teacher blocks.
        similar: (students, teachers) how alike they are, which "auto" needs where the depths differ.

    Raises:
        ValueError: The map is none of these, or names a layer that is not there.
    """
    if layer_map == "auto" and similar is not None and students != teachers:
        return [(i, t + 1) for i, t in enumerate(most_alike(similar), 1)]
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


def most_alike(similar: Tensor) -> list[int]:
    """The teacher block of each student block, never going back, the last with the last, of the largest sum.

    Args:
        similar: (students, teachers).
    """
    best, came = similar[0].double(), []
    for row in similar[1:].double():
        so_far, at = best.cummax(0)
        best, came = row + so_far, [*came, at]
    chosen = [similar.shape[1] - 1]
    for at in reversed(came):
        chosen.insert(0, int(at[chosen[0]]))
    return chosen


def similarity(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Linear CKA of each student layer with each teacher layer, (students, teachers), 1 where they span the same.

    Args:
        students: Features of each block, (positions, hidden).
        teachers: The same positions, of any width.

    Source: Kornblith et al. 2019, Similarity of Neural Network Representations Revisited.
    """
    ours, theirs = ([(x - x.mean(0)).double() for x in features] for features in (students, teachers))
    sizes = [[(x.T @ x).norm() for x in features] for features in (ours, theirs)]
    rows = [
        [(x.T @ y).square().sum() / (a * b) for y, b in zip(theirs, sizes[1], strict=True)]
        for x, a in zip(ours, sizes[0], strict=True)
    ]
    return torch.tensor(rows).nan_to_num()  # a layer that does not vary is like none
