"""The live teacher: checked against the student, frozen, and asked once a batch."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers import inputs_of


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel, remap: bool = False, tokenizer: object = None) -> None:
    """Raise unless the two speak of the same labels and tokens.

    Args:
        student: The model that learns.
        teacher: The model that teaches.
        remap: Whether labels of the same names may stand in another order.
        tokenizer: Of both; vocabularies may be padded to different sizes beyond it.

    Raises:
        ValueError: Labels or vocabulary differ.
    """
    ours, theirs = (labels_of(model) for model in (student, teacher))
    if ours != theirs and not (remap and sorted(ours.values()) == sorted(theirs.values())):
        same = sorted(ours.values()) == sorted(theirs.values())
        way = (
            "set remap_labels=True if they mean the same"
            if same
            else ("fine-tune the teacher on this data set, or set the same id2label in both configs if only the names differ")
        )
        raise ValueError(
            "teacher and student must have the same labels in the same order; got student "
            f"{short(ours)} and teacher {short(theirs)}: {way}"
        )
    sizes = [getattr(model.config.get_text_config(), "vocab_size", None) for model in (student, teacher)]
    words = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    if sizes[0] != sizes[1] and not (words and None not in sizes and words <= min(sizes)):
        raise ValueError(
            f"teacher and student must read the same tokens; got vocabularies of {sizes[1]} and {sizes[0]}"
            f"{f', and a tokenizer of {words}' if words else ''}: take a teacher with the student's tokenizer (which may be "
            "padded to another size, where processing_class is given)"
        )


def labels_of(model: PreTrainedModel) -> dict[int, str]:
    """id2label with integer keys."""
    return {int(k): str(v) for k, v in model.config.id2label.items()}


def with_labels_of(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    """The teacher, or where its labels stand in another order a twin with the same weights that gives them in the student's."""
    ours, theirs = (labels_of(model) for model in (student, teacher))
    if ours == theirs:
        return teacher
    index = {name: i for i, name in theirs.items()}
    order = torch.tensor([index[ours[i]] for i in sorted(ours)])

    def reorder(module: torch.nn.Module, args: tuple, output: object) -> object:
        output.logits = output.logits[..., order.to(output.logits.device)]
        return output

    twin = copy.copy(teacher)
    twin._forward_hooks = teacher._forward_hooks.copy()
    twin.config = copy.deepcopy(teacher.config)
    twin.config.id2label, twin.config.label2id = ours, {name: i for i, name in ours.items()}
    twin.register_forward_hook(reorder)
    return twin


def short(id2label: dict) -> str:
    """The first few labels and how many there are."""
    names = list(id2label.values())
    return f"{names[:4]}{'...' if len(names) > 4 else ''} ({len(names)})"


def placed(teacher: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The teacher in eval mode on `device`; one that is quantised, or spread over devices, stays where it is."""
    fixed = getattr(teacher, "is_quantized", False) or hasattr(teacher, "hf_device_map")
    return (teacher if fixed else teacher.to(device)).eval()


def frozen_copy(model: PreTrainedModel, replaced: Collection[str] = (), written: Collection[str] = ()) -> PreTrainedModel:
    """A copy of `model` that never trains, and has in common with it the memory of all that nobody will write to.

    Memory is shared by parameters that are frozen and stay as they are (embeddings, the base under adapters), by those in whose
    place surgery puts others, and by buffers that are no part of a checkpoint, which are constants. All else is copied: what
    trains, what repair refits, what an adapter can be merged into, and buffers that are saved, since batch norms write there.

    The copy has parameters of its own: what is made smaller, moved or cast in one model is not in the other (as FSDP, DDP and
    DeepSpeed do with the student, which they never write to where it is frozen). Who unfreezes a parameter later, or writes
    into one by hand, does so in both, unless `separate` was called in between, as KDPruneTrainer.train does before it trains.

    A student with adapters is not its own teacher with the adapters off: its base is cut, and with it go the units that the
    teacher has and the student has not. Only what surgery leaves can be in common.

    Args:
        model: The student as it is.
        replaced: Names of parameters that surgery is about to replace in `model`, not to write into.
        written: Names of parameters that are about to be written in place, though they are frozen.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    own = {id(p) for name, p in named if not (name in replaced or stays(name, p, written))}
    saved = {id(t) for t in model.state_dict(keep_vars=True).values()}
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for _, p in named if id(p) not in own}
    shared |= {id(b): b.detach() for b in model.buffers() if id(b) not in saved}
    return copy.deepcopy(model, shared).eval().requires_grad_(False)  # what stands in the memo is taken for the copy


def stays(name: str, parameter: nn.Parameter, written: Collection[str]) -> bool:
    """Whether nobody will write into a parameter, not even by merging the adapters of PEFT; `written` as above."""
    ordinary = type(parameter) is nn.Parameter  # one that is quantised is more than its storage
    return ordinary and not parameter.requires_grad and name not in written and ".base_layer." not in name


def separate(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Give the teacher memory of its own wherever the student trains in memory that they share.

    Args:
        teacher: As `frozen_copy` made it; another model shares nothing, and stays as it is.
        student: About to be trained.
    """
    trained = {p.data_ptr() for p in student.parameters() if p.requires_grad and p.numel()}
    for parameter in teacher.parameters():
        if parameter.data_ptr() in trained:
            parameter.data = parameter.data.clone()


@torch.no_grad()
def ask(teacher: PreTrainedModel, inputs: dict[str, Tensor], features: bool) -> object:
    """The teacher's output for a batch: logits, and hidden states if `features`; labels are not looked at."""
    return teacher(**inputs_of(inputs), output_hidden_states=features)
