"""Learned maps from the student's features to the teacher's where their widths differ.

They go from the student to the teacher, whose features are fixed, so that nothing is won by mapping all to one point. Source:
Romero et al. 2015, FitNets. They begin as the ridge least-squares fit on the calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers import LayerMatch, match_layers

NAME = "kdprune_projection"  # the submodule of the student that holds them while it trains


class Projections(nn.Module):
    """One affine map a mapped layer of other width."""

    def __init__(self, maps: dict[int, Tensor], variances: dict[int, float]):
        """Take, by the number of the mapped layer, (student hidden + 1, teacher hidden), and the teacher's variance."""
        super().__init__()
        self.maps = nn.ParameterDict({str(i): nn.Parameter(weight) for i, weight in maps.items()})
        self.variances = variances

    def forward(self, i: int, state: Tensor) -> Tensor:
        """Student features (..., hidden) of mapped layer i -> (..., teacher hidden)."""
        weight = self.maps[str(i)].to(state.dtype)
        return state @ weight[:-1] + weight[-1]


def fit(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[dict[str, Tensor]], matches: Sequence[LayerMatch]
) -> Projections | None:
    """The maps that fit best to begin with; None where all widths are equal."""
    if all(match.projection is None for match in matches):
        return None
    forth = match_layers(teacher, model, batches, [[m.teacher, m.student] for m in matches])
    own = match_layers(teacher, None, batches, [[m.teacher, m.teacher] for m in matches])
    maps = {i: match.projection for i, match in enumerate(forth) if match.projection is not None}
    return Projections(maps, {i: own[i].variance for i in maps})


def attach(model: nn.Module, projections: Projections | None) -> None:
    """Give the student its maps, as a submodule so that optimizer and DDP see them."""
    if projections is not None:
        model.add_module(NAME, projections.to(model.device))


def detach(model: nn.Module) -> None:
    """Take them away again."""
    if hasattr(model, NAME):
        delattr(model, NAME)
