"""What a user allows: "macs=0.5", "params=12M", "heads=0.5,ffn=0.25", "latency=12ms", "loss=1%"."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from .latency_table import LatencyTable
from .sites import Site, Sites

SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "ms": 1, "%": 1e-2}

# What each budget counts: the cost of the whole model, and that of one unit of a site.
WHOLE: dict[str, Callable[[Sites, dict[str, int] | None], float]] = {
    "macs": lambda sites, kept: sites.macs(kept),
    "params": lambda sites, kept: sites.params(kept),
    "latency": lambda sites, kept: times_of(sites).model_ms(kept),
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
BOTH = ("attention", "ffn")
KINDS = {"macs": BOTH, "params": BOTH, "latency": BOTH, "heads": ("attention",), "ffn": ("ffn",)}
# The suffixes that each may have; one without a suffix is a share in (0, 1].
UNITS = {"macs": "K M G", "params": "K M G", "latency": "ms", "heads": "", "ffn": "", "loss": "%"}

RULE = (
    'a budget is "macs=", "params=" or "latency=" with what remains as a share in (0, 1] or an absolute number with K, M or G, '
    'of a latency with ms ("macs=0.5", "params=12M", "latency=12ms"); or "heads=" and "ffn=" with shares '
    '("heads=0.5,ffn=0.25"); or "loss=" with the feature loss in (0, 1] or the share of the metric that may be lost '
    '("loss=0.1", "loss=1%")'
)
WITHOUT_TIMES = (
    'a budget of "latency=" needs measured times, and none were measured: give a KDPruneTrainer '
    'KDPruneConfig(budget="latency=..."), or set scores.latency = time_sites(model, batch, scores.sites) '
    "(hf_kdprune.prune.latency)"
)


def times_of(sites: Sites) -> LatencyTable:
    """The measured times of `sites`, or a ValueError that says how to get them."""
    if sites.latency is None:
        raise ValueError(WITHOUT_TIMES)
    return sites.latency


def cost_of(counts: str, site: Site, sites: Sites, kept: int) -> float:
    """What `kept` units of one site cost; only differences of it mean something."""
    if counts == "latency":
        return times_of(sites).site_ms(site.name, kept)
    return UNIT[counts](site, sites) * kept


def units_left(sites: Sites, kind: str, kept: dict[str, int] | None) -> int:
    """Number of units of `kind` that remain."""
    return sum((kept or {}).get(s.name, s.total) for s in sites if s.kind == kind)


@dataclass(frozen=True)
class Limit:
    """One part of a budget.

    Attributes:
        counts: "macs", "params", "latency", "heads", "ffn" or "loss".
        value: A share of the model as given where it is at most 1 and has no unit, else an absolute number.
        unit: "ms" of a latency, "%" of a loss that is a share of the metric; else "".
    """

    counts: str
    value: float
    unit: str = ""

    def allowed(self, sites: Sites) -> float:
        """The most that may remain, in MACs, parameters, ms or units."""
        share = self.value <= 1 and not self.unit
        return self.value * WHOLE[self.counts](sites, None) if share else self.value

    def figure(self, value: float) -> str:
        """A cost as one would write it: "1,200 macs", "3.41 ms"."""
        return f"{value:.3g} ms" if self.counts == "latency" else f"{value:,.0f} {self.counts}"


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

    @property
    def counts(self) -> str:
        """What the first limit counts."""
        return self.limits[0].counts

    @property
    def measured(self) -> bool:
        """Whether it bounds what is measured, and may come out otherwise the next time."""
        return self.counts in ("latency", "loss")

    def check(self, sites: Sites, floors: dict[str, int] | None = None, held: str = "") -> None:
        """Raise unless the budget can be reached on `sites`; a latency or a loss is known only once it was measured.

        Args:
            sites: The sites.
            floors: Site name -> units that are left when all that may go is gone; default: what blocks cannot do without.
            held: What holds them, for the message.

        Raises:
            ValueError: It lies above the model as it is, or below what is left when every unit that may go is gone.
        """
        for limit in (i for i in self.limits if i.counts in WHOLE and (i.counts != "latency" or sites.latency)):
            whole = WHOLE[limit.counts](sites, None)
            if not whole:
                raise ValueError(f"budget {self.asked!r} counts {limit.counts}; this model has none: leave it out")
            bare = {site.name: site.least for site in sites}
            left = bare if floors is None else floors
            least = WHOLE[limit.counts](sites, left)
            same = least == WHOLE[limit.counts](sites, bare)
            gone = "every head and neuron is gone" if same else f"all is gone that {held} lets go"
            if not least <= limit.allowed(sites) <= whole:
                raise ValueError(
                    f"budget {self.asked!r} asks for {limit.figure(limit.allowed(sites))}; this model has "
                    f"{limit.figure(whole)} and {limit.figure(least)} when {gone}: choose a share between "
                    f"{math.ceil(least / whole * 1000 - 1e-9) / 1000:.3f} and 1"
                )

    def reached(self, sites: Sites, kept: dict[str, int]) -> dict[str, float]:
        """The share of the model as given that remains, by what is counted."""
        return {i.counts: WHOLE[i.counts](sites, kept) / WHOLE[i.counts](sites, None) for i in self.limits}


def parse_limit(part: str, text: str) -> Limit:
    """Read "macs=0.5", "params=12M" or "latency=12ms"."""
    match = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9.]+(?:e-?\d+)?)\s*([KMG%]|ms|)\s*", part)
    if match is None or match[1] not in UNITS:
        raise ValueError(f"{RULE}; got {text!r}")
    counts, number, suffix = match.groups()
    try:
        value = float(number) * SUFFIXES.get(suffix, 1)
    except ValueError as error:
        raise ValueError(f"{RULE}; got {text!r}") from error
    if suffix and suffix not in UNITS[counts].split():
        raise ValueError(f"{RULE}; got {text!r}")
    fits = {"ms": 0 < value < math.inf, "%": 0 <= value < 1, "": 0 < value <= 1}
    if not fits.get(suffix, 1 < value < math.inf):
        raise ValueError(f"{RULE}; got {text!r}")
    return Limit(counts, value, suffix if suffix in ("ms", "%") else "")
