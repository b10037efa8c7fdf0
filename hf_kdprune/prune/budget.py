"""What a user allows to remain: "macs=0.5", "params=12M", "heads=0.5,ffn=0.25"."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from .sites import Site, Sites

SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9}

# What each budget counts: the cost of the whole model, and that of one unit of a site.
WHOLE: dict[str, Callable[[Sites, dict[str, int] | None], int]] = {
    "macs": lambda sites, kept: sites.macs(kept),
    "params": lambda sites, kept: sites.params(kept),
    "heads": lambda sites, kept: units_left(sites, "attention", kept),
    "ffn": lambda sites, kept: units_left(sites, "ffn", kept),
}
UNIT: dict[str, Callable[[Site, Sites], int]] = {
    "macs": lambda site, sites: site.unit_macs,
    "params": lambda site, sites: site.unit_params,
    "heads": lambda site, sites: int(site.kind == "attention"),
    "ffn": lambda site, sites: int(site.kind == "ffn"),
}
# What is cut under each budget; one that counts heads leaves the neurons alone.
KINDS = {"macs": ("attention", "ffn"), "params": ("attention", "ffn"), "heads": ("attention",), "ffn": ("ffn",)}

RULE = (
    'a budget is "macs=" or "params=" with what remains as a share in (0, 1] or an absolute number with K, M or G '
    '("macs=0.5", "params=12M"), or "heads=" and "ffn=" with shares ("heads=0.5,ffn=0.25")'
)


def units_left(sites: Sites, kind: str, kept: dict[str, int] | None) -> int:
    """Number of units of `kind` that remain."""
    return sum((kept or {}).get(s.name, s.total) for s in sites if s.kind == kind)


@dataclass(frozen=True)
class Limit:
    """One part of a budget.

    Attributes:
        counts: "macs", "params", "heads" or "ffn".
        value: A share of the model as given where it is at most 1, else an absolute number.
    """

    counts: str
    value: float

    def allowed(self, sites: Sites) -> float:
        """The most that may remain, in MACs, parameters or units."""
        return self.value * WHOLE[self.counts](sites, None) if self.value <= 1 else self.value


@dataclass(frozen=True)
class Budget:
    """What may remain of a model; every limit holds."""

    asked: str
    limits: tuple[Limit, ...]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget as a user writes it.

        Raises:
            ValueError: It is no budget; the message states the rule.
        """
        limits = tuple(parse_limit(part, text) for part in str(text).split(","))
        names = [limit.counts for limit in limits]
        if len(set(names)) < len(names) or (len(names) > 1 and set(names) != {"heads", "ffn"}):
            raise ValueError(f"{RULE}; got {text!r}, whose parts do not go together")
        return cls(str(text), limits)

    def check(self, sites: Sites) -> None:
        """Raise unless the budget can be reached on `sites`.

        Raises:
            ValueError: It lies above the model as it is, or below what is left when every unit is gone.
        """
        for limit in self.limits:
            whole = WHOLE[limit.counts](sites, None)
            if not whole:
                raise ValueError(f"budget {self.asked!r} counts {limit.counts}; this model has none: leave it out")
            least = WHOLE[limit.counts](sites, {site.name: site.least for site in sites})
            if not least <= limit.allowed(sites) <= whole:
                raise ValueError(
                    f"budget {self.asked!r} asks for {limit.allowed(sites):,.0f} {limit.counts}; this model has "
                    f"{whole:,} and {least:,} when every head and neuron is gone: choose a share between "
                    f"{math.ceil(least / whole * 1000) / 1000:.3f} and 1"
                )

    def reached(self, sites: Sites, kept: dict[str, int]) -> dict[str, float]:
        """The share of the model as given that remains, by what is counted."""
        return {i.counts: WHOLE[i.counts](sites, kept) / WHOLE[i.counts](sites, None) for i in self.limits}


def parse_limit(part: str, text: str) -> Limit:
    """Read "macs=0.5" or "params=12M"."""
    match = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9.]+(?:e-?\d+)?)\s*([KMG]?)\s*", part)
    if match is None or match[1] not in WHOLE:
        raise ValueError(f"{RULE}; got {text!r}")
    counts, number, suffix = match.groups()
    try:
        value = float(number) * SUFFIXES.get(suffix, 1)
    except ValueError as error:
        raise ValueError(f"{RULE}; got {text!r}") from error
    absolute = bool(suffix) and counts in ("macs", "params")
    if value <= 0 or (suffix and not absolute) or (value > 1) != absolute:
        raise ValueError(f"{RULE}; got {text!r}")
    return Limit(counts, value)
