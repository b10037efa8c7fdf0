"""Measured times as data: what a site costs in ms by the number of its units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LatencyTable:
    """How long one forward pass takes, and how much of that each site takes; plain data, `asdict` gives JSON.

    Attributes:
        batch: Samples of a pass.
        seq_len: Tokens of a sample; None where the input is no text.
        device: The name of what computed.
        whole: Milliseconds of the model as it is.
        curves: Class of sites -> [[units left, ms of one such site], ...], ascending in both; between them it is linear.
            Only differences of these ms mean something.
        classes: Site name -> its class.
    """

    batch: int
    seq_len: int | None
    device: str
    whole: float
    curves: dict[str, list[list[float]]]
    classes: dict[str, str]

    def site_ms(self, name: str, kept: int) -> float:
        """Milliseconds of one site that has `kept` units, over those of one that has the fewest that were timed."""
        units, ms = zip(*self.curves[self.classes[name]], strict=True)
        return float(np.interp(kept, units, ms))

    def model_ms(self, kept: dict[str, int] | None = None) -> float:
        """Predicted milliseconds of a pass; `kept` gives units left by site (default: all)."""
        whole = {name: int(self.curves[kind][-1][0]) for name, kind in self.classes.items()}
        gone = [self.site_ms(n, total) - self.site_ms(n, (kept or {}).get(n, total)) for n, total in whole.items()]
        return self.whole - sum(gone)


def monotone(values: list[float]) -> list[float]:
    """The rising sequence that is nearest in squares: neighbours that fall are joined at their mean.

    Source: Ayer et al. 1955, pool adjacent violators.
    """
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [float(np.mean(pool)) for pool in pools for _ in pool]
