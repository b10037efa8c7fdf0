"""What every score is asked for, beside models and data."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...layers import LayerMatch
from ...ranks import Ranks
from ..sites import Sites


@dataclass(frozen=True)
class Asked:
    """The question to a score.

    Attributes:
        sites: Where the units are.
        matches: Which student layer learns from which teacher layer; None: by depth.
        seed: Of whatever is random.
        ranks: The processes that share the batches.
    """

    sites: Sites
    matches: list[LayerMatch] | None = None
    seed: int = 0
    ranks: Ranks = field(default_factory=Ranks.alone)
