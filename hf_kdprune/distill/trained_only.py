"""What trains with the student and is never part of it: auxiliary classifiers, and maps between widths.

Both are submodules of the student while it trains, and run within its forward pass, so that the optimizer and DDP see them.
Checkpoints of the training hold them in a file of their own, so that resuming is exact; models do not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import make_dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..inputs import completed
from ..layers import evaluating, inputs_of, stacks_of, states_of
from . import auxiliary, projection
from .features import FEATURE_LOSSES
from .first_loss import FirstLoss, blocks
from .objective import Objective

PREFIXES = (f"{auxiliary.NAME}.", f"{projection.NAME}.")
FILE = "kdprune_trained_only.safetensors"


@torch.no_grad()
def attach(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[dict], lesson: FirstLoss, objective: Objective
) -> None:
    """Give the student what the terms of `objective` need.

    Args:
        model: The student.
        teacher: Whose widths the maps lead to.
        batches: Calibration inputs, on which the maps are fitted.
        lesson: Its head and mapped layers.
        objective: The first loss.
    """
    if objective.uses("auxiliary"):
        with evaluating(model):
            states, _ = blocks(model(**inputs_of(batches[0]), output_hidden_states=True), batches[0])
        auxiliary.attach(model, [state.shape[-1] for state in states], model.config.num_labels)
    maps = None
    if objective.uses("features") and FEATURE_LOSSES[objective.feature_loss].projected:
        maps = projection.fit(model, teacher, batches, lesson.matches)
        projection.attach(model, maps)
    if objective.uses("auxiliary") or maps is not None:
        # torch_compile is for the student; this, which looks at types and shapes, it would only trip over
        eager = torch.compiler.disable(lambda *passed: run(lesson, *passed))
        hook = model.register_forward_hook(eager, with_kwargs=True)
        model.kdprune_trained_only = hook


def run(lesson: FirstLoss, model: PreTrainedModel, args: tuple, batch: dict, output: ModelOutput) -> ModelOutput:
    """Add to the output of a training pass what the classifiers and the maps make of its hidden states."""
    if not model.training or not stacks_of(output):
        return output
    batch, made = completed(model, batch), {}
    if (classifiers := getattr(model, auxiliary.NAME, None)) is not None:
        made[auxiliary.NAME] = classifiers(*blocks(output, batch), lesson.head.by_token)
    if (maps := getattr(model, projection.NAME, None)) is not None:
        states = states_of(output)
        made[projection.NAME] = {i: maps(i, states[lesson.matches[i].student]) for i in maps.variances}
    return with_fields(type(output))(**output, **made)


@functools.cache
def with_fields(kind: type[ModelOutput]) -> type[ModelOutput]:
    """The same kind of output with room for these; DDP makes outputs anew, and drops none of their fields."""
    return make_dataclass(kind.__name__, [(name, object, None) for name in (auxiliary.NAME, projection.NAME)], bases=(kind,))


def detach(model: nn.Module) -> None:
    """Take all of it away from the student."""
    auxiliary.detach(model)
    projection.detach(model)
    if (hook := vars(model).pop("kdprune_trained_only", None)) is not None:
        hook.remove()


def save(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write what of the student's weights it is into a training checkpoint, where there is any."""
    mine = {name: tensor.contiguous() for name, tensor in state.items() if name.startswith(PREFIXES)}
    if mine:
        save_file(mine, folder / FILE)


def load(model: nn.Module, folder: Path) -> None:
    """Read it from a training checkpoint.

    Raises:
        ValueError: The student has what the checkpoint lacks, or the other way round.
    """
    file = Path(folder) / FILE
    wanted = sorted(name for name in model.state_dict() if name.startswith(PREFIXES))
    found = load_file(file) if file.is_file() else {}
    if sorted(found) != wanted:
        raise ValueError(
            f"a training resumes with the auxiliary classifiers and maps between widths that it had; {file} holds "
            f"{sorted(found) or 'none'}, and now there are {wanted or 'none'}: resume with the same auxiliary_weight, "
            "features_weight, layer_map and teacher"
        )
    model.load_state_dict(found, strict=False)
