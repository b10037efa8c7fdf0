"""Deep supervision: a linear classifier on each block's features, trained with the task loss and dropped on save.

Source: Lee et al. 2015, Deeply-Supervised Nets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

NAME = "kdprune_auxiliary"  # the submodule of the student that holds them while it trains


class AuxiliaryClassifiers(nn.Module):
    """One classifier a block, on the mean of its features over real positions."""

    def __init__(self, blocks: int, hidden: int, labels: int):
        """Take the number of blocks, the width of their features and the number of labels."""
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(hidden, labels) for _ in range(blocks))

    def forward(self, states: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Block features (batch, seq, hidden) and real positions (batch, seq) -> logits (blocks, batch, labels)."""
        weight = mask[..., None].to(states[0])
        pooled = [(state * weight).sum(1) / weight.sum(1).clamp(min=1) for state in states]
        return torch.stack([head(x) for head, x in zip(self.heads, pooled, strict=True)])


def attach(model: PreTrainedModel) -> None:
    """Give `model` its auxiliary classifiers, as a submodule so that optimizer and DDP see them."""
    config = model.config
    classifiers = AuxiliaryClassifiers(config.num_hidden_layers, config.hidden_size, config.num_labels)
    model.add_module(NAME, classifiers.to(model.device))


def detach(model: PreTrainedModel) -> None:
    """Take them away again."""
    if hasattr(model, NAME):
        delattr(model, NAME)


def auxiliary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of all blocks: logits (blocks, batch, classes), labels (batch,)."""
    return torch.stack([F.cross_entropy(block, labels) for block in logits]).mean()
