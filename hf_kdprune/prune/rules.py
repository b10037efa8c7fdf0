"""What a plan must respect beside its budget: widths, shapes, and what must stay."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .sites import Site, Sites

SHAPES = ("free", "uniform", "stock")
KEEP_RULE = (
    'keep is a list of what must stay: the name of a site ("bert.encoder.layer.0.attention"), the path of a layer '
    '("bert.encoder.layer.0"), or units of a site ("bert.encoder.layer.3.attention:0,5", ":0-3")'
)
LEAST_RULE = "least is what each site keeps at least: None, a share in (0, 1), or a whole number of units, 0 or more"


@dataclass(frozen=True)
class Bounds:
    """What must stay of each site of one model.

    Attributes:
        protected: Site name -> units that are never removed.
        floors: Site name -> number of units that stay at least.
        ceilings: Site name -> number of units that are left, of which a plan can choose.
    """

    protected: dict[str, frozenset[int]]
    floors: dict[str, int]
    ceilings: dict[str, int]


@dataclass(frozen=True)
class Rules:
    """What a user asks of a plan beside its budget.

    Attributes:
        round_to: FFN widths become multiples of it.
        shapes: "free", "uniform" (every layer alike) or "stock" (what the model's own class can build).
        keep: Sites, layers and units that are never removed, see `KEEP_RULE`.
        least: Units that each site keeps, as a share of them or as a number; a site of fewer keeps all. None: of free shapes,
            no site loses more than twice the share that all lose, as far as the budget allows (`Scores.trusted`).

    Raises:
        ValueError: One of them is none of what it may be.
    """

    round_to: int = 8
    shapes: str = "free"
    keep: Sequence[str] = ()
    least: float | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        if self.round_to < 1:
            raise ValueError(f"round_to must be at least 1, got {self.round_to}")
        if self.shapes not in SHAPES:
            raise ValueError(f"shapes must be one of {list(SHAPES)}, got {self.shapes!r}")
        if isinstance(self.keep, str) or not all(isinstance(entry, str) for entry in self.keep):
            raise ValueError(f"{KEEP_RULE}; got {self.keep!r}: give a list of texts")
        least = self.least or 0
        if not (0 <= least < 1 or (least >= 1 and float(least).is_integer())):
            raise ValueError(f"{LEAST_RULE}; got {self.least!r}")

    def __str__(self) -> str:
        """What is asked, for a message."""
        said = [f"keep={list(self.keep)}"] * bool(self.keep) + ([f"least={self.least:g}"] if self.least else [])
        said += [f"shapes={self.shapes!r}"] * (self.shapes != "free")
        return ", ".join([*said, f"round_to={self.round_to}"])

    def bounds(self, sites: Sites) -> Bounds:
        """What must stay of `sites`.

        Raises:
            ValueError: The keep-list names what is not there, or a unit twice.
        """
        units: dict[str, list[int]] = {site.name: [] for site in sites}
        whole: set[str] = set()
        for entry in self.keep:
            for site, named in read_entry(entry, sites):
                units[site.name] += named
                if not named:
                    whole.add(site.name)
        for name, named in units.items():
            if twice := sorted({u for u in named if named.count(u) > 1}):
                raise ValueError(f"{KEEP_RULE}; got {name}:{twice[0]} twice in {list(self.keep)}: name it once")
        protected = {s.name: frozenset(range(s.total) if s.name in whole else units[s.name]) for s in sites}
        floors = {s.name: max(len(protected[s.name]), self.fewest_of(s)) for s in sites}
        return Bounds(protected, floors, {s.name: s.total for s in sites})

    def fewest_of(self, site: Site) -> int:
        """Units that one site keeps whatever the keep-list says: what its block needs, and `least`."""
        least = self.least or 0
        asked = math.ceil(least * site.total - 1e-9) if least < 1 else int(least)
        return min(max(site.least, asked), site.total)

    def step(self, site: Site) -> int:
        """Units that go from a site together."""
        return self.round_to if site.kind == "ffn" else 1

    def narrowest(self, site: Site, floor: int) -> int:
        """The least number of units, `floor` or more, that a site may have with `round_to`."""
        return min(-(-floor // self.step(site)) * self.step(site), site.total)

    def below(self, site: Site, units: float) -> int:
        """The largest number of units, `units` or fewer, that a site may have with `round_to`."""
        return int(units / self.step(site) + 1e-9) * self.step(site)


def read_entry(entry: str, sites: Sites) -> list[tuple[Site, list[int]]]:
    """The sites that one entry of a keep-list names, and the units of each; no units: all of them."""
    match = re.fullmatch(r"([^:]+?)(?::\s*([\d,\s-]+))?", entry.strip())
    if match is None:
        raise ValueError(f"{KEEP_RULE}; got {entry!r}")
    name, listed = match.groups()
    found = [s for s in sites if s.name == name]
    found = found or [s for s in sites if any(p.startswith(f"{name}.") for p in (s.name, *s.consumers))]
    if not found:
        known = list(dict.fromkeys(n for s in sites for n in (s.name, s.name.rpartition(".")[0])))
        near = difflib.get_close_matches(name, known, 4, 0.5) or known[:4]
        raise ValueError(f"{KEEP_RULE}; got {entry!r}, which is no site or layer of this model: near are {', '.join(near)}")
    if listed is None:
        return [(site, []) for site in found]
    if len(found) > 1:
        names = ", ".join(site.name for site in found)
        raise ValueError(f"{KEEP_RULE}; got {entry!r}, which names units of {len(found)} sites: choose one of {names}")
    return [(found[0], read_units(listed, entry, found[0]))]


def read_units(listed: str, entry: str, site: Site) -> list[int]:
    """Read "0,5" or "0-3,7", in the order in which they were written."""
    units: list[int] = []
    for part in listed.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(f"{KEEP_RULE}; got {entry!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < site.total:
            raise ValueError(
                f"{KEEP_RULE}; got {entry!r}, but {site.name} has the units 0 to {site.total - 1}: name those, the lower first"
            )
        units += range(first, last + 1)
    return units
