"""Deep supervision: a linear classifier on each block's features, trained with the task loss and dropped on save.

Source: Lee et al. 2015, Deeply-Supervised Nets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from .head import IGNORED, Head

NAME = "kdprune_auxiliary"  # the submodule of the student that holds them while it trains
POOLED = ("single_label", "multi_label", "regression")


class AuxiliaryClassifiers(nn.Module):
    """One classifier a block, on its features at each position, or on their mean over real positions."""

    def __init__(self, widths: Sequence[int], labels: int):
        """Take the width of each block's features and the number of labels."""
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, labels) for width in widths)

    def forward(self, states: Sequence[Tensor], masks: Sequence[Tensor], by_token: bool) -> list[Tensor]:
        """Logits of each block.

        Args:
            states: Features (batch, seq, width) of each block.
            masks: Real positions (batch, seq) of each; others are not read.
            by_token: Whether each position has logits: (batch, seq, labels), else (batch, labels).
        """
        read = [torch.where(mask[..., None], state, 0) for state, mask in zip(states, masks, strict=True)]
        if not by_token:
            read = [mean(state, mask) for state, mask in zip(read, masks, strict=True)]
        return [head(x.to(head.weight.dtype)) for head, x in zip(self.heads, read, strict=True)]


def mean(state: Tensor, mask: Tensor) -> Tensor:
    """Over real positions, (batch, ..., width) with 0 at the others -> (batch, width), in float32 at least."""
    total = state.flatten(1, -2).sum(1, dtype=torch.promote_types(state.dtype, torch.float32))
    return total / mask.flatten(1).sum(1, keepdim=True).clamp(min=1)


def auxiliary_loss(head: Head, logits: Sequence[Tensor], batch: dict[str, Tensor]) -> Tensor:
    """The task loss, summed over samples or labelled positions (a mean over a sample's outputs), the mean over blocks.

    Args:
        head: What the labels mean.
        logits: Of each block, see `AuxiliaryClassifiers`.
        batch: The inputs and labels.
    """
    raised = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in logits]
    losses = [item_losses(head.kind, x, batch["labels"]) for x in raised]
    return torch.stack(losses).mean()


def item_losses(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The sum for one block: logits (batch[, seq], classes), labels (batch[, seq]) of classes or (batch[, outputs])."""
    if kind == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="sum") / logits.shape[-1]
    if kind == "regression":
        return F.mse_loss(logits, labels.reshape(logits.shape).to(logits), reduction="sum") / logits.shape[-1]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def check_auxiliary(head: Head, model: PreTrainedModel) -> None:
    """Raise unless the head is a classifier whose labels a block's features could tell.

    A language model's is as large as its embedding, and each block would need one; multiple choice has no labels of its own.

    Raises:
        ValueError: It is not.
    """
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    words = head.kind == "next_token" or head.kind == "tokens" and model.get_output_embeddings() is not None
    choice = name in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()
    if words or choice or head.kind not in (*POOLED, "tokens"):
        found = "a language model" if words else "multiple choice" if choice else f"of kind {head.kind!r}"
        raise ValueError(
            "auxiliary_weight > 0 wants a classification or regression head of a text, an image, or each token, on whose "
            f"labels every block gets a classifier; the head of {name} is {found}: set auxiliary_weight=0"
        )


def attach(model: PreTrainedModel, widths: Sequence[int], labels: int) -> None:
    """Give `model` its auxiliary classifiers, where and in the dtype that it is, as a submodule: optimizer and DDP see them."""
    model.add_module(NAME, AuxiliaryClassifiers(widths, labels).to(model.device, model.dtype))


def detach(model: nn.Module) -> None:
    """Take them away again."""
    if hasattr(model, NAME):
        delattr(model, NAME)
