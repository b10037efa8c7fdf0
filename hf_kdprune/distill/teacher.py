"""The live teacher: checked against the student, frozen, and asked once a batch."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layers import inputs_of


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise unless the two speak of the same labels and tokens.

    Raises:
        ValueError: Labels or vocabulary differ.
    """
    ours, theirs = student.config, teacher.config
    if {int(k): v for k, v in ours.id2label.items()} != {int(k): v for k, v in theirs.id2label.items()}:
        raise ValueError(
            "teacher and student must have the same labels in the same order; got student "
            f"{short(ours.id2label)} and teacher {short(theirs.id2label)}: fine-tune the teacher on this data set, or set "
            "the same id2label in both configs if only the names differ"
        )
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"teacher and student must read the same tokens; got vocabularies of {theirs.vocab_size} and "
            f"{ours.vocab_size}: take a teacher with the student's tokenizer"
        )


def short(id2label: dict) -> str:
    """The first few labels and how many there are."""
    names = list(id2label.values())
    return f"{names[:4]}{'...' if len(names) > 4 else ''} ({len(names)})"


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` that never trains."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def ask(teacher: PreTrainedModel, inputs: dict[str, Tensor], features: bool) -> object:
    """The teacher's output for a batch: logits, and hidden states if `features`; labels are not looked at."""
    return teacher(**inputs_of(inputs), output_hidden_states=features)
