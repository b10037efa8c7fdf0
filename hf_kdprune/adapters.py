"""Students with adapters (PEFT) in training checkpoints.

The model in a checkpoint is an ordinary one that anybody loads, with the adapters merged into its weights. Training cannot go
on from that: the sum does not tell what of it is base and what adapter. So the two lie beside it, apart.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from .distill.trained_only import PREFIXES

FILE = "kdprune_adapters.safetensors"


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT wraps the model."""
    return hasattr(model, "get_base_model")


def save(model: nn.Module, folder: Path) -> None:
    """Write base and adapters into a training checkpoint, where there are adapters."""
    if has_adapters(model):
        mine = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(PREFIXES)}
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in mine.items()}, folder / FILE)


def load(model: nn.Module, folder: str | Path) -> bool:
    """Read them from a training checkpoint; False, and nothing is done, where the model has no adapters.

    Raises:
        ValueError: The checkpoint is of a student without adapters, or with others.
    """
    if not has_adapters(model):
        return False
    file = Path(folder, FILE)
    found = load_file(file) if file.is_file() else {}
    mine = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith(PREFIXES)}
    if mine != {name: tensor.shape for name, tensor in found.items()}:
        odd = sorted(mine.items() ^ {(name, tensor.shape) for name, tensor in found.items()})
        said = "differs in" if found else "is not there, and has not"
        raise ValueError(
            f"a training resumes with the adapters that it had; {file} {said} {odd[0][0]} (of {len(odd)}): wrap the student "
            "by the same PEFT config"
        )
    model.load_state_dict(found, strict=False)  # what trains beside the student has a file of its own
    return True
